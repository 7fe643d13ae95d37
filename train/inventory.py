"""What lies in a folder of checkpoints: each with its size, who wrote it and what is wrong with it; and which ones may go.

Owns the looking and the rule of pruning. Does not own how checkpoints are written and found again (train/checkpoint.py) nor what is
printed (train/checkpoint_tool.py, the caller). One process.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import checkpoint_folder
from train.manifest import MANIFEST, Manifest, read_manifest
from train.storage import check_file, check_size


@dataclass(frozen=True)
class Found:
    """A checkpoint in its folder. size: bytes on disk. problem: what the checks have found; None for a whole one.

    position and layout are None where the manifest cannot be read. meant: `latest` means this one.
    """

    path: Path
    step: int
    size: int
    num_files: int
    position: int | None
    layout: str | None
    problem: str | None
    meant: bool


def checkpoints_of(folder: Path) -> Path:
    """The folder of checkpoints, of a run folder or of itself.

    Raises:
        ValueError: it is neither.
    """
    if (folder / "checkpoints").is_dir():
        return folder / "checkpoints"
    if folder.is_dir() and (folder.absolute().name == "checkpoints" or checkpoint_folder.candidates(folder)):
        return folder
    raise ValueError(
        f"DIR must be a run folder or its folder of checkpoints, but {folder} holds neither checkpoints/ nor a checkpoint: "
        "give the run.dir of a run that was saved"
    )


def inventory(folder: Path) -> list[Found]:
    """Every checkpoint, the oldest first; manifests are checked and the lengths of files, no tensor file is read.

    What a run beside this process takes away meanwhile is not in it.
    """
    found: list[Found | None] = []
    for _ in range(checkpoint_folder.LOOKS):
        meant = checkpoint_folder.meant(folder)
        found = [_look(folder / name, meant=name == meant) for name in checkpoint_folder.candidates(folder)]
        if None not in found:
            break
    return sorted((one for one in found if one is not None), key=lambda one: (one.step, one.path.name))


def damages(path: Path, *, tell: Callable[[int], object] = lambda size: None) -> list[str] | None:
    """A sentence for each damaged file of a checkpoint, of which every byte is read; None if a run has taken it away meanwhile.

    tell: called with the bytes that were read.
    """
    there, sentences = checkpoint_folder.identity(path), []
    try:
        for name, entry in sorted(read_manifest(path).files.items()):
            try:
                check_file(path / name, entry, tell=tell)
            except RuntimeError as error:
                sentences.append(str(error))
    except RuntimeError as error:
        sentences.append(str(error))
    return None if sentences and checkpoint_folder.is_taken_away(path, there) else sentences


def prunable(found: list[Found], *, keep: int, every: int | None) -> list[Found]:
    """Those that may go when the newest `keep` stay, and each whose step is a multiple of `every`.

    The one that `latest` means stays, and so does the newest whole one: for this files are read, from the newest on, until a
    whole checkpoint is found.
    """
    newest = found[-keep:]
    goes = [one for one in found if not (one in newest or one.meant or (every and one.step % every == 0))]
    if goes:
        whole = next((one for one in reversed(found) if _is_whole(one)), None)
        goes = [one for one in goes if one is not whole]
    return goes


def _is_whole(one: Found) -> bool:
    return one.problem is None and damages(one.path) == []


def _look(path: Path, *, meant: bool) -> Found | None:
    """None if it was taken away meanwhile."""
    there, sizes = checkpoint_folder.identity(path), {}
    with contextlib.suppress(
        FileNotFoundError, NotADirectoryError
    ):  # taken away, or a file that has a checkpoint's name
        sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
    manifest = None
    try:
        manifest = read_manifest(path)
        problem = _cheap_problem(path, manifest, sizes)
    except RuntimeError as error:
        problem = str(error)
    if problem is not None and checkpoint_folder.is_taken_away(path, there):
        return None
    return Found(
        path=path,
        step=checkpoint_folder.step_of(path.name),
        size=sum(sizes.values()),
        num_files=len(sizes),
        position=None if manifest is None else manifest.position,
        layout=None if manifest is None else _layout(manifest),
        problem=problem,
        meant=meant,
    )


def _cheap_problem(path: Path, manifest: Manifest, sizes: dict[str, int]) -> str | None:
    for name, entry in sorted(manifest.files.items()):
        if name not in sizes:
            return f"{path / name} is missing: it is listed in {MANIFEST}"
        try:
            check_size(path / name, sizes[name], entry)
        except RuntimeError as error:
            return str(error)
    return None


def _layout(manifest: Manifest) -> str:
    """Who wrote it, as far as it says."""
    layout, parallel = (
        _section(tree, name) for tree, name in ((manifest.extra, "layout"), (manifest.config, "parallel"))
    )
    words = {"processes": layout.get("processes"), "ep_size": layout.get("ep_size"), "zero": parallel.get("zero_stage")}
    return ", ".join(f"{name} {value}" for name, value in words.items() if value is not None)


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    section = tree.get(name)
    return section if isinstance(section, dict) else {}
