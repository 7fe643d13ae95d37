"""Saves that fail: all ranks hear of it after the same step, and the run goes on, stops, or has failed at its end."""

from pathlib import Path
from typing import Any

import pytest

from tests.train.saver_ranks import Held, fail_to_write, on_ranks
from tests.train.tiny_job import ALONE, records, tiny_config, write_shards
from train import checkpoint
from train.checkpoint import TrainState, latest
from train.host_copy import HostCopy
from train.run import run


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("name", ["rank_00001.safetensors", "rank_00000.safetensors", "manifest.json"])
def test_a_failed_save_is_told_on_all_ranks_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, asynchronous: bool
):
    def work(held: Held) -> list[dict[str, Any]]:
        held.save(50)
        known = [held.look_until_known()]
        if held.rank.rank == 0:
            fail_to_write(monkeypatch, name, times=1)
        held.rank.agree(True)
        for step in (100, 150):
            held.save(step)
            known.append(held.look_until_known())
            assert latest(tmp_path) == tmp_path / ("step_000050" if step == 100 else "step_000150")
        held.saver.finish()
        return known

    results, errors, said = on_ranks(tmp_path, work, asynchronous=asynchronous)
    assert errors == [None, None]
    for known in results:
        assert [record["failures"] for record in known] == [0, 1, 0]
        assert f"step 100 was not written: {tmp_path}/step_000100.partial/{name} needs" in known[1]["failure"]
        assert "failure" not in known[2]
    for sentences in said:
        (sentence,) = sentences
        assert "No space left" in sentence
        assert "failure 1 in a row, after 3 the run stops" in sentence
    assert not (tmp_path / "step_000100.partial").exists()


def test_a_folder_that_cannot_be_written_is_a_failed_save(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")

    def work(held: Held) -> str:
        held.save(100)
        return held.look_until_known()["failure"]

    results, errors, _ = on_ranks(tmp_path / "file", work)
    assert errors == [None, None]
    assert all("step_000100.partial cannot be made" in sentence for sentence in results)


def test_no_room_for_the_copy_on_one_rank_is_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    take = HostCopy.take

    def refuse(self: HostCopy, fragments: Any, tensors: Any) -> Any:
        if not tensors:  # rank 1 has none
            raise RuntimeError("80 bytes of host memory are not to be had")
        return take(self, fragments, tensors)

    monkeypatch.setattr(HostCopy, "take", refuse)

    def work(held: Held) -> dict[str, Any]:
        held.save(100)
        return held.saver.take_record()["checkpoint"]

    results, errors, said = on_ranks(tmp_path, work)
    assert errors == [None, None]
    assert [record["failures"] for record in results] == [1, 1]
    assert all("step 100 was not written: 80 bytes" in sentences[0] for sentences in said)


def test_stop_stops_all_ranks_after_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fail_to_write(monkeypatch, "rank_00001.safetensors")

    def work(held: Held) -> None:
        held.save(100)
        held.look_until_known()

    _, errors, said = on_ranks(tmp_path, work, on_failure="stop")
    for error in errors:
        assert isinstance(error, RuntimeError)
        assert "step 100 was not written" in str(error)
    assert said == [[], []]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_three_failures_in_a_row_stop_the_run_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
):
    fail_to_write(monkeypatch, "rank_00001.safetensors")

    def work(held: Held) -> None:
        for step in (100, 200, 300):
            held.save(step)
            held.look_until_known()

    _, errors, said = on_ranks(tmp_path, work, asynchronous=asynchronous)
    for error in errors:
        assert isinstance(error, RuntimeError)
        assert "step 300 was not written" in str(error)
        assert "failure 3 in a row" in str(error)
    assert [len(sentences) for sentences in said] == [2, 2]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_last_save_that_failed_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool):
    fail_to_write(monkeypatch, "manifest.json")

    def work(held: Held) -> None:
        held.save(100)
        held.saver.finish()

    for error in on_ranks(tmp_path, work, asynchronous=asynchronous)[1]:
        assert isinstance(error, RuntimeError)
        assert "step 100 was not written" in str(error)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(("times", "is_whole"), [(1, True), (2, False)])
def test_a_last_save_that_failed_is_told_to_a_run_that_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, is_whole: bool, asynchronous: bool
):
    """It counts as any other: one that failed before it does not matter."""
    fail_to_write(monkeypatch, "manifest.json", times=times)

    def work(held: Held) -> bool:
        held.save(100)
        held.save(200)
        return held.saver.finish(goes_on=True)

    results, errors, said = on_ranks(tmp_path, work, asynchronous=asynchronous)
    assert (results, errors) == ([is_whole] * 2, [None, None])
    assert [len(sentences) for sentences in said] == [times] * 2
    assert (latest(tmp_path) == tmp_path / "step_000200") is is_whole


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", seed=1)
    return tmp_path


def run_settings(**checkpoint_settings: Any) -> dict[str, dict[str, Any]]:
    return {"run": {"steps": 5, "log_every_steps": 1}, "checkpoint": {"every_steps": 2} | checkpoint_settings}


@pytest.mark.usefixtures("torch_as_it_was")
def test_a_run_tells_of_a_failed_save_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    fail_to_write(monkeypatch, "rank_00000.safetensors", times=1)
    sections = run_settings()
    sections["run"]["dir"] = str(folder / "run")
    run(tiny_config(folder, **sections), ALONE)
    said = capsys.readouterr().out
    assert "the checkpoint of step 2 was not written" in said
    assert "No space left" in said
    failures = {
        record["step"]: record["checkpoint"]["failure"]
        for record in records(folder)
        if "failure" in record.get("checkpoint", {})
    }
    ((step, sentence),) = failures.items()
    assert step in (3, 4)  # before the next save
    assert "step 2 was not written" in sentence
    assert sorted(path.name for path in (folder / "run" / "checkpoints").iterdir()) == [
        "latest",
        "step_000004",
        "step_000005",
    ]


@pytest.mark.usefixtures("torch_as_it_was")
def test_a_run_whose_last_save_fails_does_not_say_done(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    fail_to_write(monkeypatch, "rank_00000.safetensors")
    with pytest.raises(RuntimeError, match="the checkpoint of step 5 was not written"):
        run(tiny_config(folder, **run_settings(every_steps=100)), ALONE)
    assert "done" not in capsys.readouterr().out


@pytest.mark.usefixtures("torch_as_it_was")
def test_the_losses_are_the_same_with_and_without_writes_behind_the_steps(folder: Path):
    losses = []
    for asynchronous in (True, False):
        sections = run_settings(every_steps=1, asynchronous=asynchronous)
        sections["run"]["dir"] = str(folder / str(asynchronous) / "run")
        run(tiny_config(folder, **sections), ALONE)
        losses.append([record["loss"] for record in records(folder / str(asynchronous))])
        assert isinstance(checkpoint.read_state(folder / str(asynchronous) / "run/checkpoints/step_000005"), TrainState)
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5
