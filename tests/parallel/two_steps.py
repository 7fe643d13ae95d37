"""Two training steps on rows that are the same at every layout, seen in logical terms: what the parity tests compare.

Used by test_same_as_one_process.py on the reference process and on the workers of a pool alike.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from data.loader import Batch
from model.config import ModelConfig
from model.loss import IGNORED
from model.memory import StreamMemory
from model.parameters import logical_parameters, materialize
from model.router import Router
from model.transformer import Transformer
from parallel.config import ProcessInfo
from parallel.volume import BankExchange, ExpertGroup, choose_exchange
from tests.parallel.pieces import Piece, assemble
from tests.parallel.placed import random_tables
from train.config import OptimConfig
from train.engine import LocalMesh, PlainEngine
from train.optimizer import build_optimizer, parameter_groups
from train.step import StepSettings, train_step

if TYPE_CHECKING:
    from parallel.mesh import Mesh
    from parallel.zero import ZeroEngine

VOCABULARY, LENGTH, STEP_ROWS, STEPS = 61, 12, 16, 2

# Odd sizes on purpose. 6 attention groups on 4 ranks leave 2 of padding, 5 MLP experts leave the last rank nothing else.
MODEL = ModelConfig.model_validate(
    {
        "d_model": 32,
        "num_layers": 2,
        "mixers": ["switchhead"],
        "feedforwards": ["sigma_moe"],
        "switchhead": {"num_heads": 2, "head_dim": 8, "num_experts": 3, "top_k": 2},
        "sigma_moe": {"num_experts": 5, "expert_dim": 12, "top_k": 2, "entropy_weight": 1.0},
    }
)

DENSE = ModelConfig.model_validate(
    {
        "d_model": 32,
        "num_layers": 2,
        "mixers": ["attention"],
        "feedforwards": ["dense_mlp"],
        "attention": {"num_heads": 4, "head_dim": 8},
        "dense_mlp": {"hidden_dim": 35},
    }
)


@dataclass(frozen=True)
class Case:
    """One way to train the two steps. The defaults are the main case of promise 1."""

    ep_size: int = 1
    stage: int = 0
    accumulation_steps: int = 1
    optimizer: str = "sgd"
    dtype: str = "float32"
    clip_grad_norm: float = 0.3  # below the norms that occur, so that clipping acts
    routing: str = "free"  # or "one_expert" or "ties", see set_routing
    exchange: Literal["auto", "tokens", "weights"] = "tokens"
    chunks: int = 1
    node_size: int | None = None
    table_columns: int | Literal["auto"] = 1
    placed: bool = False  # the groups of every bank whose rows travel sit at random places
    model: ModelConfig = field(default=MODEL)

    def with_model(self, **changes: Any) -> "Case":
        """Another model: a value replaces a value, a dict changes values of a section."""
        values = self.model.model_dump()
        for key, value in changes.items():
            values[key] = values[key] | value if isinstance(value, dict) and values[key] else value
        return replace(self, model=ModelConfig.model_validate(values))


@dataclass(frozen=True)
class Seen:
    """What one rank saw: per step (loss, auxiliary loss, gradient norm), the gradients and each router's copies per group of its
    own rows; the weights after the last step.
    """

    scalars: list[tuple[float, float, float]]
    gradients: list[list[Piece]]
    loads: list[dict[str, np.ndarray]]
    weights: list[Piece]


def set_routing(model: Transformer, routing: str) -> None:
    """Makes every router of a materialised model choose the same for all tokens: each head its last expert, or between equal scores.

    Channel 0 of what a router reads becomes 1, so that column 0 of its weights is a bias. Equal rows with zeros elsewhere then give
    scores that are equal to the last bit, in whatever order a matmul sums.
    """
    if routing == "free":
        return
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("mixer_norm.weight", "feedforward_norm.weight")):
                parameter[0] = 0
            if name.endswith(("mixer_norm.bias", "feedforward_norm.bias")):
                parameter[0] = 1
        for router in model.modules():
            if isinstance(router, Router):
                rows_HED = router.weight.view(router.num_heads, router.num_experts, -1)
                rows_HED *= 0.1 if routing == "one_expert" else 0.0
                rows_HED[..., 0] = 0.125
                if routing == "one_expert":
                    rows_HED[:, -1, 0] = 2.0


def rows(case: Case, *, rank: int, num_ranks: int) -> Iterator[Batch]:
    """Micro-steps of rows whose content depends on their position alone; numbers of targets differ from row to row."""
    micro_rows = STEP_ROWS // case.accumulation_steps
    for first in range(0, STEPS * STEP_ROWS, micro_rows):
        positions = [p for p in range(first, first + micro_rows) if p % num_ranks == rank]
        drawn = [torch.Generator().manual_seed(1000 + p) for p in positions]
        tokens = torch.stack([torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=g) for g in drawn])
        targets = tokens[:, 1:].clone()
        for row, position in enumerate(positions):
            targets[row, : position % LENGTH] = IGNORED
        boundaries = torch.tensor([[p % 5 + 3] for p in positions])
        yield Batch(
            tokens_BS=tokens[:, :-1],
            targets_BS=targets,
            document_ids_BS=(torch.arange(LENGTH) >= boundaries).long(),
            positions_B=torch.tensor(positions),
            continues_B=torch.tensor([p >= micro_rows for p in positions]),
            num_bytes=int((targets != IGNORED).sum()),
        )


def one_process(case: Case) -> Seen:
    """The reference: PlainEngine, local dispatcher, no process group."""
    torch.set_num_threads(1)
    model = Transformer(case.model, vocab_size=VOCABULARY, backend="reference")
    materialize(model, seed=7)
    set_routing(model, case.routing)
    config = optim_config(case)
    engine = PlainEngine(
        model,
        build_optimizer(parameter_groups(model, weight_decay=config.weight_decay), config),
        clip_grad_norm=case.clip_grad_norm,
        accumulation_steps=case.accumulation_steps,
        dtype=getattr(torch, case.dtype),
    )
    return _two_steps(case, engine, LocalMesh(torch.device("cpu")), gradient=lambda parameter: parameter.tensor.grad)


def many_processes(case: Case) -> Seen:
    """The same on this rank of a pool, under DeepSpeed."""
    with open_engine(case) as engine:
        return _two_steps(case, engine, engine.mesh, gradient=engine.gradient)


@contextlib.contextmanager
def open_world(ep_size: int, *, node_size: int | None = None) -> "Iterator[Mesh]":
    """The mesh of this rank of a pool; node_size: processes that are said to be on one machine."""
    from parallel.mesh import open_mesh

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    info = ProcessInfo(
        rank=rank,
        world_size=size,
        local_rank=rank,
        local_world_size=size,
        master_addr="",
        master_port=0,
        launcher="pool",
    )
    with open_mesh(info, ep_size=ep_size, device=torch.device("cpu"), node_size=node_size) as mesh:
        yield mesh


@contextlib.contextmanager
def open_engine(case: Case) -> "Iterator[ZeroEngine]":
    """This rank's engine, as train/build.py makes it."""
    from parallel.parallelize import parallelize
    from parallel.zero import ZeroEngine

    model = Transformer(case.model, vocab_size=VOCABULARY, backend="reference")
    with open_world(case.ep_size, node_size=case.node_size) as mesh:
        parallelize(model, mesh, seed=7, exchanges=exchanges_of(case, mesh.world_size), chunks=case.chunks)
        set_routing(model, case.routing)
        config = optim_config(case)
        engine = ZeroEngine(
            model,
            parameter_groups(model, weight_decay=config.weight_decay),
            lambda groups: build_optimizer(groups, config),
            mesh=mesh,
            stage=case.stage,
            clip_grad_norm=case.clip_grad_norm,
            accumulation_steps=case.accumulation_steps,
            dtype=getattr(torch, case.dtype),
        )
        if case.placed:
            engine.placement.place(random_tables(engine))
        yield engine
        engine.close()


