"""train/run_lock.py: the second process on a run folder is refused, and a dead one keeps nobody out."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.train.thread_mesh import try_ranks
from tests.train.tiny_job import ALONE, records, tiny_config, write_shards
from train import run_lock
from train.engine import LocalMesh
from train.run import run
from train.run_lock import hold, hold_together

ROOT = Path(__file__).resolve().parents[2]
# Holds the folder, with a child that was forked meanwhile and outlives it, until it is killed.
HOLDER = """
import os, sys, time
from pathlib import Path
from train.run_lock import hold
with hold(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    (path / "notes.txt").write_text("the user's own")
    return path


def test_a_second_process_is_refused_and_told_who_holds_the_folder(folder: Path):
    with hold(folder):
        said = json.loads((folder / "lock").read_text())
        assert datetime.now(UTC) - datetime.fromisoformat(said["started"]) < timedelta(minutes=1)
        sentence = (
            f"{folder} must be used by one process at a time, but process {os.getpid()} on {socket.gethostname()}, started "
            f"{said['started']}, holds it"
        )
        with pytest.raises(RuntimeError) as caught, hold(folder, patience_s=0.0):
            pass
        assert str(caught.value).startswith(sentence)
    with hold(folder, patience_s=0.0):  # and given back
        pass


def test_a_killed_process_keeps_nobody_out_even_if_a_fork_of_it_lives(folder: Path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(RuntimeError, match=f"process {holder.pid} on"), hold(folder, patience_s=0.0):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # still there
        with hold(folder, patience_s=0.0):
            assert json.loads((folder / "lock").read_text())["pid"] == os.getpid()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.kill()
        holder.wait()


def test_a_holder_that_is_just_ending_is_waited_for(folder: Path):
    held, ended = threading.Event(), threading.Event()

    def holder() -> None:
        with hold(folder):
            held.set()
            time.sleep(0.4)
            ended.set()

    thread = threading.Thread(target=holder)
    thread.start()
    held.wait()
    with hold(folder, patience_s=10.0):
        assert ended.is_set()
    thread.join()


def test_a_folder_that_the_lock_made_goes_with_it_and_no_other(tmp_path: Path, folder: Path):
    with hold(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run" / "lock").exists()
    assert not (tmp_path / "new" / "run").exists()
    with hold(folder):
        pass
    assert {path.name for path in folder.iterdir()} == {"lock", "notes.txt"}


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_nobodys(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The holder before removed it, with its empty folder, between our opening and our locking."""
    real, calls = fcntl.flock, []

    def removed_first(file, how: int) -> None:
        if not calls:
            (folder / "lock").unlink()
        calls.append(how)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with hold(folder):
        assert len(calls) == 2
        with pytest.raises(RuntimeError, match="one process at a time"), hold(folder, patience_s=0.0):
            pass


def test_where_locks_do_not_exist_the_run_goes_on_with_a_warning(folder: Path, monkeypatch, caplog):
    def refuse(file, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(folder):
        assert "cannot be locked (No locks available): nothing keeps a second run out" in caplog.text


def test_who_wrote_a_torn_line_is_still_a_holder(folder: Path):
    with hold(folder):
        (folder / "lock").write_text('{"host": "a')
        with pytest.raises(RuntimeError, match="but another process holds it"), hold(folder, patience_s=0.0):
            pass


def test_all_ranks_hear_that_rank_0_was_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def work(mesh) -> None:
        with hold_together(mesh, folder):
            pass

    assert try_ranks(3, work).errors == [None] * 3
    monkeypatch.setattr("train.run_lock.hold", lambda path, **how: hold(path, patience_s=0.0, **how))
    for held in (folder, folder / "checkpoints"):
        with hold(held):
            errors = try_ranks(3, work).errors
        assert [f"{held} must be used by one process at a time" in str(error) for error in errors] == [True] * 3
    assert {path.name for path in folder.iterdir()} == {"lock", "notes.txt"}


def test_a_run_holds_its_checkpoints_under_every_name_of_their_folder(tmp_path: Path, folder: Path):
    """They lie on a larger disk, and `checkpoints` is a link to it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "latest").touch()
    (folder / "checkpoints").symlink_to(disk)
    with hold_together(LocalMesh(torch.device("cpu")), folder):
        with pytest.raises(RuntimeError, match="one process at a time"), hold(disk, patience_s=0.0):
            pass
        with pytest.raises(RuntimeError, match="one process at a time"), hold(folder, patience_s=0.0):
            pass
    assert [path.name for path in disk.iterdir()] == ["latest"]
    with hold(disk, patience_s=0.0):
        pass


def test_a_folder_that_is_gone_does_not_hide_the_error_that_ends_the_run(tmp_path: Path):
    for reason in (None, KeyError("the reason")):
        with contextlib.suppress(KeyError), hold(tmp_path / "run"):
            shutil.rmtree(tmp_path / "run")
            if reason:
                raise reason


@pytest.mark.usefixtures("torch_as_it_was")
def test_a_second_run_on_a_folder_is_refused_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_shards(tmp_path / "shards", seed=1)
    run(tiny_config(tmp_path), ALONE)
    monkeypatch.setattr("train.run_lock.hold", lambda path, **how: hold(path, patience_s=0.0, **how))
    with hold(tmp_path / "run"):
        before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
        with pytest.raises(RuntimeError, match=f"process {os.getpid()} on .* holds it"):
            run(tiny_config(tmp_path, run={"steps": 5}), ALONE)
        assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before
    run(tiny_config(tmp_path, run={"steps": 5}), ALONE)
    assert [record["step"] for record in records(tmp_path)] == [3, 5]


def test_a_start_that_waited_takes_the_kernels_that_the_one_before_has_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_as_it_was
):
    """The one before writes them while this one waits for its end."""
    write_shards(tmp_path / "shards", seed=1)
    kept, held = {"seconds": {}, "tiles": {"a GPU: op": 1}}, contextlib.ExitStack()
    held.enter_context(hold(tmp_path / "run"))

    def ends(seconds: float) -> None:
        (tmp_path / "run" / "kernels.json").write_text(json.dumps(kept))
        held.close()

    monkeypatch.setattr(run_lock, "time", SimpleNamespace(monotonic=time.monotonic, sleep=ends))
    run(tiny_config(tmp_path), ALONE)
    assert json.loads((tmp_path / "run" / "kernels.json").read_text())["tiles"] == kept["tiles"]
