"""Which rank is slow: the time that each rank works, compared with the others' over the last windows of logged steps.

What is measured is the host's time of a training step outside collectives and outside waits for them (parallel/ledger.py): reading the
rows, forward and backward between the exchanges. The optimizer's update is not in it: DeepSpeed's is made inside a wait. On a GPU the
host only queues kernels, so this finds a node whose CPU or disk is slow; a slow GPU shows as everyone's wait.

Owns the figures and when a line is due. Called by train/run.py on every rank.
"""

import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import torch

from train.engine import World

WINDOWS = 8  # logged windows that are looked at together
SLOW_Z = 3.0
IN_A_ROW = 3  # windows in which a rank is slow before a line says so
# The least spread that the others are taken to have, as a part of their mean: with z above 3 a rank is slower by 6 % at least,
# however equal the others are. The z of a rank among n that counts in its own spread could never pass sqrt(n - 1).
LEAST_SPREAD = 0.02


@dataclass(frozen=True)
class Slowest:
    """The slowest rank of the last window. z: its mean over the windows against the others', in standard deviations of the others'.

    seconds, others: of a step, that rank's mean and the others'. in_a_row: windows in which it was this rank and z above 3.
    """

    rank: int
    z: float
    seconds: float
    others: float
    in_a_row: int

    def record(self) -> dict[str, float]:
        """For metrics.jsonl."""
        return {"rank": self.rank, "z": self.z, "seconds": self.seconds, "others": self.others}


class Spent:
    """This rank's seconds in the steps since the last record, without its evaluation and the checkpoints in between.

    seconds: of the steps. worked: without what the rank waited for others in them.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.steps, self.seconds, self.worked = 0, 0.0, 0.0
        self._began, self._waited = 0.0, 0.0

    def begin(self, now: float) -> None:
        self._began, self._waited = now, self._world.waited()

    def end(self, now: float) -> None:
        self.steps += 1
        self.seconds += now - self._began
        self.worked += now - self._began - (self._world.waited() - self._waited)


class Stragglers:
    """Remembers the last windows; the same on every rank."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._windows: deque[list[float]] = deque(maxlen=WINDOWS)
        self._last: Slowest | None = None

    def record(self, spent: Spent, *, say: Callable[[str], None]) -> dict[str, Any]:
        """What metrics.jsonl has of the window that ends here; says so when a rank has become slow. Every rank calls it."""
        slowest = self.window(spent.worked / spent.steps)
        if slowest is None:
            return {}
        if line := self.line(slowest):
            say(line)
        return {"straggler": slowest.record()}

    def window(self, seconds: float) -> Slowest | None:
        """seconds: that this rank worked, for a step of the window that ends here. None: there is no other rank.

        Every rank calls it: one all-reduce of 8 bytes for each rank, in which each fills its own place.
        """
        size = self._world.world_size
        if size == 1:
            return None
        mine = torch.zeros(size, dtype=torch.float64)
        mine[self._world.rank] = seconds
        self._windows.append(self._world.sum(mine).tolist())
        self._last = slowest_of(list(self._windows), before=self._last)
        return self._last

    def line(self, slowest: Slowest) -> str | None:
        """What to say, once for each time that a rank becomes slow; the ranks then tell their hosts."""
        if slowest.in_a_row != IN_A_ROW:
            return None
        host: Any = self._world.all_gather_object(socket.gethostname())[slowest.rank]
        return (
            f"rank {slowest.rank} on {host} is slow: it works {slowest.seconds:.3f} s for a step where the others work "
            f"{slowest.others:.3f} s, {slowest.z:.1f} standard deviations more, in {IN_A_ROW} windows in a row"
        )


def slowest_of(windows: list[list[float]], *, before: Slowest | None) -> Slowest:
    """windows: by window the seconds of each rank (at least two), the newest last. before: the answer of the window before."""
    newest = windows[-1]
    rank = max(range(len(newest)), key=lambda r: newest[r])
    seconds = fmean(window[rank] for window in windows)
    others = [value for window in windows for r, value in enumerate(window) if r != rank]
    mean = fmean(others)
    spread = max(pstdev(others), LEAST_SPREAD * mean)
    z = (seconds - mean) / spread if spread > 0 else 0.0
    was = before.in_a_row if before is not None and before.rank == rank else 0
    return Slowest(rank, z, seconds, mean, was + 1 if z > SLOW_Z else 0)
