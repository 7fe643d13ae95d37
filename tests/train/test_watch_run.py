"""Whole runs that meet a bad step: skipped, gone back over, or stopped at; compared bit for bit with runs that never met it.

A row of data position p is met in step p // 4 (0 is the first), with two processes by rank p mod 2 alone.
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.train.poison import NAN, Change, assert_same_tensors, run_with
from tests.train.tiny_job import records, tiny_config, write_shards
from train import checkpoint
from train.config import Config

pytestmark = pytest.mark.usefixtures("torch_as_it_was")

# States and memory besides weights: the bias of a router, the statistics of a batch norm, streams that a row continues.
MODEL: dict[str, Any] = {
    "d_model": 8,
    "num_layers": 2,
    "mixers": ["switchhead"],
    "feedforwards": ["sigma_moe", "pkm"],
    "switchhead": {"num_heads": 2, "head_dim": 4, "num_experts": 3, "top_k": 2, "positions": "xl", "memory_blocks": 1},
    "sigma_moe": {"num_experts": 5, "expert_dim": 4, "top_k": 2, "balance": "bias", "entropy_weight": 0.0},
    "pkm": {"num_heads": 2, "num_keys": 3, "top_k": 2, "query_norm": "batch"},
    "dropout": 0.3,
}
STAGES = [pytest.param(1, 0, id="PlainEngine"), *(pytest.param(2, stage, id=f"ZeRO {stage}") for stage in (0, 1, 2))]
SKIP, BACK = {"on_nonfinite": "skip"}, {"on_nonfinite": "rollback"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", seed=1)
    return tmp_path


def config_of(
    folder: Path, name: str, *, steps: int, stage: int = 0, dtype: str = "float32", **sections: dict[str, Any]
) -> Config:
    run = {"dir": str(folder / name / "run"), "steps": steps, "log_every_steps": 1, "dtype": dtype}
    return tiny_config(
        folder,
        run=run,
        parallel={"zero_stage": stage, "ep_size": 1 if stage == 2 else "auto"},
        optim={"schedule": "constant", "accumulation_steps": 2, "weight_decay": 0.1},
        checkpoint={"every_steps": 2, "keep": 20},
        **({"model": MODEL} | sections),
    )


def run_on(pool: Any, processes: int, config: Config, change: Change) -> str:
    """The sentence with which all ranks ended."""
    if processes == 1:
        return run_with(config, change)
    sentences = pool(processes).run(run_with, config, change, processes, timeout=100)
    assert len(set(sentences)) == 1, sentences
    return sentences[0]


def events(folder: Path, name: str, file: str = "events.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "run" / file).read_text().splitlines()]


@pytest.mark.parametrize(("processes", "stage"), STAGES)
def test_a_skipped_step_leaves_everything_as_if_its_rows_had_not_been_learned(
    folder: Path, pool, processes: int, stage: int
):
    bad = config_of(folder, "bad", steps=4, stage=stage, watch=SKIP)
    assert run_on(pool, processes, bad, Change(poison={4 * 2 + 3: NAN})) == ""
    clean = config_of(folder, "clean", steps=4, stage=stage)
    assert run_on(pool, processes, clean, Change(without=(2,))) == ""
    assert_same_tensors(folder / "bad" / "run", folder / "clean" / "run", step=4)
    found, expected = records(folder / "bad"), records(folder / "clean")
    assert [record["skipped_steps"] for record in found] == [0, 0, 1, 1]
    assert found[2]["loss"] is None
    assert found[3]["loss"] == expected[3]["loss"]
    assert found[3]["position"] == 16


@pytest.mark.parametrize(("processes", "dtype"), [(1, "float32"), (2, "float32"), (2, "bfloat16")])
def test_a_step_is_skipped_too_if_what_one_rank_computes_is_nan_from_the_first_layer_on(
    folder: Path, pool, processes: int, dtype: str
):
    """The router, the exchange and the other rank's experts then meet it."""
    stage = processes - 1
    bad = config_of(folder, "bad", steps=4, stage=stage, dtype=dtype, watch=SKIP)
    assert run_on(pool, processes, bad, Change(inside=4 * 2 + 3)) == ""
    clean = config_of(folder, "clean", steps=4, stage=stage, dtype=dtype)
    assert run_on(pool, processes, clean, Change(without=(2,))) == ""
    assert_same_tensors(folder / "bad" / "run", folder / "clean" / "run", step=4)


