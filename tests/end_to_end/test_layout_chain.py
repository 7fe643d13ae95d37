"""Elastic resume: a run that changes its layout again and again carries every tensor on, bit for bit, and every change is allowed.

Each change is made by what a run itself calls (restore, save and train of a Job) on the warm pools: it is restored at the next layout,
saved again without a step, and what is then on disk is compared with what the layout before had written. Then it takes real steps.
"""

import json
import random
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pool import Pool
from tests.train.tiny_job import ALONE, tiny_config, write_shards
from train.build import build_memory, build_model, open_data, open_world, set_up_torch
from train.checkpoint import latest, read_tensors
from train.config import Config, check_world
from train.crash import CrashFile
from train.job import Job
from train.manifest import read_manifest
from train.metrics import Reporter
from train.preemption import Preemption
from train.resume import restore, save
from train.run import open_saver_of, train
from train.run_folder import RunFolder

Pools = Callable[[int], Pool]


@dataclass(frozen=True)
class Place:
    """A layout. A run refuses another run.dtype, because it changes the arithmetic; a checkpoint is the same in both."""

    processes: int
    ep_size: int
    zero_stage: int
    exchange: str
    dtype: str


PLACES = [
    Place(processes, ep_size, stage, exchange, dtype)
    for processes, ep_size in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
    for stage in (0, 1, 2)
    for exchange in (("tokens", "weights") if ep_size > 1 else ("tokens",))
    for dtype in ("float32", "bfloat16")
]

# Banks that no ep_size above 1 divides, a table that is split by columns, and every kind of state: a balancing bias, batch-norm
# statistics, the memory of streams.
MODEL = {
    "num_layers": 2,
    "feedforwards": ["sigma_moe", "pkm"],
    "switchhead": {"num_heads": 2, "head_dim": 4, "num_experts": 3, "top_k": 2, "positions": "xl", "memory_blocks": 1},
    "sigma_moe": {"num_experts": 5, "expert_dim": 4, "top_k": 2, "balance": "bias"},
    "pkm": {"num_keys": 3, "num_heads": 2, "top_k": 2, "query_norm": "batch"},
    "dropout": 0.1,
}


def config_at(run: Path, place: Place, *, steps: int) -> Config:
    columns = place.ep_size if place.exchange == "tokens" else "auto"  # a table that travels as weights has none
    parallel: dict[str, Any] = {"ep_size": place.ep_size, "zero_stage": place.zero_stage}
    parallel |= {"exchange": place.exchange, "table_columns": columns}
    fields: dict[str, dict[str, Any]] = {
        "run": {"dir": str(run), "steps": steps, "log_every_steps": 1},
        "data": {"global_batch_size": 8, "streams": 8},
        "model": MODEL,
        "parallel": parallel,
        "optim": {"lr": 3e-3, "schedule": "constant"},
        "eval": {"max_tokens": 8},
    }
    return tiny_config(run.parent, **fields)


def visit(values: dict[str, Any], dtype: str) -> None:
    """On this rank of a pool: restores, saves again what was restored, trains to run.steps and saves. `dtype`: of the engine."""
    config = Config.model_validate(values)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    place = {"rank": rank, "world_size": size, "local_rank": rank, "local_world_size": size}
    info = ALONE.model_copy(update=place)
    layout, data, device = check_world(config, info), open_data(config), set_up_torch(config, info)
    engines = config.model_copy(update={"run": config.run.model_copy(update={"dtype": dtype})})
    crash = CrashFile(RunFolder(Path(config.run.dir)), info)
    with (
        open_world(engines, info, layout, device=device, crash=crash) as (world, build_engine),
        ExitStack() as kept_open,
    ):
        engine = build_engine(build_model(config, vocab_size=data.train.vocab_size))
        reporter = Reporter(is_main=False, total_steps=config.run.steps)
        saver = kept_open.enter_context(open_saver_of(config, world, reporter))
        job = Job(
            config, layout, data, world, engine, build_memory(config, world), reporter, saver, crash, Preemption()
        )
        if latest(job.folder.checkpoints, mesh=world) is not None:
            for fragment in engine.fragments():
                for held in fragment.tensors.values():
                    held.fill_(torch.nan)  # what is not read must show
        start = restore(job)
        if start.step:
            save(job, start)
        if start.step < config.run.steps:
            train(job, start, job.train_batches(start.position))


