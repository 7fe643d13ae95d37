"""Ranks that start in a second: the test's side of warm_main.py.

Owns the process that forks them and each rank's life as the test sees it (start, signal, exit code). What a rank does is the real
launcher/main.py. Called by the drills.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from tests.end_to_end.conftest import MAIN, free_port

WARM_MAIN = Path(__file__).with_name("warm_main.py")
START_S = 120  # a busy machine needs half a minute for the imports
LIMIT_S = 240  # of each rank's life
POLL_S = 0.01


class Warm:
    """The process that has made the imports."""

    def __init__(self, folder: Path) -> None:
        self._log = (folder / "warm.log").open("wb")
        self._pipe, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, str(WARM_MAIN), str(theirs.fileno())],
            env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._started = False

    def ask(self, request: dict[str, Any]) -> Any:
        if not self._started:
            assert self._pipe.poll(START_S), f"the imports take more than {START_S} s"
            self._pipe.recv_bytes()
            self._started = True
        self._pipe.send_bytes(json.dumps(request).encode())
        return json.loads(self._pipe.recv_bytes())

    def stop(self) -> None:
        self._pipe.close()  # it kills what still runs
        try:
            self._process.wait(20 if self._started else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


@dataclass
class Rank:
    """One process of a job."""

    warm: Warm
    pid: int
    log: Path
    code: int | None = None

    def ended(self) -> bool:
        if self.code is None:
            self.code = self.warm.ask({"poll": self.pid})
        return self.code is not None

    def wait(self, seconds: float) -> int | None:
        """The exit code; None if it has not ended in so many seconds."""
        deadline = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return self.code

    def signal(self, number: int) -> None:
        if not self.ended():  # else its id may belong to somebody else
            os.kill(self.pid, number)

    def said(self) -> str:
        """Its output and errors."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


@dataclass
class Job:
    """The ranks of one start of a run."""

    ranks: list[Rank] = field(default_factory=list)

    def wait(self, seconds: float) -> list[int | None]:
        """The exit codes; None for a rank that has not ended in so many seconds."""
        deadline = time.monotonic() + seconds
        return [rank.wait(deadline - time.monotonic()) for rank in self.ranks]

    def finish(self) -> None:
        """All must end with exit code 0."""
        codes = self.wait(LIMIT_S)
        assert codes == [0] * len(codes), f"exit codes {codes}\n" + "\n".join(rank.said() for rank in self.ranks)

    def kill(self) -> None:
        for rank in self.ranks:
            rank.signal(signal.SIGKILL)
        self.wait(20)


def start(
    warm: Warm,
    arguments: Sequence[str],
    *,
    ranks: int,
    logs: Path,
    script: Path = MAIN,
    environment: Mapping[str, str] | None = None,
    faults: Sequence[dict[str, Any] | None] = (),
    file_bytes: int | None = None,
    powerless: bool = False,
) -> Job:
    """launcher/main.py on so many ranks, as torchrun would start them.

    script: what runs main.py in its place, with a fault. environment: variables more. faults: of each rank (faults.py). file_bytes: the
    longest file that a rank may write. powerless: without root's capabilities, so that permissions bind it too.
    """
    job, port = Job(), free_port()
    logs.mkdir(exist_ok=True)
    for rank in range(ranks):
        log = logs / f"{len(list(logs.iterdir())):04d}_rank{rank}.log"
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        request = {
            "command": [str(script), *arguments],
            "environment": {name: str(value) for name, value in place.items()} | dict(environment or {}),
            "log": str(log),
            "faults": faults[rank] if faults else None,
            "file_bytes": file_bytes,
            "powerless": powerless,
            "limit_s": LIMIT_S,
        }
        job.ranks.append(Rank(warm, warm.ask({"start": request}), log))
    return job