def test_a_resume_after_a_skipped_step_goes_on_bit_for_bit(folder: Path):
    """AdamW has seen one update less than there were steps."""
    poison = Change(poison={4 * 1: NAN})
    assert run_with(config_of(folder, "whole", steps=5, watch=SKIP), poison) == ""
    for steps in (2, 5):
        assert run_with(config_of(folder, "parts", steps=steps, watch=SKIP), poison) == ""
    assert_same_tensors(folder / "parts" / "run", folder / "whole" / "run", step=5)
    assert [r["skipped_steps"] for r in records(folder / "parts")] == [0, 1, 1, 1, 1]


@pytest.mark.parametrize(("processes", "stage"), STAGES)
def test_going_back_is_starting_from_the_checkpoint_at_the_later_position(
    folder: Path, pool, processes: int, stage: int, capsys
):
    bad = config_of(folder, "bad", steps=6, stage=stage, watch=BACK)
    assert run_on(pool, processes, bad, Change(poison={4 * 3 + 1: NAN})) == ""

    assert run_on(pool, processes, config_of(folder, "clean", steps=2, stage=stage), Change()) == ""
    assert run_on(pool, processes, config_of(folder, "clean", steps=6, stage=stage), Change(start=4 * 4)) == ""
    assert_same_tensors(folder / "bad" / "run", folder / "clean" / "run", step=6)

    found, expected = records(folder / "bad"), records(folder / "clean")
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5, 6]
    assert [record["loss"] for record in found] == [record["loss"] for record in expected]
    assert [record["position"] for record in found] == [4, 8, 20, 24, 28, 32]
    assert [record["rollbacks"] for record in found] == [0, 0, 1, 1, 1, 1]
    (event,) = events(folder, "bad")
    assert (event["action"], event["step"], event["positions"]) == ("rollback", 4, [12, 16])


def test_a_resume_after_a_rollback_goes_on_at_the_position_of_the_checkpoint(folder: Path):
    poison = Change(poison={4 * 3: NAN})
    assert run_with(config_of(folder, "whole", steps=6, watch=BACK), poison) == ""
    for steps in (4, 6):  # the rollback, to step 2, is before the first of the two ends
        assert run_with(config_of(folder, "parts", steps=steps, watch=BACK), poison) == ""
    assert_same_tensors(folder / "parts" / "run", folder / "whole" / "run", step=6)
    state = checkpoint.read_state(folder / "parts" / "run" / "checkpoints" / "step_000004")
    assert (state.step, state.position, state.extra["watch"]["rollbacks"]) == (4, 24, 1)


def test_rows_are_stepped_over_from_the_checkpoint_on_each_time_that_the_run_goes_back(folder: Path):
    """The second bad row is met two steps after the checkpoint, beyond the rows of the first."""
    config = config_of(folder, "bad", steps=5, watch=BACK)
    assert run_with(config, Change(poison={4 * 2: NAN, 4 * 4: NAN})) == ""
    assert [event["positions"] for event in events(folder, "bad")] == [[8, 12], [16, 20]]
    assert [record["position"] for record in records(folder / "bad")] == [4, 8, 24, 28, 32]