def exchanges_of(case: Case, world_size: int) -> dict[str, BankExchange]:
    return {
        bank.path: choose_exchange(
            bank.shape,
            ExpertGroup(case.ep_size, case.node_size or world_size),
            tokens=STEP_ROWS // case.accumulation_steps // world_size * LENGTH,
            wire_bytes=4 if case.dtype == "float32" else 2,
            chunks=case.chunks,
            exchange=case.exchange,
            table_columns=case.table_columns,
        )
        for bank in case.model.banks()
    }


def optim_config(case: Case) -> OptimConfig:
    lr = 0.1 if case.optimizer == "sgd" else 1e-2
    return OptimConfig.model_validate(
        {"optimizer": case.optimizer, "lr": lr, "weight_decay": 0.1, "schedule": "constant"}
    )


def _two_steps(case: Case, engine: Any, world: Any, *, gradient: Any) -> Seen:
    memory = _memory(case, world)
    settings = StepSettings(case.accumulation_steps, seed=3, mask_documents=memory is None)
    batches = rows(case, rank=world.rank, num_ranks=world.world_size)
    gradients: list[list[Piece]] = []
    scalars, loads = [], []
    for step in range(STEPS):
        with _before_update(engine, lambda: gradients.append(_gradients(engine.model, gradient))):
            lr = optim_config(case).lr
            result = train_step(engine, batches, world, settings, step=step, lr=lr, memory=memory)
        scalars.append((result.loss, result.auxiliary_loss, result.grad_norm))
        loads.append({name: report.count_G.numpy() for name, report in result.reports.items()})
    weights = [
        Piece(p.name, p.shape, p.start, p.tensors["master"].detach().numpy().copy(), p.box) for p in engine.fragments()
    ]
    return Seen(scalars, gradients, loads, weights)


def _memory(case: Case, world: Any) -> StreamMemory | None:
    """As many streams as a micro-step has rows: each continues the one of the micro-step before."""
    if not case.model.memory_blocks():
        return None
    place = {"rank": world.rank, "num_ranks": world.world_size, "device": world.device}
    sizes = {"row_length": LENGTH, "d_model": case.model.d_model, "num_streams": STEP_ROWS // case.accumulation_steps}
    return StreamMemory(case.model.memory_blocks(), **sizes, **place)


class _before_update:
    """Calls `look` between the step's last backward and its update."""

    def __init__(self, engine: Any, look: Any) -> None:
        self.engine, self.look = engine, look

    def __enter__(self) -> None:
        update = self.engine.step
        self.engine.step = lambda lr, **accept: (self.look(), update(lr, **accept))[1]

    def __exit__(self, *_: object) -> None:
        del self.engine.step


def _gradients(model: Transformer, gradient: Any) -> list[Piece]:
    pieces = []
    for parameter in logical_parameters(model):
        value = gradient(parameter)
        assert value is not None, f"{parameter.name} has no gradient"
        flat = value.detach().float().flatten().numpy()
        for local, start, numel in parameter.ranges:
            values = flat[local : local + numel].copy()
            pieces.append(Piece(parameter.name, parameter.spec.shape, start, values, parameter.box))
    return pieces


def gradients_of(seen: list[Seen], *, step: int) -> dict[str, np.ndarray]:
    return assemble(piece for rank in seen for piece in rank.gradients[step])


def weights_of(seen: list[Seen]) -> dict[str, np.ndarray]:
    return assemble(piece for rank in seen for piece in rank.weights)
