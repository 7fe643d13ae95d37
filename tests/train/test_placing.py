"""A run whose experts move between its steps: the same course, a lower busiest load, tables that come back from a checkpoint."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.parallel.placed import random_tables
from tests.parallel.test_placement import padding_is_zero
from tests.train.tiny_job import ALONE, tiny_config, write_shards
from train.build import build_memory, build_model, open_data, open_world, set_up_torch
from train.checkpoint import read_state, read_tensors
from train.config import Config, check_world
from train.crash import CrashFile
from train.job import Job
from train.metrics import Reporter
from train.resume import restore
from train.run import open_saver_of, run, train
from train.run_folder import RunFolder

MLP = "layers.0.feedforward.experts"


def config_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """Four processes whose experts move after steps 4 and 8. Two attention heads leave padding, 13 MLP experts too."""
    fields: dict[str, dict[str, Any]] = {
        "run": {
            "dir": str(folder / changes.pop("name", "run")),
            "steps": changes.pop("steps", 10),
            "log_every_steps": 1,
        },
        "data": {"global_batch_size": 8, "streams": 8},
        "model": {
            "sigma_moe": {"num_experts": 13, "expert_dim": 4, "top_k": 2, "entropy_weight": 0.0, "expert_dropout": 0.1},
            "expert_backend": "reference",
        },
        "parallel": {"ep_size": 4, "zero_stage": 1, "exchange": "tokens", "placement_every_steps": 4},
        "optim": {"lr": 3e-3, "schedule": "constant"},
        "checkpoint": {"every_steps": 3, "keep": 9},
        "eval": {"max_tokens": 8},
    }
    for name, value in changes.items():
        fields[name] |= value
    return tiny_config(folder, **fields).model_dump(mode="json")


def info_here() -> Any:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return ALONE.model_copy(update={"rank": rank, "world_size": size, "local_rank": rank, "local_world_size": size})


def run_here(values: dict[str, Any]) -> None:
    """A whole run on this rank of a pool."""
    run(Config.model_validate(values), info_here())


def run_on(pool: Any, processes: int, values: dict[str, Any]) -> None:
    pool(processes).run(run_here, values, timeout=100)  # the first of a session imports DeepSpeed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", seed=1, kinds=5)  # so the few experts that like them have most of the load
    (tmp_path / "run").mkdir()
    return tmp_path


def losses(folder: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def at(folder: Path, name: str, step: int) -> Path:
    return folder / name / "checkpoints" / f"step_{step:06d}"


def saved(folder: Path, name: str, step: int) -> dict[str, Any]:
    return read_state(at(folder, name, step)).extra.get("placement", {})


def tensors(path: Path) -> dict[str, Tensor]:
    found = {kind: read_tensors(path, kind=kind) for kind in ("master", "exp_avg", "exp_avg_sq")}
    return {f"{kind}/{name}": value for kind, of_kind in found.items() for name, value in of_kind.items()}


@pytest.mark.parametrize(("ep_size", "stage"), [(4, 1), (2, 0), (2, 2)])
def test_a_run_whose_experts_move_follows_the_one_where_they_stay(pool, folder: Path, ep_size: int, stage: int):
    layout = {"ep_size": ep_size, "zero_stage": stage}
    for name, every in (("moves", 4), ("stays", None)):
        parallel = layout | {"placement_every_steps": every}
        run_on(pool, 4, config_of(folder, name=name, parallel=parallel))
    found, expected = losses(folder, "moves"), losses(folder, "stays")
    assert list(found) == list(expected) == list(range(1, 11))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)
    lines = [json.loads(line) for line in (folder / "moves" / "metrics.jsonl").read_text().splitlines()]
    told = {line["step"]: line["placement"] for line in lines if "placement" in line}
    assert list(told) == [4, 8]
    first, second = (told[step]["banks"][MLP] for step in (4, 8))
    assert first["moved"] > 0
    assert first["after"] < 0.95 * first["before"]
    assert second["before"] < 0.95 * first["before"], "what was counted after the move is more even"
    assert saved(folder, "moves", 3).keys() == {"places", "loads"}
    assert not saved(folder, "stays", 10)


def test_a_resume_before_and_after_a_move_repeats_the_run_bit_for_bit(pool, folder: Path):
    """Stopped after steps 6 and 8, with a move after step 7; what was counted since the last move is in the checkpoint."""
    late: dict[str, Any] = {"ep_size": 4, "zero_stage": 1, "placement_every_steps": 7}
    run_on(pool, 4, config_of(folder, name="whole", parallel=late, checkpoint={"every_steps": 100}))
    for steps in (6, 8, 10):
        run_on(pool, 4, config_of(folder, name="stopped", parallel=late, steps=steps))
    assert losses(folder, "stopped") == losses(folder, "whole")
    assert saved(folder, "stopped", 6)["places"] == {}
    assert saved(folder, "stopped", 8)["places"].keys() >= {MLP}
    assert saved(folder, "stopped", 10) == saved(folder, "whole", 10)
    still: dict[str, Any] = {"ep_size": 4, "zero_stage": 1, "placement_every_steps": None}
    run_on(pool, 4, config_of(folder, name="stopped", parallel=still, steps=11))
    assert saved(folder, "stopped", 11) == {"places": saved(folder, "whole", 10)["places"], "loads": {}}, (
        "they stay moved"
    )
    assert sum(saved(folder, "whole", 10)["loads"][MLP]) == 3 * 8 * 8 * 2, "copies of three steps of eight rows"
    found, expected = (tensors(at(folder, name, 10)) for name in ("stopped", "whole"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_at_another_layout_experts_begin_at_their_first_places_and_the_course_goes_on(pool, folder: Path, capfd):
    run_on(pool, 4, config_of(folder, name="stays", parallel={"placement_every_steps": None}))
    run_on(pool, 4, config_of(folder, steps=5))
    before = saved(folder, "run", 5)["places"]
    assert before[MLP] != list(range(13))
    run_on(pool, 2, config_of(folder, steps=7, parallel={"ep_size": 2, "zero_stage": 2, "placement_every_steps": None}))
    assert not saved(folder, "run", 7)
    run_on(pool, 1, config_of(folder, steps=9, parallel={"ep_size": 1, "zero_stage": 0}))
    run_on(pool, 4, config_of(folder, steps=10))
    np.testing.assert_allclose(list(losses(folder, "run").values()), list(losses(folder, "stays").values()), rtol=1e-4)


def job_here(values: dict[str, Any], stack: ExitStack, said: list[str]) -> Job:
    config, info = Config.model_validate(values), info_here()
    layout, data, device = check_world(config, info), open_data(config), set_up_torch(config, info)
    crash = CrashFile(RunFolder(Path(config.run.dir)), info)
    world, build_engine = stack.enter_context(open_world(config, info, layout, device=device, crash=crash))
    engine = build_engine(build_model(config, vocab_size=data.train.vocab_size))
    reporter = Reporter(is_main=False, total_steps=config.run.steps)
    reporter.say = lambda text: said.append(text)
    saver = stack.enter_context(open_saver_of(config, world, reporter))
    return Job(config, layout, data, world, engine, build_memory(config, world), reporter, saver, crash)


def gone_back(values: dict[str, Any]) -> tuple[bool, dict[str, Any], list[str]]:
    """Trains to the end, moves experts anywhere, goes back: whether all is as it was, and the tables."""
    said: list[str] = []
    with ExitStack() as stack:
        job = job_here(values, stack, said)
        engine: Any = job.engine
        train(job, restore(job), job.train_batches(0))
        tables = engine.placement.tables()
        before = [
            (part.name, part.start, {k: v.clone() for k, v in part.tensors.items()}) for part in engine.fragments()
        ]
        engine.placement.place(random_tables(engine))
        assert engine.placement.tables() != tables
        restore(job)  # a rollback takes the same way
        after = [(part.name, part.start, part.tensors) for part in engine.fragments()]
        same = [one[:2] for one in before] == [one[:2] for one in after] and all(
            torch.equal(old[kind], new[kind])
            for (*_, old), (*_, new) in zip(before, after, strict=True)
            for kind in old
        )
        return same and padding_is_zero(engine) and engine.placement.tables() == tables, tables, said


def test_going_back_puts_the_experts_where_the_checkpoint_had_them(pool, folder: Path):
    for same, tables, said in pool(4).run(gone_back, config_of(folder, steps=6)):
        assert same
        assert tables[MLP] != list(range(13))
        assert any("experts of layers.0.feedforward.experts moved; the busiest rank has" in line for line in said)


def notes_of(values: dict[str, Any]) -> list[str]:
    """What restoring and a step say of placement."""
    said: list[str] = []
    with ExitStack() as stack:
        job = job_here(values, stack, said)
        train(job, restore(job), job.train_batches(0))
    return [line for line in said if "expert" in line and ("no expert moves" in line or "first places" in line)]


@pytest.mark.parametrize(
    ("processes", "parallel"), [(1, {"ep_size": 1}), (2, {"ep_size": 1}), (2, {"ep_size": 2, "exchange": "weights"})]
)
def test_a_run_without_a_bank_that_can_move_says_so_and_goes_on(pool, folder: Path, processes: int, parallel: dict):
    for said in pool(processes).run(notes_of, config_of(folder, steps=2, parallel={"zero_stage": 0} | parallel)):
        assert len(said) == 1
        assert said[0].startswith("no expert moves: parallel.placement_every_steps is 4, but ep_size is")


def test_another_ep_size_is_told(pool, folder: Path):
    run_on(pool, 4, config_of(folder, steps=5))
    for said in pool(2).run(notes_of, config_of(folder, steps=6, parallel={"ep_size": 2})):
        assert len(said) == 1
        assert "at their first places again: they had moved at ep_size 4" in said[0]
