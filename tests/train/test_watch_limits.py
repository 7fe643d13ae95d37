"""Whole runs of one process at the edges of the watch: limits over several starts, damage in a checkpoint, what cannot be written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.poison import NAN, Change, assert_same_tensors, run_with
from tests.train.test_watch_run import BACK, SKIP, config_of, events
from tests.train.tiny_job import records, write_shards
from train import incident, resume, run, step
from train.metrics import Reporter
from train.stragglers import Stragglers

pytestmark = pytest.mark.usefixtures("torch_as_it_was")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", seed=1)
    return tmp_path


def test_a_start_that_did_not_save_its_rollbacks_has_made_them_all_the_same(folder: Path):
    """Else a run at its limit would go back once more each time that it is started."""
    often = config_of(folder, "often", steps=8, watch=BACK | {"max_rollbacks": 1})
    for _ in range(2):
        assert "after 1 of at most 1 rollbacks" in run_with(often, Change(poison={8: NAN, 12: NAN}))
    assert [event["action"] for event in events(folder, "often")] == ["rollback", "stop", "stop"]


def test_a_run_that_begins_anew_does_not_count_the_rollbacks_of_the_one_before(folder: Path):
    config = config_of(folder, "anew", steps=4, watch=BACK | {"max_rollbacks": 1})
    assert run_with(config, Change(poison={4 * 3: NAN})) == ""
    shutil.rmtree(folder / "anew" / "run" / "checkpoints")
    assert run_with(config, Change(poison={4 * 3: NAN})) == ""
    assert [len(events(folder, "anew", name)) for name in ("events.jsonl.1", "events.jsonl")] == [1, 1]


def test_damage_in_the_checkpoint_itself_is_left_behind_by_going_to_the_one_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """A weight is NaN from the checkpoint of step 4 on: from there every step is bad."""
    struck: list[int] = []

    def save(job: Any, at: Any) -> None:
        if at.step == 4 and not struck:
            struck.append(at.step)
            with torch.no_grad():
                next(job.engine.model.parameters()).fill_(NAN)
        resume.save(job, at)

    with monkeypatch.context() as patch:
        patch.setattr(run, "save", save)
        assert run_with(config_of(folder, "bad", steps=8, watch=BACK), Change()) == ""
    assert [(e["step"], e["back_to"], e["passed_over"]) for e in events(folder, "bad")] == [(5, 4, None), (5, 2, 4)]
    assert run_with(config_of(folder, "clean", steps=2), Change()) == ""
    assert run_with(config_of(folder, "clean", steps=8), Change(start=4 * 6)) == ""
    assert_same_tensors(folder / "bad" / "run", folder / "clean" / "run", step=8)
    assert [r["position"] for r in records(folder / "bad")] == [4, 8, 28, 32, 36, 40, 44, 48]


def test_two_bad_steps_with_a_checkpoint_between_them_go_back_to_the_newest(folder: Path):
    config = config_of(folder, "bad", steps=8, watch=BACK)
    assert run_with(config, Change(poison={4 * 5: NAN, 4 * 8: NAN})) == ""
    assert [(event["step"], event["back_to"]) for event in events(folder, "bad")] == [(6, 4), (7, 6)]


def test_a_crash_after_going_back_tells_where_the_run_then_is(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def close(self: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(run.MetricsWriter, "close", close)
    with pytest.raises(MemoryError):
        run_with(config_of(folder, "back", steps=6, watch=BACK), Change(poison={4 * 3: NAN}))
    told = json.loads((folder / "back" / "run" / "crash.json").read_text())
    assert (told["step"], told["position"]) == (2, 16)


def test_at_a_stop_the_reason_is_not_replaced_by_what_cannot_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def full(*_: Any) -> None:
        raise RuntimeError("events.jsonl cannot be written")

    monkeypatch.setattr(incident, "_append", full)
    poison = Change(poison={4: NAN})
    assert "must be finite, but at step 2" in run_with(config_of(folder, "stop", steps=4), poison)
    assert "events.jsonl cannot be written" in caplog.text
    assert "events.jsonl cannot be written" in run_with(config_of(folder, "skip", steps=4, watch=SKIP), poison)


def test_what_is_counted_and_shown_begins_anew_where_the_run_goes_back(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The bar, the seconds of a window and the open files: those of the steps that are done again."""
    bars, windows, closed = [], [], []
    start, record, close = Reporter.start, Stragglers.record, run.MetricsWriter.close
    monkeypatch.setattr(Reporter, "start", lambda self, done: (bars.append(done), start(self, done))[1])
    monkeypatch.setattr(run.MetricsWriter, "close", lambda self: (closed.append(self), close(self))[1])
    monkeypatch.setattr(
        Stragglers, "record", lambda self, spent, say: (windows.append(spent.steps), record(self, spent, say=say))[1]
    )
    config = config_of(folder, "back", steps=5, watch=BACK)
    config = config.model_copy(update={"run": config.run.model_copy(update={"log_every_steps": 2})})
    assert run_with(config, Change(poison={4 * 3: NAN})) == ""
    assert (bars, windows) == ([0, 2], [2, 2, 1])
    assert len(closed) == len(set(map(id, closed))) == 2


def test_nothing_is_copied_where_no_step_may_be_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step, "_Before", None)
    assert run_with(config_of(folder, "back", steps=4, watch=BACK), Change()) == ""
    with pytest.raises(TypeError):
        run_with(config_of(folder, "skip", steps=4, watch=SKIP), Change())
