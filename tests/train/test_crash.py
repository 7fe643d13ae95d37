"""crash.json: what it says, which rank writes it, and where none is left. Jobs of two real processes: tests/end_to_end/test_hang.py."""

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.train.poison import NAN, Change, run_with
from tests.train.test_watch_run import run_on
from tests.train.tiny_job import ALONE, tiny_config, write_shards
from train import checkpoint, crash, measure, run
from train.crash import CrashFile, main, set_aside
from train.run_folder import RunFolder
from train.run_lock import LOCK_FILE, hold

pytestmark = pytest.mark.usefixtures("torch_as_it_was")
DUE = {"checkpoint": {"every_steps": 2}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", seed=1)
    return tmp_path


def crash_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "crash.json").read_text())


def test_a_failed_run_says_why_where_and_how_to_go_on(folder: Path):
    sentence = run_with(tiny_config(folder, run={"steps": 4}, **DUE), Change(poison={4 * 3: NAN}))
    found = crash_of(folder)
    assert found["reason"] == sentence
    assert "must be finite, but at step 4" in sentence
    assert (found["rank"], found["step"], found["position"]) == (0, 3, 12)
    assert (found["host"], found["pid"]) == (socket.gethostname(), os.getpid())
    assert any("in train_step" in line for line in found["traceback"])
    assert found["checkpoint"] == str(folder / "run" / "checkpoints" / "step_000002")
    assert found["checkpoint"] in found["resume"]
    assert Path(sys.executable).name in found["command"]  # its folder is written as pytest was called


def test_a_new_start_moves_the_file_aside_and_a_good_end_leaves_none(folder: Path):
    for position in (4 * 3, 4 * 2):
        run_with(tiny_config(folder, run={"steps": 4}, **DUE), Change(poison={position: NAN}))
    reasons = [json.loads((folder / "run" / name).read_text())["reason"] for name in ("crash-001.json", "crash.json")]
    assert ["at step 4" in reasons[0], "at step 3" in reasons[1]] == [True, True]
    assert run_with(tiny_config(folder, run={"steps": 4}, **DUE), Change()) == ""
    assert sorted(path.name for path in (folder / "run").glob("crash*")) == ["crash-001.json", "crash-002.json"]


def test_what_is_found_before_the_run_begins_leaves_no_file(folder: Path):
    run.run(tiny_config(folder), ALONE)
    with pytest.raises(ValueError, match="another config"):
        run.run(tiny_config(folder, optim={"lr": 0.5}), ALONE)
    with hold(folder / "run"), pytest.raises(RuntimeError, match="one process at a time"):
        run.run(tiny_config(folder, run={"steps": 9}), ALONE)
    assert not list((folder / "run").glob("crash*")), "the folder was another run's"


def test_a_row_that_one_rank_cannot_read_is_told_by_that_rank(folder: Path, pool):
    config = tiny_config(folder, parallel={"zero_stage": 1})
    assert run_on(pool, 2, config, Change(unreadable=4 + 1)) == "shard 7 is damaged (rank 1 of 2)"
    found = crash_of(folder)
    assert (found["reason"], found["rank"]) == ("shard 7 is damaged (rank 1 of 2)", 1)
    assert (found["step"], found["position"]) == (1, 4)
    assert any("in read" in line for line in found["traceback"]), "where it failed, not where it was told"


def crash_file(folder: Path, *, rank: int) -> CrashFile:
    crash = CrashFile(
        RunFolder(folder), ALONE.model_copy(update={"rank": rank, "world_size": 3, "local_world_size": 3})
    )
    crash.begin()
    return crash


def fail(crash: CrashFile, error: Exception) -> None:
    with pytest.raises(type(error)), crash.watched():
        raise error


TOLD = "shard 7 is damaged (rank 1 of 3)"


def test_the_first_rank_to_fail_writes_and_the_later_ones_add_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crash, "PATIENCE_S", 0.3)
    fail(crash_file(tmp_path, rank=1), RuntimeError(TOLD))
    first = (tmp_path / "crash.json").read_text()
    fail(crash_file(tmp_path, rank=0), ZeroDivisionError("a bug"))
    crash_file(tmp_path, rank=0).hang("rank 0 has waited")
    assert (tmp_path / "crash.json").read_text() == first
    assert set_aside(RunFolder(tmp_path)) == tmp_path / "crash-001.json"
    assert set_aside(RunFolder(tmp_path)) is None
    fail(crash_file(tmp_path, rank=0), ZeroDivisionError("a bug"))
    found = json.loads((tmp_path / "crash.json").read_text())
    assert found["reason"] == "ZeroDivisionError: a bug"
    assert "begins anew" in found["resume"]


def test_a_rank_that_was_told_leaves_the_file_to_the_one_that_failed(tmp_path: Path):
    """It has the traceback, and may be the later of the two."""
    late = threading.Timer(0.5, fail, [crash_file(tmp_path, rank=1), RuntimeError(TOLD)])
    late.start()
    fail(crash_file(tmp_path, rank=2), RuntimeError(TOLD))
    late.join()
    found = json.loads((tmp_path / "crash.json").read_text())
    assert (found["rank"], found["traceback"][-1]) == (1, f"RuntimeError: {TOLD}")


