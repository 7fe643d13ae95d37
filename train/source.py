"""A trained model on disk, whatever holds it: a run folder, one checkpoint of it, or an export.

Owns the finding and the checking of it, and the reading of its weights: whole, or the ranges that a rank asks for. Changes nothing.
Called by train/trained.py (to generate and evaluate), train/begin.py (another run begins from it) and train/checkpoint_tool.py (export).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from train import checkpoint
from train.boxes import Span, common
from train.checkpoint import Mesh
from train.checkpoint_folder import LOOKS, identity, is_taken_away, say_taken_away
from train.config import Config, read_saved
from train.engine import LocalMesh
from train.export import ExportConfig, is_export, read_export
from train.manifest import MANIFEST, STATE, Manifest, read_manifest
from train.storage import DTYPES, Part, check_files, mapped, read_parts
from train.together import on_every_rank

MASTER = "master"
Result = TypeVar("Result")
NOT_OF_THE_MODEL = re.compile(r"memory\.\d+\.")  # states of the data's streams


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint of a run. Ranges are read from the pieces that hold them, and nothing else is.

    step: updates done. config: of the run. shapes: of every weight and state of the model by logical name, in logical shapes.
    """

    path: Path
    step: int
    config: Config
    tokenizer: Tokenizer
    manifest: Manifest

    @cached_property
    def _kinds(self) -> dict[str, str]:
        kinds = {}
        for stored in self.manifest.tensors:
            kind, name = stored.split("/", 1)
            if kind == MASTER or (kind == STATE and not NOT_OF_THE_MODEL.match(name)):
                kinds[name] = kind
        return kinds

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self.manifest.tensors[f"{kind}/{name}"].shape) for name, kind in self._kinds.items()}

    @property
    def states(self) -> frozenset[str]:
        """Which of the names are states, not weights."""
        return frozenset(name for name, kind in self._kinds.items() if kind == STATE)

    def read(self, name: str) -> Tensor:
        """A whole tensor, float32."""
        stored = f"{self._kinds[name]}/{name}"
        entry = self.manifest.tensors[stored]
        values = torch.empty(entry.numel, dtype=DTYPES[entry.dtype])
        read_parts(self.path, self.manifest, [Part(stored, tuple(entry.shape), 0, values)])
        return values.reshape(entry.shape)

    def fill(self, parts: Sequence[Part]) -> None:
        """Fills ranges of weights, named by their logical names, in place."""
        named = [Part(f"{MASTER}/{part.name}", part.shape, part.start, part.values, part.box) for part in parts]
        read_parts(self.path, self.manifest, named)


@dataclass(frozen=True)
class ExportSource:
    """An export, with the same attributes. Its files are mapped into memory: only what is copied is read."""

    path: Path
    step: int
    config: Config
    tokenizer: Tokenizer
    files: dict[str, str]  # by tensor name
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        with mapped(self.path / self.files[name], remedy="export the model again") as opened:
            return opened.get_tensor(name).to(torch.float32)

    def fill(self, parts: Sequence[Part]) -> None:
        fill_from(parts, self.read)


Source = CheckpointSource | ExportSource


def read_from(folder: Path, work: Callable[[Source], Result], *, setting: str, mesh: Mesh | None = None) -> Result:
    """What `work` makes of the model in `folder`: a run folder or its folder of checkpoints (the newest whole one), one checkpoint, or an
    export.

    Every file's checksum is compared. With a mesh, all ranks call this and share that work. If a run that goes on takes the
    checkpoint away meanwhile, `work` begins again with the newest one: what fails in it must fail on all ranks.

    Args:
        setting: what the user has named the folder in, for the errors.

    Raises:
        ValueError: there is none, or the tokenizer beside it is another.
        RuntimeError: it is damaged, or was taken away: the one that the user has named, or each newest one.
    """
    mesh = mesh or LocalMesh(torch.device("cpu"))
    path, failure = folder, None
    for _ in range(LOOKS):
        path, run = _find(folder, setting=setting, mesh=mesh)
        there = identity(path)
        try:
            return work(_open(path, run, mesh, verify=path == folder))
        except RuntimeError as error:
            if not any(mesh.all_gather_object(is_taken_away(path, there))):
                raise
            failure = error
        if path == folder:
            break
    raise RuntimeError(say_taken_away(path)) from failure