def test_going_back_waits_for_the_checkpoint_that_is_being_written(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Step 3 is bad while that of step 2 is on its way: it is the newest, and the only one."""
    save = checkpoint.save

    def slowly(*args: Any, **kwargs: Any) -> None:
        time.sleep(1.0)
        save(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", slowly)
    config = config_of(folder, "slow", steps=4, watch=BACK)
    assert run_with(config, Change(poison={4 * 2: NAN})) == ""
    assert [record["position"] for record in records(folder / "slow")] == [4, 8, 16, 20]


def test_going_back_passes_over_a_save_that_failed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    save = checkpoint.save

    def once(*args: Any, state: checkpoint.TrainState, **kwargs: Any) -> None:
        if (state.step, state.position) == (4, 16):
            raise RuntimeError("the disk is full")
        save(*args, state=state, **kwargs)

    monkeypatch.setattr(checkpoint, "save", once)
    config = config_of(folder, "full", steps=6, watch=BACK)
    assert run_with(config, Change(poison={4 * 4: NAN})) == ""
    assert [record["position"] for record in records(folder / "full")] == [4, 8, 24, 28, 32, 36]


def test_the_event_names_the_documents_of_all_ranks(folder: Path, pool):
    assert run_on(pool, 2, config_of(folder, "two", steps=2, stage=1, watch=SKIP), Change(poison={4: NAN})) == ""
    assert run_on(pool, 1, config_of(folder, "one", steps=2, watch=SKIP), Change(poison={4: NAN})) == ""
    (two,), (one,) = events(folder, "two"), events(folder, "one")
    assert two["document_ids"] == one["document_ids"]
    assert len(one["document_ids"]) >= 4
    assert one["more_documents"] is False
    assert (one["grad_norm"], one["loss"], one["positions"]) == ("nan", "nan", [4, 8])


def test_a_run_cannot_go_back_before_its_first_checkpoint_nor_too_often(folder: Path):
    early = run_with(config_of(folder, "early", steps=4, watch=BACK), Change(poison={4: NAN}))
    assert "to go back the run needs a checkpoint, but step 2 is bad and there is none in" in early
    (event,) = events(folder, "early")
    assert event["action"] == "stop"
    assert event["reason"].endswith(early), "told as what it is"
    assert "must be finite, but at step 2" in event["reason"]
    often = config_of(folder, "often", steps=8, watch=BACK | {"max_rollbacks": 1})
    sentence = run_with(often, Change(poison={8: NAN, 12: NAN}))
    assert "must be finite, but at step 3" in sentence
    assert "after 1 of at most 1 rollbacks (watch.max_rollbacks)" in sentence
    assert [event["action"] for event in events(folder, "often")] == ["rollback", "stop"]


@pytest.mark.parametrize("on_spike", ["skip", "rollback", "log"])
def test_a_spike_is_treated_as_asked(folder: Path, on_spike: str, capsys):
    watch = {"spike_factor": 3.0, "window": 3, "on_spike": on_spike}
    assert run_with(config_of(folder, "spike", steps=6, watch=watch), Change(poison={4 * 4: 1000.0})) == ""
    (event,) = events(folder, "spike")
    assert (event["event"], event["action"], event["step"]) == ("spike", on_spike, 5)
    last = records(folder / "spike")[-1]
    counts = {"skip": (1, 0), "rollback": (0, 1), "log": (0, 0)}
    assert (last["skipped_steps"], last["rollbacks"]) == counts[on_spike]
    assert "bad step 5: the " in capsys.readouterr().out
    if on_spike == "skip":
        clean = config_of(folder, "clean", steps=6)
        assert run_with(clean, Change(without=(4,))) == ""
        assert_same_tensors(folder / "spike" / "run", folder / "clean" / "run", step=6)


def test_stopping_is_what_happens_unasked_and_what_is_asked_may_change_on_a_resume(folder: Path):
    poison = Change(poison={4 * 2: NAN})
    sentence = run_with(config_of(folder, "run", steps=4), poison)
    assert "must be finite, but at step 3" in sentence
    assert "set watch.on_nonfinite to skip or rollback" in sentence
    assert [event["action"] for event in events(folder, "run")] == ["stop"]
    assert run_with(config_of(folder, "run", steps=4, watch=SKIP), poison) == ""
    assert [record["step"] for record in records(folder / "run")] == [1, 2, 3, 4]
