"""How the benchmarks put a layer on all processes of a pool, and what they note of it: the bytes sent, the routings chosen.

One expert group of all processes, on one node. Owns neither the layers (subjects.py) nor what is measured.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.parallel.subjects import Subject
from benchmarks.parallel.timing import Step
from model.context import BatchContext
from model.dispatch import Routing
from model.parameters import ExpertBank, materialize
from parallel.config import ProcessInfo
from parallel.expert import AllToAllDispatcher
from parallel.mesh import Mesh, open_mesh

SEED = 1  # of the weights


@dataclass(frozen=True)
class Way:
    """How a bank's rows meet their experts: what travels, in how many parts, and whether anything runs meanwhile."""

    exchange: Literal["tokens", "weights"] = "tokens"
    chunks: int = 1
    overlap: bool = True

    @property
    def name(self) -> str:
        return f"{self.exchange}_chunks{self.chunks}_{'overlap' if self.overlap else 'blocking'}"


@contextlib.contextmanager
def open_ranks() -> Iterator[Mesh]:
    """The mesh of this rank of a pool, its expert group all processes."""
    rank, size = dist.get_rank(), dist.get_world_size()
    info = ProcessInfo(
        rank=rank,
        world_size=size,
        local_rank=rank,
        local_world_size=size,
        master_addr="",
        master_port=0,
        launcher="pool",
    )
    with open_mesh(info, ep_size=size, device=torch.device("cpu")) as mesh:
        yield mesh


def on_ranks(subject: Subject, mesh: Mesh, way: Way) -> nn.Module:
    """The layer with its share of the banks here; weights depend on SEED alone. All banks go one way, whatever `auto` would choose."""
    layer = subject.build()
    banks = [module for module in layer.modules() if isinstance(module, ExpertBank)]
    for bank in banks:
        bank.shard(rank=mesh.ep_rank, size=mesh.ep_size)
    gathered = banks if way.exchange == "weights" else []
    for path, module in layer.named_modules():
        if hasattr(module, "dispatcher"):
            module.dispatcher = AllToAllDispatcher(  # pyright: ignore[reportArgumentType]
                mesh.experts, layer=path, gathered=gathered, chunks=way.chunks, overlap=way.overlap
            )
    materialize(layer, seed=SEED)
    return layer


def alone(subject: Subject) -> nn.Module:
    """The same layer whole, without other ranks."""
    layer = subject.build()
    materialize(layer, seed=SEED)
    return layer


def step_of(layer: nn.Module, subject: Subject, *, rank: int) -> Step:
    """Forward and backward of one rank's rows, which are the same for every layer."""
    drawn = torch.Generator().manual_seed(rank)
    x, cotangent = (torch.randn(subject.sequences, subject.length, subject.d_model, generator=drawn) for _ in range(2))
    here = BatchContext(torch.arange(subject.sequences), None, 1, 0)
    return Step(layer, lambda x: layer(x, here).y_BSD, x.requires_grad_(), cotangent)


@dataclass
class Recorder:
    """A layer's dispatcher, which notes every routing that it is asked to plan."""

    dispatcher: Any
    routings: list[Routing] = field(default_factory=list)

    def plan(self, *routings: Routing) -> Any:
        self.routings += routings
        return self.dispatcher.plan(*routings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dispatcher, name)