def _find(folder: Path, *, setting: str, mesh: Mesh) -> tuple[Path, Path | None]:
    """The checkpoint and its run folder; an export and None."""
    if is_export(folder):
        return folder, None
    if (folder / MANIFEST).is_file():
        return folder, folder.absolute().parent.parent
    inner = folder / "checkpoints"
    checkpoints = folder if not inner.is_dir() and folder.absolute().name == "checkpoints" else inner
    newest = checkpoint.latest(checkpoints, mesh=mesh)
    if newest is None:
        raise ValueError(
            f"{setting} must name the folder of a run that was saved, or an export, but {checkpoints} holds no checkpoint"
        )
    return newest, checkpoints.absolute().parent


def _open(path: Path, run: Path | None, mesh: Mesh, *, verify: bool) -> Source:
    if run is None:
        return on_every_rank(mesh, lambda: _export(path, mesh))
    return on_every_rank(mesh, lambda: _checkpoint(path, run, mesh if verify else None))


def read_all(source: Source) -> dict[str, Tensor]:
    """Every weight and state, whole."""
    return {name: source.read(name) for name in source.shapes}


def fill_from(parts: Sequence[Part], read: Callable[[str], Tensor]) -> None:
    """Fills ranges of tensors that `read` gives whole, by name; each is asked for once if its parts follow each other."""
    name, flat = None, torch.empty(0)
    for part in parts:
        if part.name != name:
            name, flat = part.name, read(part.name).reshape(-1)
        for to, source in common(part.span, Span(None, 0, flat.numel()), part.shape):
            to.of(part.values).copy_(source.of(flat))


def _checkpoint(path: Path, run: Path, verify: Mesh | None) -> CheckpointSource:
    manifest = read_manifest(path)
    if verify is not None:
        check_files(path, manifest.files, share=verify.rank, shares=verify.world_size)
    tokenizer = load_tokenizer(run / TOKENIZER_FILE)
    if tokenizer.tokenizer_id != manifest.extra["tokenizer_id"]:
        raise ValueError(
            f"{run / TOKENIZER_FILE} must be the tokenizer of the run, but it is {tokenizer.tokenizer_id} and {path} was trained with "
            f"{manifest.extra['tokenizer_id']}: restore it from the run's shards"
        )
    return CheckpointSource(path, manifest.step, read_saved(manifest.config), tokenizer, manifest)


def _export(folder: Path, verify: Mesh) -> ExportSource:
    config = read_export(folder)
    check_files(folder, config.files, share=verify.rank, shares=verify.world_size)
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    if tokenizer.tokenizer_id != config.tokenizer_id:
        raise ValueError(
            f"{folder / TOKENIZER_FILE} must be the tokenizer of the export, but it is {tokenizer.tokenizer_id} and the model was "
            f"trained with {config.tokenizer_id}: export the model again"
        )
    return _opened(folder, config, tokenizer)


def _opened(folder: Path, config: ExportConfig, tokenizer: Tokenizer) -> ExportSource:
    files, shapes = {}, {}
    for name in sorted(config.files):
        with mapped(folder / name, remedy="export the model again") as opened:
            names = opened.keys()  # the opened file itself is no iterable
            for tensor in names:
                files[tensor], shapes[tensor] = name, tuple(opened.get_slice(tensor).get_shape())
    saved = read_saved({**config.trained_with, "model": config.model})
    return ExportSource(folder, config.step, saved, tokenizer, files, shapes)
