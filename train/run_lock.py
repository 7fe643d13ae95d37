"""One writer at a time: a run folder belongs to the process that holds the lock on its file `lock`.

Owns that file, and a second one in the folder of checkpoints, which may lie elsewhere (a link to a larger disk) and be named by that
place: a run holds both, what only removes checkpoints the second. The lock is the kernel's (flock): it ends with the process that
holds it, however that ends, so a file that is left behind means nothing. Only while a process holds it must the file stay: remove it by
hand, and the next process locks a new one and writes beside the first. Called by train/run.py (rank 0, from before the kernels are chosen
to the end of the run) and by the commands of train/checkpoint_tool.py that remove something.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from train.run_folder import RunFolder, explained
from train.together import Ranks, on_rank_zero

logger = logging.getLogger(__name__)

LOCK_FILE = "lock"
PATIENCE_S = 3.0  # a process that was killed a moment ago may still be giving its memory back
POLL_S = 0.1


@contextlib.contextmanager
def hold_together(ranks: Ranks, folder: Path) -> Iterator[None]:
    """Both locks of the run folder `folder` for all ranks of a run: rank 0 holds them, and all hear if it cannot.

    Raises:
        RuntimeError: see `hold`.
    """
    with contextlib.ExitStack() as held:
        on_rank_zero(ranks, lambda: held.enter_context(hold(folder)))
        on_rank_zero(ranks, lambda: held.enter_context(hold(RunFolder(folder).checkpoints, leave_file=False)))
        yield


@contextlib.contextmanager
def hold(folder: Path, *, patience_s: float = PATIENCE_S, leave_file: bool = True) -> Iterator[None]:
    """Holds the folder `folder`, which is made if it is not there, and removed again if nothing else was put into it.

    leave_file: false removes the file again at the end, whatever else is in the folder.

    Raises:
        RuntimeError: another process holds it (says which, where and since when), or the folder cannot be written.
    """
    path = folder / LOCK_FILE
    with explained(folder):
        file = _acquire(path, patience_s)
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": _now()}) + "\n")
        file.flush()
        os.fsync(file.fileno())  # ranks on other nodes read it (train/crash.py)
    # a worker that was forked from this process shares the lock, and would keep it if this process were killed
    os.register_at_fork(after_in_child=file.close)
    try:
        yield
    finally:
        # the folder may be gone, with what it was held for: that must not hide the error that ends the run
        with contextlib.suppress(OSError):
            is_alone = os.listdir(folder) == [LOCK_FILE]
            if is_alone or not leave_file:
                path.unlink()
            if is_alone:
                folder.rmdir()
        file.close()


def _acquire(path: Path, patience_s: float) -> TextIO:
    deadline = time.monotonic() + patience_s
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+", encoding="utf-8")  # keeps what the holder has written
        except FileNotFoundError:  # the holder has just removed the empty folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            file.close()
            if time.monotonic() >= deadline:
                raise RuntimeError(
                    f"{path.parent} must be used by one process at a time, but {holder} holds it: wait until that has ended, end it, "
                    "or choose another run.dir"
                ) from None
            time.sleep(POLL_S)
            continue
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): nothing keeps a second run out of the folder", path, error.strerror
            )
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()  # the holder removed the file between our opening and locking it: what we hold is nobody's


def _holder(file: TextIO) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        file.seek(0)
        said = json.loads(file.read())
        return f"process {said['pid']} on {said['host']}, started {said['started']},"
    return "another process"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