@dataclass
class Chain:
    """The run `name` in a folder with shards, moved from place to place."""

    folder: Path
    pool: Pools
    name: str = "run"
    steps: int = 0

    def __post_init__(self) -> None:
        if not (self.folder / "shards").exists():
            write_shards(self.folder / "shards", seed=1)
        self.run.mkdir()

    @property
    def run(self) -> Path:
        return self.folder / self.name

    def visit(self, place: Place, *, steps: int) -> None:
        """Goes on at `place` for so many steps; fails if a tensor is not what it was before the change."""
        before, at = (self.tensors(self.steps), self.steps) if self.steps else ({}, 0)
        self.steps += steps
        values = config_at(self.run, place, steps=self.steps).model_dump(mode="json")
        self.pool(place.processes).run(visit, values, place.dtype)
        if before:
            assert_equal_bits(self.tensors(at), before)
        assert latest(self.checkpoints) == self.path(self.steps)

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def path(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    def tensors(self, step: int) -> dict[str, Tensor]:
        """Every tensor of the checkpoint by kind and name, and its place in the run."""
        manifest = read_manifest(self.path(step))
        found = {"step and position": torch.tensor([manifest.step, manifest.position])}
        for kind in {name.split("/")[0] for name in manifest.tensors}:
            found |= {f"{kind}/{name}": value for name, value in read_tensors(self.path(step), kind=kind).items()}
        return found

    def losses(self) -> dict[int, float]:
        lines = (self.run / "metrics.jsonl").read_text().splitlines()
        return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def assert_equal_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), f"{name} has changed"


def test_three_changes_of_layout_carry_every_tensor_on(tmp_path: Path, pool: Pools):
    chain = Chain(tmp_path, pool)
    places = [
        Place(1, 1, 0, "tokens", "float32"),
        Place(4, 4, 2, "tokens", "bfloat16"),
        Place(2, 2, 1, "weights", "float32"),
        Place(4, 2, 0, "weights", "float32"),
    ]
    for place in places:
        chain.visit(place, steps=2)
        entries = read_manifest(chain.path(chain.steps)).tensors.values()
        columns = any(piece.box is not None for entry in entries for piece in entry.pieces)
        assert columns == (place.ep_size > 1 and place.exchange == "tokens"), "the table is split by columns"
    kinds = {name.split("/")[0] for name in chain.tensors(chain.steps)}
    assert kinds == {"master", "exp_avg", "exp_avg_sq", "state", "step and position"}
    states = {name.rpartition(".")[2] for name in chain.tensors(chain.steps) if name.startswith("state/")}
    assert states == {"bias", "mean", "variance", "states", "place"}
    assert sorted(chain.losses()) == list(range(1, 9))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sixty_changes_of_layout_carry_every_tensor_on(tmp_path: Path, pool: Pools, draw: random.Random):
    """Every place once, in random order, then some of them again."""
    places = draw.sample(PLACES, len(PLACES))
    while len(places) < 61:
        places.append(draw.choice([place for place in PLACES if place != places[-1]]))
    chain = Chain(tmp_path, pool)
    for number, place in enumerate(places):
        print(f"change {number}: {place}")
        chain.visit(place, steps=draw.choice([1, 1, 2]))
    print(f"{len(places) - 1} changes, {chain.steps} steps, {len(chain.tensors(chain.steps))} tensors each")


def test_after_a_change_the_losses_follow_the_unchanged_layout_for_20_steps(tmp_path: Path, pool: Pools):
    stays, moves = Chain(tmp_path, pool, "stays"), Chain(tmp_path, pool, "moves")
    first, second = Place(2, 2, 1, "tokens", "float32"), Place(4, 2, 2, "weights", "float32")
    stays.visit(first, steps=3)
    shutil.copytree(stays.run, moves.run, dirs_exist_ok=True)
    moves.steps = stays.steps
    stays.visit(first, steps=20)
    moves.visit(second, steps=20)
    assert len(stays.losses()) == 23
    assert moves.losses() == pytest.approx(stays.losses(), rel=1e-4)
    assert moves.losses() != stays.losses(), "the two layouts sum in different orders"
