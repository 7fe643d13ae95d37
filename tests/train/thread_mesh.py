"""Ranks as threads: the mesh that checkpoint tests use instead of torch.distributed, and checkpoints that such ranks write.

Owns: ThreadMesh and the uneven splits of a small set of logical tensors. Called by: the tests of checkpoints beside it.
"""

import hashlib
import json
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from model.fragments import Fragment
from train.checkpoint import TrainState, load, save

Result = TypeVar("Result")

KINDS = ("master", "exp_avg", "exp_avg_sq")
SHAPES = {
    "embedding.weight": (7, 3),
    "blocks.0.value_experts.weight": (5, 3, 2),
    "scale": (),
    "empty": (0, 4),
    "bias": (1,),
}
STATE = TrainState(step=100, position=1600, config={"run": {"seed": 1}}, extra={"processes": 2})
Values = dict[tuple[str, str], Tensor]  # (kind, name) -> the flat logical tensor


@dataclass
class World:
    """What the ranks share. `calls` has the names of the collectives that each rank made."""

    size: int
    slots: list[str] = field(default_factory=list)
    calls: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = [""] * self.size
        self.calls = [[] for _ in range(self.size)]
        self.barrier = threading.Barrier(self.size, timeout=20)


class ThreadMesh:
    """One rank of a World."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank, self.world_size = world, rank, world.size

    def all_gather_object(self, value: Any) -> list[Any]:
        self.world.calls[self.rank].append("all_gather_object")
        return self._gather(value)

    def raise_together(self, error: Exception | None) -> None:
        self.world.calls[self.rank].append("raise_together")
        messages = self._gather(None if error is None else str(error))
        for message in messages:
            if message is not None:
                raise RuntimeError(message) from error

    def _gather(self, value: Any) -> list[Any]:
        self.world.slots[self.rank] = json.dumps(value, allow_nan=False)
        self.world.barrier.wait()
        values = [json.loads(slot) for slot in self.world.slots]
        self.world.barrier.wait()
        return values


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What each rank returned, or the exception that it raised, and the collectives that it made."""

    results: list[Result]
    errors: list[BaseException | None]
    calls: list[list[str]]


def try_ranks(size: int, work: Callable[[ThreadMesh], Result]) -> Outcome[Result | None]:
    world = World(size)
    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(work, ThreadMesh(world, rank)) for rank in range(size)]
    errors = [future.exception() for future in futures]
    return Outcome([None if f.exception() else f.result() for f in futures], errors, world.calls)


def on_ranks(size: int, work: Callable[[ThreadMesh], Result]) -> list[Result]:
    """Calls `work` on every rank; what the first failing rank raised is raised."""
    world = World(size)
    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(work, ThreadMesh(world, rank)) for rank in range(size)]
    return [future.result() for future in futures]


def draw(seed: int) -> Values:
    """Random bit patterns as float32: infinities, NaNs with payload, denormals and -0.0 among them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (kind, name): torch.randint(-(2**31), 2**31, (math.prod(shape),), generator=generator)
        .to(torch.int32)
        .view(torch.float32)
        for kind in KINDS
        for name, shape in SHAPES.items()
    }


def cut(numel: int, size: int, *, seed: int) -> list[int]:
    """`size` + 1 increasing ends of ranges, uneven; some ranges are empty, and the last rank of three or more holds nothing."""
    generator = torch.Generator().manual_seed(seed)
    holders = size - 1 if size > 2 else size
    inner = sorted(torch.randint(0, numel + 1, (holders - 1,), generator=generator).tolist())
    return [0, *inner, *[numel] * (size - holders + 1)]


def split(values: Values, size: int, *, seed: int) -> list[list[Fragment]]:
    """The fragments of each rank: copies of `values`, so that a rank has storage of its own."""
    ranks: list[list[Fragment]] = [[] for _ in range(size)]
    for index, (name, shape) in enumerate(SHAPES.items()):
        for rank, (start, end) in enumerate(pairwise(cut(math.prod(shape), size, seed=seed + index))):
            if start < end or (rank == 0 and math.prod(shape) == 0):
                tensors = {kind: values[kind, name][start:end].clone() for kind in KINDS}
                ranks[rank].append(Fragment(name, shape, start, tensors))
    return ranks


def blank(values: Values) -> Values:
    return {key: torch.full_like(value, 12345.0) for key, value in values.items()}


def join(ranks: Sequence[Sequence[Fragment]]) -> Values:
    """The flat logical tensors that the fragments of all ranks make up."""
    values = {(kind, name): torch.zeros(math.prod(shape)) for kind in KINDS for name, shape in SHAPES.items()}
    for fragment in (fragment for fragments in ranks for fragment in fragments):
        for kind, view in fragment.tensors.items():
            values[kind, fragment.name][fragment.start : fragment.start + view.numel()] = view
    return values


def same(left: Values, right: Values) -> bool:
    """Equal bit for bit."""
    return left.keys() == right.keys() and all(
        torch.equal(value.view(torch.int32), right[key].view(torch.int32)) for key, value in left.items()
    )


def save_split(
    folder: Path, values: Values, size: int, *, seed: int = 0, state: TrainState = STATE, keep: int = 3
) -> Path:
    ranks = split(values, size, seed=seed)
    return on_ranks(size, lambda mesh: save(folder, state=state, fragments=ranks[mesh.rank], mesh=mesh, keep=keep))[0]


def load_split(path: Path, size: int, *, seed: int = 0) -> Values:
    ranks = split(blank(draw(0)), size, seed=seed)
    on_ranks(size, lambda mesh: load(path, fragments=ranks[mesh.rank], mesh=mesh))
    return join(ranks)


def write_manifest(path: Path, manifest: dict) -> None:
    data = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(data)
    (path / "manifest.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  manifest.json\n")
