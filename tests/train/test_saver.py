"""train/saver.py: saves behind the steps. What is written is what was there at the save, one write at a time, and what ends waits.

The ranks are threads; tests/end_to_end/test_save_behind_steps.py has processes, test_saver_failures.py the writes that fail,
test_saver_write.py has one write by itself.
"""

import contextlib
import dataclasses
import logging
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import open_mesh
from tests.train.saver_ranks import Disk, Held, on_ranks
from tests.train.thread_mesh import STATE, draw, load_split, same, split
from tests.train.tiny_job import ALONE
from train import checkpoint
from train.checkpoint import latest
from train.checkpoint_config import CheckpointConfig
from train.host_copy import HostCopy
from train.saver import Write, open_saver


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


@pytest.mark.parametrize("then", ["save", "finish", "nothing"])
def test_a_write_that_does_not_end_in_time_stops_all_ranks_with_a_sentence(tmp_path: Path, disk: Disk, then: str):
    """nothing: the save waits for the write itself."""
    disk.free.clear()

    def work(held: Held) -> None:
        held.save(100)
        assert then != "nothing", "the save has returned"
        held.save(200) if then == "save" else held.saver.finish()

    for error in on_ranks(tmp_path, work, timeout_s=0.5, asynchronous=then != "nothing")[1]:
        assert isinstance(error, RuntimeError)
        assert "step 100 must be written in 0.5 s, but on rank 0 of 2 it is still not" in str(error)
        assert "raise checkpoint.timeout_s" in str(error)


def test_a_run_of_one_process_that_waits_for_its_saves_gives_a_disk_up_too(tmp_path: Path, disk: Disk):
    disk.free.clear()
    (error,) = on_ranks(tmp_path, lambda held: held.save(100), ranks=1, timeout_s=0.5, asynchronous=False)[1]
    assert "step 100 must be written in 0.5 s, but on rank 0 of 1 it is still not" in str(error)


@pytest.mark.parametrize("then", ["look", "save", "finish"])
def test_a_write_that_ended_too_late_stops_all_ranks_too(tmp_path: Path, disk: Disk, then: str):
    """A rank that waited for it may have given its group up, so whatever the disk did in the end, there cannot be another save."""
    disk.delay_s = 0.5

    def work(held: Held) -> None:
        held.save(100)
        assert held.rank.patience == 0.2
        if then == "look":
            held.look_until_known()
        time.sleep(1.0)
        held.save(200) if then == "save" else held.saver.finish()

    for error in on_ranks(tmp_path, work, timeout_s=0.2)[1]:
        assert isinstance(error, RuntimeError)
        found = r"it is still not" if then == "look" else r"it took (0\.[5-9]|1\.0) s"
        assert re.match(
            rf"the checkpoint of step 100 must be written in 0.2 s, but on rank [01] of 2 {found}: check", str(error)
        )


def test_a_rank_that_waits_too_long_for_a_disk_ends_the_run_with_the_sentence_and_not_with_gloos(pool, tmp_path: Path):
    for sentence in pool(2).run(save_on_a_slow_disk, tmp_path, timeout=150):
        assert "the checkpoint of step 1 must be written in 0.5 s, but on rank" in sentence
        assert "gloo" not in sentence.lower()


@contextlib.contextmanager
def waits_for_writes() -> Iterator[None]:
    """In the end no write is on, given up or not: it would hold the groups of its mesh."""
    yield
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(20)


def save_on_a_slow_disk(folder: Path) -> str:
    """A rank of a real group; rank 1's file takes three times as long as it may. The sentence with which the steps end."""
    rank, size = dist.get_rank(), dist.get_world_size()
    place = {"rank": rank, "world_size": size, "local_rank": rank, "local_world_size": size}
    settings = CheckpointConfig(timeout_s=0.5)
    fragments = split(draw(1), size, seed=0)[rank]
    write = checkpoint.write_tensors

    def slow(path: Path, parts: Any) -> Any:
        time.sleep(1.5 * rank)
        return write(path, parts)

    with (
        waits_for_writes(),
        open_mesh(ALONE.model_copy(update=place), ep_size=1, device=torch.device("cpu")) as mesh,
        mock.patch.object(checkpoint, "write_tensors", slow),
    ):
        try:
            with open_saver(folder, mesh, settings, patience_s=5.0, say=print) as saver:
                saver.save(dataclasses.replace(STATE, step=1), fragments=fragments, tensors={})
                for _ in range(200):
                    saver.look()
                    time.sleep(0.02)
        except RuntimeError as error:
            return str(error)
    return "the run went on"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_ctrl_c_waits_no_longer_than_a_second_for_a_write(tmp_path: Path, disk: Disk, asynchronous: bool):
    disk.free.clear()

    def work(held: Held) -> None:
        # asked for by who waits: the key is pressed in the wait, or else after the save
        with mock.patch.object(Write, "left_s", mock.PropertyMock(side_effect=KeyboardInterrupt)):
            held.save(100)
            raise KeyboardInterrupt

    began = time.monotonic()
    errors = on_ranks(tmp_path, work, ranks=1, asynchronous=asynchronous)[1]
    assert isinstance(errors[0], KeyboardInterrupt)
    assert time.monotonic() - began < 5
    assert latest(tmp_path) is None


def test_a_copy_that_a_given_up_write_still_reads_is_not_given_back(tmp_path: Path, disk: Disk, monkeypatch: Any):
    given_back: list[int] = []
    monkeypatch.setattr(HostCopy, "close", lambda self: given_back.append(1))

    def work(held: Held) -> None:
        held.save(100)
        given_back.clear()  # the first copy has made room for itself
        held.rank.agree(True)
        raise KeyboardInterrupt

    disk.free.clear()
    on_ranks(tmp_path / "slow", work, patience_s=0.1)
    assert given_back == []
    disk.free.set()
    on_ranks(tmp_path / "fast", work)
    assert given_back == [1, 1]
