"""What moving experts by measured load brings and costs: seconds of a step before and after, seconds and bytes of a move.

Four gloo processes, one expert group, a router that likes the experts of rank 0. The experts move to the better places and back,
again and again, with steps in between, so that both are timed on a machine in the same state. CPU seconds are the busiest rank's: what
the wall clock would say if each process had cores of its own, but for its waits. Before anything is timed the losses at both places are
compared. Called by: anyone, from the root of the clone, `python -m benchmarks.parallel.bench_placement`; prints Markdown.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.parallel.bench_exchange import MALLOC
from benchmarks.parallel.placing import open_ranks
from data.loader import Batch
from model.config import ModelConfig
from model.parameters import ExpertBank
from model.router import Router
from model.transformer import Transformer
from parallel.mesh import Mesh
from parallel.parallelize import parallelize
from parallel.volume import BankExchange
from parallel.zero import ZeroEngine
from train.config import OptimConfig
from train.optimizer import build_optimizer, parameter_groups
from train.step import StepSettings, train_step

PROCESSES, VOCABULARY, ROWS, LENGTH = 4, 256, 4, 256  # ROWS: of a rank
LIKED, STRENGTH = 16, 1.5  # experts whose router rows are longer: all those of rank 0
MODEL = ModelConfig.model_validate(
    {
        "d_model": 256,
        "num_layers": 2,
        "mixers": ["attention"],
        "feedforwards": ["sigma_moe"],
        "attention": {"num_heads": 4, "head_dim": 32},
        "sigma_moe": {"num_experts": 64, "expert_dim": 128, "top_k": 8, "entropy_weight": 0.0},
    }
)


@dataclass(frozen=True)
class Measured:
    """One rank's seconds. walls and cpus: of steps, at the first places and at the better ones. moves: of moves."""

    walls: tuple[list[float], list[float]]
    cpus: tuple[list[float], list[float]]
    moves: list[float]
    sent: int
    moved: int
    load: tuple[float, float]
    losses: tuple[float, float]


def batches(rank: int) -> Iterator[Batch]:
    """The same rows for ever."""
    text = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(rank))
    positions = torch.arange(ROWS) * PROCESSES + rank
    while True:
        yield Batch(
            text[:, :-1], text[:, 1:], torch.zeros_like(text[:, 1:]), positions, positions < 0, num_bytes=ROWS * LENGTH
        )


def engine_on(mesh: Mesh) -> ZeroEngine:
    """ZeRO 1 with AdamW: the moments move too."""
    model = Transformer(MODEL, vocab_size=VOCABULARY, backend="loop")
    banks = [path for path, module in model.named_modules() if isinstance(module, ExpertBank)]
    parallelize(model, mesh, seed=1, exchanges=dict.fromkeys(banks, BankExchange("tokens", 1, 0.0, 0.0)))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Router):
                module.weight[:LIKED] *= STRENGTH
    config = OptimConfig.model_validate({"optimizer": "adamw", "lr": 1e-4, "schedule": "constant"})
    groups, build = parameter_groups(model, weight_decay=0.0), lambda groups: build_optimizer(groups, config)
    settings = {"clip_grad_norm": 0.25, "accumulation_steps": 1, "dtype": torch.float32}
    return ZeroEngine(model, groups, build, mesh=mesh, stage=1, **settings)


def on_a_rank(rounds: int, steps: int) -> Measured:
    with open_ranks() as mesh:
        engine = engine_on(mesh)
        placement, stream, settings = engine.placement, batches(mesh.rank), StepSettings(1, seed=1, mask_documents=True)

        def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
            mesh.barrier()
            began, busy = time.perf_counter(), time.thread_time()
            found = work()
            return time.perf_counter() - began, time.thread_time() - busy, found

        def step() -> tuple[float, float, float]:  # at rate 0, so that every step computes the same
            wall, cpu, result = timed(lambda: train_step(engine, stream, mesh, settings, step=0, lr=0.0))
            return wall, cpu, result.loss

        first = {path: placement.table(path) for path in placement.banks}
        placement.count()
        loss = step()[2]
        placed = placement.move()
        better = {path: placement.table(path) for path in placement.banks}
        losses = (loss, step()[2])
        walls, cpus, moves, sent = ([], []), ([], []), [], 0
        for _ in range(rounds):
            for where, tables in enumerate((first, better)):
                mesh.ledger.take()
                moves.append(timed(lambda tables=tables: placement.place(tables))[0])
                sent = sum(one.near for of, one in mesh.ledger.take().sent.items() if of.verb == "move")
                step()
                for _ in range(steps):
                    wall, cpu, _ = step()
                    walls[where].append(wall)
                    cpus[where].append(cpu)
        load = (statistics.fmean(one.before for one in placed), statistics.fmean(one.after for one in placed))
        engine.close()
        return Measured(walls, cpus, moves, sent, sum(one.num_moved for one in placed), load, losses)


def report(ranks: list[Measured]) -> Iterator[str]:
    """Of each step and move the slowest rank; medians, and the median of the ratios of neighbours."""
    before, after = ranks[0].losses
    if abs(before - after) > 1e-5 * abs(before):
        raise RuntimeError(
            f"the loss must not depend on where experts are, but it is {before} and {after}: run tests/parallel first"
        )
    yield "| | first places | better places | ratio |"
    yield "|---|---|---|---|"
    load = ranks[0].load
    yield f"| busiest rank's copies over the mean | {load[0]:.2f} | {load[1]:.2f} | {load[1] / load[0]:.2f} |"
    for name, kind in (("a step, wall s", "walls"), ("a step, CPU s of the busiest rank", "cpus")):
        first, better = (
            [max(of_step) for of_step in zip(*one, strict=True)]
            for one in zip(*(getattr(rank, kind) for rank in ranks), strict=True)
        )
        ratio = statistics.median(b / a for a, b in zip(first, better, strict=True))
        yield f"| {name} | {statistics.median(first):.3f} | {statistics.median(better):.3f} | {ratio:.2f} |"
    moves = statistics.median(max(of_move) for of_move in zip(*(rank.moves for rank in ranks), strict=True))
    steps = statistics.median(max(of_step) for of_step in zip(*(rank.walls[0] for rank in ranks), strict=True))
    moved, sent = ranks[0].moved, sum(rank.sent for rank in ranks) / 1e6
    yield ""
    yield (
        f"A move: {moved} of {64 * MODEL.num_layers} experts, {sent:.1f} MB over all ranks, {moves:.3f} s ({moves / steps:.2f} steps), the "
        "gathering of the weights in it."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="What moving experts by measured load brings and costs.")
    parser.add_argument("--rounds", type=int, default=5, help="times to the better places and back")
    parser.add_argument("--steps", type=int, default=3, help="timed at each place in a round")
    args = parser.parse_args()
    os.environ.update(MALLOC)
    from benchmarks.parallel import bench_placement  # the workers find it by this name, not as __main__
    from tests.pool import Pool  # it reads the environment when it is imported

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(PROCESSES, folder=Path(folder))
        try:
            ranks = pool.run(bench_placement.on_a_rank, args.rounds, args.steps, timeout=1200)
        finally:
            pool.stop()
    for line in report(ranks):
        print(line)
    print(f"\nLoad of the machine before and after: {load:.1f} and {os.getloadavg()[0]:.1f} processes.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
