"""A run that fails leaves crash.json in its folder: why, where, and how to go on. One file, of the first rank to fail.

`python -m train.crash RUN_DIR` prints it, the traceback first.

Owns that file: what is in it, which rank writes it, and that a new start moves it aside. What is found before the first step (a wrong
config, no checkpoint that is whole) leaves none: nothing had begun. Nor does Ctrl-C, nor a process that is killed: the ranks that then
miss it write. Entered by train/build.py inside the mesh, where the watchdog has already told broken connections from their reasons, and
inside the run lock of train/run.py: no other start can have the folder before rank 0 has written.
"""

import argparse
import contextlib
import itertools
import json
import logging
import os
import re
import shlex
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from parallel.config import ProcessInfo
from train import checkpoint_folder
from train.run_folder import RunFolder
from train.run_lock import LOCK_FILE

logger = logging.getLogger(__name__)

# How long the ranks that were told of an error leave the file to the rank that failed. That one may itself wait 5 s until all have
# heard it (LEAVE_S of parallel/watchdog.py).
PATIENCE_S = 8.0
POLL_S = 0.1


class CrashFile:
    """One process's part in it. It writes nothing before `begin`: until then the folder may be another run's."""

    def __init__(self, folder: RunFolder, info: ProcessInfo) -> None:
        self._folder, self._info = folder, info
        self._began = False
        self._holder: str | None = None
        self.step, self.position = 0, 0

    def begin(self) -> None:
        """The run folder is this run's, and `set_aside` was called. Remembers who holds its lock: rank 0 of this start."""
        self._began = True
        self._holder = self._lock()

    def at(self, *, step: int, position: int) -> None:
        """Steps done and the data position."""
        self.step, self.position = step, position

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """An error that comes out of it is written, if it is this rank's to tell, and goes on."""
        try:
            yield
        except Exception as error:
            sentence = _sentence(error)
            if not self._is_of_another_rank(sentence):
                self._write(sentence, "".join(traceback.format_exception(error)))
            elif not self._comes():
                self._write(sentence, None)
            raise

    def hang(self, sentence: str) -> None:
        """Called by the watchdog, which then ends the process. The stacks of all threads are in the folder hang/."""
        self._write(sentence, None)

    def _is_of_another_rank(self, sentence: str) -> bool:
        """It has been told to this rank, with the number of the rank that failed: that one writes, with its traceback."""
        named = re.search(r"\(rank (\d+) of \d+\)$", sentence)
        return named is not None and int(named.group(1)) != self._info.rank

    def _comes(self) -> bool:
        """Waits for another rank's file. False: that rank cannot write either (its mount is gone), so this one tells what it heard."""
        deadline = time.monotonic() + PATIENCE_S
        while self._began and not (comes := _is_whole(self._folder.crash)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return not self._began or comes

    def _write(self, reason: str, trace: str | None) -> None:
        """Aside, forced to disk, then linked: the file is whole or not there, and a second rank cannot replace the first one's."""
        if not self._began:
            return
        path = self._folder.crash
        aside = path.with_name(f"{path.name}.{self._info.rank}.partial")
        try:
            try:
                with aside.open("w", encoding="utf-8") as file:
                    file.write(json.dumps(self._content(reason, trace), indent=2) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                if self._lock() != self._holder:
                    logger.warning("%s is not written: another start has the folder by now", path)
                elif not _is_whole(path):
                    path.unlink(missing_ok=True)  # what a power cut has left of one
                    _link(aside, path)
            finally:
                aside.unlink(missing_ok=True)
        except OSError as error:  # what ends the run must not be hidden by this
            logger.warning("%s cannot be written (%s)", path, error.strerror or error)

    def _lock(self) -> str | None:
        """What the run's lock says of its holder, also after that has ended; None without one."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return (self._folder.path / LOCK_FILE).read_text(encoding="utf-8")
        return None

    def _content(self, reason: str, trace: str | None) -> dict[str, Any]:
        info = self._info
        checkpoint = _next_checkpoint(self._folder.checkpoints)
        start = f"{info.world_size} process(es) by {info.launcher}, each: {shlex.join(sys.orig_argv)}"
        goes_on = "begins anew: there is no checkpoint"
        if checkpoint is not None:
            goes_on = f"goes on from {checkpoint}, or from the one before it if that is damaged"
        return {
            "reason": reason,
            "rank": info.rank,
            "world_size": info.world_size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": self.step,
            "position": self.position,
            "command": start,
            "folder": os.getcwd(),
            "checkpoint": checkpoint,
            "resume": f"the same command in the same folder {goes_on}",
            "traceback": None if trace is None else trace.splitlines(),
        }


def set_aside(folder: RunFolder) -> Path | None:
    """Moves the crash.json of an earlier start to crash-001.json and so on; gives its new path, None if there was none. Rank 0."""
    for torn in folder.path.glob(f"{folder.crash.name}.*.partial"):
        torn.unlink()  # of a rank that was killed while it wrote
    if not folder.crash.exists():
        return None
    numbered = (folder.path / f"crash-{number:03d}.json" for number in itertools.count(1))
    aside = next(path for path in numbered if not path.exists())
    folder.crash.rename(aside)
    return aside


def _link(aside: Path, path: Path) -> None:
    """Gives the written file its name, unless another rank was first."""
    try:
        os.link(aside, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            aside.rename(path)


def _is_whole(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    return False


def _next_checkpoint(folder: Path) -> str | None:
    """Which one a start would try first; its files are not read."""
    with contextlib.suppress(OSError, RuntimeError):
        names = checkpoint_folder.candidates(folder)
        return str(folder / names[0]) if names else None
    return None


def _sentence(error: Exception) -> str:
    return (
        str(error) if type(error) in (RuntimeError, ValueError) and str(error) else f"{type(error).__name__}: {error}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what ended a run. Exit code 1 where no crash.json is."""
    parser = argparse.ArgumentParser(
        prog="python -m train.crash", description="Says why a run failed, from its crash.json."
    )
    parser.add_argument("folder", metavar="RUN_DIR", type=Path)
    path = RunFolder(parser.parse_args(argv).folder).crash
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        print(f"error: {path} cannot be read ({error.strerror})", file=sys.stderr)
        return 1
    except ValueError:
        told = None
    if not isinstance(told, dict):
        print(
            f"error: {path} must be a whole JSON object, but is torn: see what the ranks have printed", file=sys.stderr
        )
        return 1
    for line in told["traceback"] or []:
        print(line)
    print(f"rank {told['rank']} of {told['world_size']} on {told['host']}, after step {told['step']}: {told['reason']}")
    print(f"to go on: {told['resume']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
