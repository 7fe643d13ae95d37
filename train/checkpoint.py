"""Checkpoints: what a run needs to go on, on disk in a form that any layout reads, visible only when it is whole.

Owns what all ranks do together: save, find the newest whole checkpoint, fill each rank's ranges. Does not own the format
(train/manifest.py, docs/checkpoint_format.md), the tensor files (train/storage.py), the names and renames in the folder
(train/checkpoint_folder.py), nor which ranges a rank holds: train/resume.py, the caller, brings them as `Fragment`s.

`python -m train.checkpoint list|verify|prune|export` is train/checkpoint_tool.py.

Every function that takes a mesh is called by all ranks, and makes the same collectives on each even when one of them fails.
"""

import logging
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from model.fragments import Fragment
from train import checkpoint_folder
from train.coverage import Report, check_load, check_save, parts_of, union
from train.engine import LocalMesh
from train.manifest import (
    FORMAT,
    MANIFEST,
    MANIFEST_SUM,
    STATE,
    VERSION,
    FileEntry,
    Manifest,
    Piece,
    Record,
    TensorEntry,
    check_json,
    config_digest,
    read_manifest,
    sum_line,
)
from train.storage import DTYPES, Part, Written, check_files, read_parts, write_file, write_tensors
from train.together import on_every_rank, on_rank_zero

logger = logging.getLogger(__name__)

SomeRecord = TypeVar("SomeRecord", bound=Record)


class Mesh(Protocol):
    """What a checkpoint asks of parallel/mesh.py."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def all_gather_object(self, value: Any) -> list[Any]: ...
    def raise_together(self, error: Exception | None) -> None: ...


@dataclass(frozen=True)
class TrainState:
    """The small state of a run, the same on all ranks; rank 0's is written.

    step: optimizer steps done. position: rows consumed. config: the resolved config. extra: whatever else is JSON (tokenizer id,
    seeds, layout). It comes back equal: floats keep every bit, tuples and NaN are refused.
    """

    step: int
    position: int
    config: dict[str, Any]
    extra: dict[str, Any]


def save(
    folder: Path,
    *,
    state: TrainState,
    fragments: list[Fragment],
    mesh: Mesh,
    keep: int,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes `folder`/step_NNNNNN from all ranks; returns it once it is on disk, checked and named by `latest`.

    Host memory: one piece (32 MiB) per rank. Nothing else in the process may change the tensors meanwhile: to write behind the
    training step, pass copies and a mesh with a process group of its own.

    Args:
        folder: the run's folder of checkpoints.
        fragments: what this rank holds (perhaps nothing). All ranks together hold each element of each logical tensor once.
        keep: checkpoints that stay, this one included; at least 1.
        tensors: whole named tensors (router bias, batch-norm statistics), any dtype; each from one rank: replicas from rank 0 only.

    Raises:
        RuntimeError: on all ranks, with the first failing rank's sentence. Earlier checkpoints and `latest` are as they were.
        ValueError: likewise, if an argument is not what it must be.
    """
    on_every_rank(mesh, lambda: _check_arguments(state, keep))
    parts = on_every_rank(mesh, lambda: parts_of(fragments, tensors or {}))
    reports = _gather(mesh, Report.of(parts, step=state.step, position=state.position))
    on_every_rank(mesh, lambda: check_save(reports))
    partial = checkpoint_folder.partial_path(folder, state.step)
    try:
        on_rank_zero(mesh, lambda: checkpoint_folder.prepare(folder, state.step))
        written = on_every_rank(mesh, lambda: write_tensors(partial / f"rank_{mesh.rank:05d}.safetensors", parts))
        files = _gather(mesh, written)
        on_rank_zero(mesh, lambda: _write_manifest(partial, state, reports, files))
        # Each rank reads the next rank's file: through a network file system its own would come from its own memory.
        share = (mesh.rank + 1) % mesh.world_size
        on_every_rank(mesh, lambda: _check_whole(partial, share=share, shares=mesh.world_size))
        on_rank_zero(mesh, lambda: checkpoint_folder.publish(folder, state.step, keep=keep))
    except (RuntimeError, ValueError):
        if mesh.rank == 0:
            checkpoint_folder.discard(partial)
        raise
    return checkpoint_folder.final_path(folder, state.step)


def latest(folder: Path, *, mesh: Mesh | None = None, up_to: int | None = None) -> Path | None:
    """The newest whole checkpoint: the one that `latest` names if it is good, else (with a warning) the one before; None if there is none.

    up_to: only those of this step and of earlier ones.

    Reads every byte to compare checksums: with a mesh (all ranks call it) the ranks share the work and agree on the answer.

    Raises:
        RuntimeError: there are checkpoints but none is whole; a run that began anew would in the end remove them. Or a run beside
            this process has removed each one while it was read.
    """
    mesh = mesh or LocalMesh(torch.device("cpu"))
    names, problem, is_gone = [], "", False
    for _ in range(checkpoint_folder.LOOKS):
        names = mesh.all_gather_object(on_rank_zero(mesh, lambda: checkpoint_folder.candidates(folder)))[0]
        names = [name for name in names if up_to is None or checkpoint_folder.step_of(name) <= up_to]
        is_gone = False
        for name in names:
            found = mesh.all_gather_object(_problem(folder / name, share=mesh.rank, shares=mesh.world_size))
            problem = next((sentence for sentence, _ in found if sentence is not None), "")
            is_gone = any(taken_away for _, taken_away in found)
            if not problem:
                return folder / name
            if is_gone:
                break
            if mesh.rank == 0:
                logger.warning("%s: trying the checkpoint before it", problem)
        if not is_gone:
            break
    if is_gone:
        raise RuntimeError(checkpoint_folder.say_taken_away(folder))
    if names:
        raise RuntimeError(
            f"no checkpoint in {folder} is whole, the last one because {problem}: move the folder away to start anew"
        )
    return None


