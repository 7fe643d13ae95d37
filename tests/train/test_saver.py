"""train/saver.py: saves behind the steps. What is written is what was there at the save, one write at a time, and what ends waits.

The ranks are threads; tests/end_to_end/test_save_behind_steps.py has processes, test_saver_failures.py the writes that fail.
"""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.train.saver_ranks import Disk, Held, on_ranks
from tests.train.thread_mesh import draw, load_split, same
from train import checkpoint
from train.checkpoint import latest


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    found = Disk(monkeypatch)
    yield found
    found.free.set()  # whatever still waits may end


def test_what_the_steps_change_during_the_write_does_not_reach_the_file(tmp_path: Path, disk: Disk):
    disk.free.clear()

    def work(held: Held) -> bool:
        held.save(100)
        is_there = (tmp_path / "step_000100").exists()
        held.fill(7.0)
        disk.free.set()
        held.saver.finish()
        return is_there

    assert on_ranks(tmp_path, work)[:2] == ([False, False], [None, None])
    path = tmp_path / "step_000100"
    assert latest(tmp_path) == path
    assert same(load_split(path, 3), draw(1))
    assert checkpoint.read_tensors(path)["bias"].tolist() == [0, 1, 2, 3, 4]


def test_a_save_behind_the_steps_writes_the_bytes_of_one_that_is_waited_for(tmp_path: Path):
    def work(held: Held) -> None:
        held.save(100)
        held.saver.finish()

    found = []
    for asynchronous in (True, False):
        folder = tmp_path / str(asynchronous)
        assert on_ranks(folder, work, asynchronous=asynchronous)[1] == [None, None]
        found.append({path.name: path.read_bytes() for path in sorted((folder / "step_000100").iterdir())})
    assert found[0] == found[1]
    assert len(found[0]) == 4


def test_a_save_that_is_due_waits_for_the_one_before_and_says_how_long(tmp_path: Path, disk: Disk):
    disk.delay_s = 0.5

    def work(held: Held) -> list[float]:
        waits = []
        for step in (100, 200, 300):
            held.save(step)
            waits.append(held.saver.take_record()["checkpoint"]["wait_seconds"])
        held.saver.finish()
        return waits

    results, errors, _ = on_ranks(tmp_path, work, keep=2)
    assert errors == [None, None]
    assert disk.most == 1
    for first, second, third in results:
        assert first < 0.4 < 0.5 <= min(second, third)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000200", "step_000300"]


def test_a_save_that_is_waited_for_is_on_disk_when_it_returns(tmp_path: Path):
    def work(held: Held) -> tuple[bool, dict[str, Any]]:
        held.save(100)
        return (tmp_path / "step_000100" / "manifest.json").exists(), held.saver.take_record()["checkpoint"]

    for is_there, record in on_ranks(tmp_path, work, asynchronous=False)[0]:
        assert is_there
        assert record["wait_seconds"] >= record["write_seconds"] > 0
        assert record["failures"] == 0


def test_an_error_of_the_run_waits_for_the_write(tmp_path: Path, disk: Disk):
    disk.delay_s = 0.5

    def work(held: Held) -> None:
        held.save(100)
        if held.rank.rank == 1:
            raise ValueError("the loss must be finite")

    errors = on_ranks(tmp_path, work)[1]
    assert errors[0] is None
    assert isinstance(errors[1], ValueError)
    assert latest(tmp_path) == tmp_path / "step_000100"


def test_a_write_that_does_not_end_holds_up_an_error_only_so_long(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
):
    disk.free.clear()

    def work(held: Held) -> None:
        held.save(100)
        raise ValueError("the loss must be finite")

    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        errors = on_ranks(tmp_path, work, patience_s=1.5)[1]
    assert 1.5 <= time.monotonic() - began < 10
    assert [str(error) for error in errors] == ["the loss must be finite"] * 2
    assert "the run ends because the loss must be finite; the checkpoint of step 100 is being written" in caplog.text
    assert "the checkpoint of step 100 was not written in time" in caplog.text
    assert latest(tmp_path) is None


@pytest.mark.parametrize("then", ["save", "finish"])
def test_a_write_that_does_not_end_in_time_stops_all_ranks_with_a_sentence(tmp_path: Path, disk: Disk, then: str):
    disk.free.clear()

    def work(held: Held) -> None:
        held.save(100)
        held.save(200) if then == "save" else held.saver.finish()

    for error in on_ranks(tmp_path, work, timeout_s=0.5)[1]:
        assert isinstance(error, RuntimeError)
        assert "step 100 must be written in 0.5 s, but on rank 0 of 2 it is still not" in str(error)
        assert "raise checkpoint.timeout_s" in str(error)
