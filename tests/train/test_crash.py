"""crash.json: what it says, which rank writes it, and where none is left. Jobs of two real processes: tests/end_to_end/test_hang.py."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.train.poison import NAN, Change, run_with
from tests.train.test_watch_run import run_on
from tests.train.tiny_job import ALONE, tiny_config, write_shards
from train import run
from train.crash import CrashFile, main, set_aside
from train.run_folder import RunFolder
from train.run_lock import hold

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
    assert "pytest" in found["command"]


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


def test_the_first_rank_to_fail_writes_and_the_later_ones_add_nothing(tmp_path: Path):
    fail(crash_file(tmp_path, rank=2), RuntimeError("shard 7 is damaged (rank 1 of 3)"))
    assert not (tmp_path / "crash.json").exists(), "rank 1 has the traceback"
    fail(crash_file(tmp_path, rank=1), RuntimeError("shard 7 is damaged (rank 1 of 3)"))
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