def read_state(path: Path) -> TrainState:
    """The small state of the checkpoint `path`; opens its manifest only.

    Raises:
        RuntimeError: the manifest is damaged or of another version.
    """
    return _state_of(read_manifest(path))


def read_tensors(path: Path, *, kind: str = STATE, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The whole tensors of one kind by logical name, on the CPU: the named tensors of `save`, or all weights with kind="master".

    names: only these. File checksums are not compared again: `latest` and `load` do that.

    Raises:
        RuntimeError: the manifest is damaged, a file is not what it says, or a name is not in the checkpoint.
    """
    manifest = read_manifest(path)
    wanted = None if names is None else [f"{kind}/{name}" for name in names]
    missing = [name for name in wanted or () if name not in manifest.tensors]
    if missing:
        raise RuntimeError(f"{path} must hold {missing[0]}, but does not: go on with the checkpoint before it")
    if wanted is None:
        wanted = [name for name in manifest.tensors if name.startswith(f"{kind}/")]
    entries = {name: manifest.tensors[name] for name in wanted}
    parts = [Part(name, tuple(e.shape), 0, torch.empty(e.numel, dtype=DTYPES[e.dtype])) for name, e in entries.items()]
    read_parts(path, manifest, parts)
    return {part.name.removeprefix(f"{kind}/"): part.values.reshape(part.shape) for part in parts}


def load(path: Path, *, fragments: list[Fragment], mesh: Mesh, verify: bool = True) -> TrainState:
    """Fills every fragment of every rank in place, whatever layout wrote the checkpoint; a rank reads only its own ranges.

    The ranks may hold replicas, but together must take every element of every parameter: nothing of a checkpoint is left out.

    Args:
        path: a checkpoint folder, as `latest` returns it.
        verify: compare every file's checksum first, each file by one rank. False right after `latest(folder, mesh=mesh)` did that.

    Raises:
        RuntimeError: on all ranks: a damaged file, or a name, shape or range that differs between checkpoint and model.
    """
    manifest = on_every_rank(mesh, lambda: read_manifest(path))
    state = _state_of(manifest)
    parts = on_every_rank(mesh, lambda: parts_of(fragments, {}))
    reports = _gather(mesh, Report.of(parts, step=state.step, position=state.position))
    on_every_rank(mesh, lambda: check_load(path, manifest, reports))
    if verify:
        on_every_rank(mesh, lambda: check_files(path, manifest.files, share=mesh.rank, shares=mesh.world_size))
    on_every_rank(mesh, lambda: read_parts(path, manifest, parts))
    return state


def _state_of(manifest: Manifest) -> TrainState:
    return TrainState(step=manifest.step, position=manifest.position, config=manifest.config, extra=manifest.extra)


def _check_arguments(state: TrainState, keep: int) -> None:
    if keep < 1:
        raise ValueError(f"checkpoint.keep must be at least 1, but is {keep}: the checkpoint being written counts")
    if state.step < 0 or state.position < 0:
        raise ValueError(f"step and position must be at least 0, but are {state.step} and {state.position}")
    check_json(state.config, name="config")
    check_json(state.extra, name="extra")


def _gather(mesh: Mesh, record: SomeRecord) -> list[SomeRecord]:
    return [
        type(record).model_validate(value) for value in mesh.all_gather_object(record.model_dump(exclude_unset=True))
    ]


def _write_manifest(partial: Path, state: TrainState, reports: Sequence[Report], written: Sequence[Written]) -> None:
    pieces: dict[str, list[Piece]] = defaultdict(list)
    files: dict[str, FileEntry] = {}
    for one in written:
        files |= one.files
        for name, of_rank in one.pieces.items():
            pieces[name] += of_rank
    tensors = {
        name: TensorEntry(
            shape=ranges[0].shape,
            dtype=ranges[0].dtype,
            pieces=sorted(pieces[name], key=lambda piece: (piece.box or [], piece.start)),
        )
        for name, ranges in sorted(union(reports).items())
    }
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        step=state.step,
        position=state.position,
        config_sha256=config_digest(state.config),
        config=state.config,
        extra=state.extra,
        tensors=tensors,
        files=files,
    )
    data = manifest.encode()
    line = sum_line(data, MANIFEST)
    write_file(partial / MANIFEST, [data], size=len(data))
    write_file(partial / MANIFEST_SUM, [line], size=len(line))


def _check_whole(path: Path, *, share: int, shares: int) -> None:
    check_files(path, read_manifest(path).files, share=share, shares=shares)


def _problem(path: Path, *, share: int, shares: int) -> tuple[str | None, bool]:
    """What is wrong with it, and whether that is because it was taken away."""
    there = checkpoint_folder.identity(path)
    try:
        _check_whole(path, share=share, shares=shares)
    except RuntimeError as error:
        return str(error), checkpoint_folder.is_taken_away(path, there)
    return None, False


if __name__ == "__main__":
    from train.checkpoint_tool import main  # not at the top: it is built on this module

    sys.exit(main())