def test_where_the_rank_that_failed_cannot_write_another_tells_what_it_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(crash, "PATIENCE_S", 0.3)
    fail(crash_file(tmp_path / "gone", rank=1), RuntimeError(TOLD))
    began = time.monotonic()
    fail(crash_file(tmp_path, rank=2), RuntimeError(TOLD))
    assert time.monotonic() - began > 0.3
    found = json.loads((tmp_path / "crash.json").read_text())
    assert (found["reason"], found["rank"], found["traceback"]) == (TOLD, 2, None)


def test_a_full_disk_leaves_no_file_and_a_later_rank_its_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        fail(crash_file(tmp_path, rank=1), RuntimeError("the true reason"))
    assert "No space left on device" in caplog.text
    assert list(tmp_path.iterdir()) == []
    fail(crash_file(tmp_path, rank=0), RuntimeError("the second reason"))
    assert json.loads((tmp_path / "crash.json").read_text())["reason"] == "the second reason"
    assert [path.name for path in tmp_path.iterdir()] == ["crash.json"]


@pytest.mark.parametrize("torn", ["", '{"reason": "the disk', "[]", "null"])
def test_a_torn_file_is_replaced(tmp_path: Path, torn: str, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "crash.json").write_text(torn)
    assert main([str(tmp_path)]) == 1
    assert "must be a whole JSON object, but is torn" in capsys.readouterr().err
    fail(crash_file(tmp_path, rank=0), RuntimeError("the true reason"))
    assert json.loads((tmp_path / "crash.json").read_text())["reason"] == "the true reason"


def test_without_hard_links_the_first_rank_wins_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*paths: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for rank in (1, 0):
        fail(crash_file(tmp_path, rank=rank), RuntimeError(f"of rank {rank}"))
    assert json.loads((tmp_path / "crash.json").read_text())["reason"] == "of rank 1"
    assert [path.name for path in tmp_path.iterdir()] == ["crash.json"]


def test_the_file_is_written_while_the_run_still_holds_its_lock(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Else a new start could set the folder right, and then get the file of the old one."""
    write, seen = CrashFile._write, []

    def other_start(self: CrashFile, *args: Any) -> None:
        with pytest.raises(RuntimeError, match="one process at a time"), hold(folder / "run", patience_s=0.0):
            pass
        write(self, *args)
        seen.append(self)

    monkeypatch.setattr(CrashFile, "_write", other_start)
    run_with(tiny_config(folder, run={"steps": 4}), Change(poison={4: NAN}))
    assert len(seen) == 1
    assert "step 2" in crash_of(folder)["reason"]
    with hold(folder / "run", patience_s=0.0):
        pass


def test_a_process_of_an_earlier_start_does_not_write_into_the_folder_of_a_new_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / LOCK_FILE).write_text("process 1 of node 1")
    old = crash_file(tmp_path, rank=1)
    (tmp_path / LOCK_FILE).write_text("process 5 of node 9")
    fail(old, RuntimeError("the old reason"))
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    assert "another start has the folder by now" in caplog.text


def fails(*args: Any, **kwargs: Any) -> None:
    raise MemoryError("there are 2 GiB")


@pytest.mark.parametrize(
    ("part", "steps", "place"),
    [("evaluate", 4, (2, 8)), ("save", 3, (3, 12)), ("MetricsWriter", 6, (4, 16))],
    ids=["in an evaluation", "in the last save", "before the first step of a resumed run"],
)
def test_the_step_and_position_are_those_that_were_reached(
    folder: Path, part: str, steps: int, place: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    config = {"eval": {"every_steps": 2}, "checkpoint": {"asynchronous": False, "on_failure": "stop"}}
    if part == "MetricsWriter":
        run.run(tiny_config(folder, run={"steps": 4}, **config), ALONE)
    module = {"evaluate": measure, "save": checkpoint, "MetricsWriter": run}[part]
    monkeypatch.setattr(module, part, fails)
    with pytest.raises((MemoryError, RuntimeError), match="there are 2 GiB"):
        run.run(tiny_config(folder, run={"steps": steps}, **config), ALONE)
    found = crash_of(folder)
    assert (found["step"], found["position"]) == place


def test_a_folder_that_cannot_be_written_does_not_hide_the_error(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    fail(crash_file(tmp_path / "gone", rank=0), RuntimeError("the true reason"))
    assert "crash.json cannot be written" in caplog.text


def test_the_file_is_printed_with_the_traceback_on_top(folder: Path, capsys: pytest.CaptureFixture[str]):
    sentence = run_with(tiny_config(folder, run={"steps": 4}, **DUE), Change(poison={4 * 3: NAN}))
    capsys.readouterr()
    assert main([str(folder / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2] == f"rank 0 of 1 on {socket.gethostname()}, after step 3: {sentence}"
    assert "step_000002" in lines[-1]
    assert main([str(folder)]) == 1
