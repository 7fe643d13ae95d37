"""train/saver.py: saves behind the steps. What is written is what was there at the save, one write at a time, and a failure is
heard by all ranks after the same step. The ranks are threads; tests/end_to_end/test_save_behind_steps.py has processes.
"""

import builtins
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.thread_mesh import STATE, ThreadMesh, World, draw, load_split, same, split
from tests.train.tiny_job import ALONE, records, tiny_config, write_shards
from train import checkpoint, storage
from train.checkpoint import TrainState, latest
from train.checkpoint_config import CheckpointConfig
from train.host_copy import HostCopy
from train.run import run
from train.saver import Saver, open_saver

RANKS = 2


class Rank(ThreadMesh):
    """A rank with a second world for its saver's thread."""

    def __init__(self, world: World, channel: World, rank: int) -> None:
        super().__init__(world, rank)
        self.channel, self.said = channel, list[str]()

    def agree(self, flag: bool) -> bool:
        return any(self._gather(flag))

    @contextlib.contextmanager
    def beside(self, *, timeout_s: float) -> Iterator[Any]:
        yield ThreadMesh(self.channel, self.rank)


@dataclasses.dataclass
class Held:
    """A rank's saver and what it saves."""

    rank: Rank
    saver: Saver
    fragments: list[Any]
    tensors: dict[str, torch.Tensor]

    def save(self, step: int) -> None:
        state = dataclasses.replace(STATE, step=step)
        self.saver.save(state, fragments=self.fragments, tensors=self.tensors)

    def fill(self, value: float) -> None:
        for view in [view for fragment in self.fragments for view in fragment.tensors.values()]:
            view.fill_(value)
        for tensor in self.tensors.values():
            tensor.fill_(value)

    def look_until_known(self) -> dict[str, Any]:
        """Steps without a save, until one of them tells what came of the last one."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            self.saver.look()
            record = self.saver.take_record().get("checkpoint", {})
            if "write_seconds" in record:
                return record
            time.sleep(0.01)
        raise AssertionError("the write never ended")


def on_ranks(
    folder: Path, work: Callable[[Held], Any], *, patience_s: float = 20.0, ranks: int = RANKS, **settings: Any
) -> tuple[list[Any], list[BaseException | None], list[list[str]]]:
    """`work` on every rank: what each returned, raised, and said."""
    world, channel = World(ranks), World(ranks)
    members = [Rank(world, channel, number) for number in range(ranks)]
    results: list[Any] = [None] * ranks
    errors: list[BaseException | None] = [None] * ranks
    parts = split(draw(1), ranks, seed=0)
    config = CheckpointConfig.model_validate(settings)

    def live(member: Rank) -> None:
        tensors = {"bias": torch.arange(5, dtype=torch.int64)} if member.rank == 0 else {}
        opened = open_saver(folder, member, config, patience_s=patience_s, say=member.said.append)  # pyright: ignore[reportArgumentType]
        try:
            with opened as saver:
                results[member.rank] = work(Held(member, saver, parts[member.rank], tensors))
        except BaseException as error:
            errors[member.rank] = error

    threads = [threading.Thread(target=live, args=(member,)) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank hangs"
    return results, errors, [member.said for member in members]


class Disk:
    """Stands before the writing of tensor files: may hold it up, and counts how many writes of a rank are on at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = threading.Event()
        self.free.set()
        self.delay_s = 0.0
        self.on: dict[str, int] = {}
        self.most = 0
        write, lock = checkpoint.write_tensors, threading.Lock()

        def slow(path: Path, parts: Any) -> Any:
            with lock:
                self.on[path.name] = self.on.get(path.name, 0) + 1
                self.most = max(self.most, self.on[path.name])
            assert self.free.wait(20)
            time.sleep(self.delay_s)
            written = write(path, parts)
            with lock:
                self.on[path.name] -= 1
            return written

        monkeypatch.setattr(checkpoint, "write_tensors", slow)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    found = Disk(monkeypatch)
    yield found
    found.free.set()  # whatever still waits may end


def fail_to_write(monkeypatch: pytest.MonkeyPatch, name: str, *, times: int = 10**9) -> None:
    """The disk is full whenever the file `name` is written, so many times."""
    left = [times]

    def open_on_a_full_disk(path: Path, mode: str) -> Any:
        if mode == "xb" and path.name == name and left[0] > 0:
            left[0] -= 1
            return builtins.open("/dev/full", "wb")
        return builtins.open(path, mode)

    monkeypatch.setattr(storage, "open", open_on_a_full_disk, raising=False)


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


def test_a_copy_is_equal_keeps_shapes_and_dtypes_and_takes_the_same_memory_again():
    holder = HostCopy()
    fragments = split(draw(3), 1, seed=0)[0]
    tensors = {
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "number": torch.tensor(3),
        "none": torch.zeros(0, 4),
        "columns": torch.randn(6, 4).t(),
        "flags": torch.tensor([True, False, True]),
    }
    places = []
    for _ in range(2):
        copied = holder.take(fragments, tensors)
        for found, expected in zip(copied.fragments, fragments, strict=True):
            assert (found.name, found.shape, found.start, found.box) == (
                expected.name,
                expected.shape,
                expected.start,
                None,
            )
            for kind, view in expected.tensors.items():
                assert torch.equal(found.tensors[kind].view(torch.int32), view.view(torch.int32))
                assert view.numel() == 0 or found.tensors[kind].data_ptr() != view.data_ptr()
        for name, tensor in tensors.items():
            assert torch.equal(copied.tensors[name], tensor)
            assert (copied.tensors[name].dtype, copied.tensors[name].shape) == (tensor.dtype, tensor.shape)
        places.append(copied.fragments[0].tensors["master"].data_ptr())
    assert places[0] == places[1]


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
