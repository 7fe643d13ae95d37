"""Which rank is slow: the time that each rank works, compared with the others' over the last windows of logged steps.

What is measured is the host's time of a training step outside collectives and outside waits for them (parallel/ledger.py): reading the
rows, forward and backward between the exchanges. The optimizer's update is not in it: DeepSpeed's is made inside a wait. On a GPU the
host only queues kernels, so this finds a node whose CPU or disk is slow; a slow GPU shows as everyone's wait.

A rank is compared with the median of the others, in each window by itself, so a slow node is found as long as it is the smaller part; how
much ranks and windows differ anyway is the unit. Medians throughout: one paused window, or a rank that is far out, moves neither. A rank
whose experts get more rows works longer too: that is not its machine's fault, and "expert load" beside it tells.

Owns the figures and when a line is due. Called by train/run.py on every rank.
"""

import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.engine import World

WINDOWS = 8  # logged windows that are looked at together; no line before there are so many
# In 1,000 runs of 100 windows of equal ranks whose windows differ by 5 or 10 %, these two give no line, and 3 and 3 do in 5 (2 ranks).
# Where what differs lasts (5 %, correlated by 0.8 with the window before), 3 % of the runs of 2 ranks have a line; with 3 and 3 it is 54 %.
SLOW_Z = 5.0
IN_A_ROW = 5  # windows in which a rank is slow before a line says so
LEAST_SPREAD = 0.02  # of the others' time, however equal they are: who is said to be slow is so by 10 % at least
MAD_TO_DEVIATION = 1.4826  # the standard deviation of a normal distribution, in median absolute deviations


@dataclass(frozen=True)
class Comparison:
    """What the windows say of each rank. seconds_R, others_R: of a step, the rank's and those of the median of the others, each the
    median over the windows. z_R: by how much the rank's time is longer (median over the windows), in spreads. newest_R: in the last window.
    """

    seconds_R: Tensor
    others_R: Tensor
    z_R: Tensor
    newest_R: Tensor


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
        self._windows: deque[Tensor] = deque(maxlen=WINDOWS)
        self._in_a_row = torch.zeros(world.world_size, dtype=torch.int64)

    def record(self, spent: Spent, *, say: Callable[[str], None]) -> dict[str, Any]:
        """What metrics.jsonl has of the window that ends here: the rank with the largest z. {} if there is no other rank.

        Every rank calls it. Says so when ranks have become slow. One all-reduce of 8 bytes for each rank: each fills its own place.
        """
        size = self._world.world_size
        if size == 1:
            return {}
        mine = torch.zeros(size, dtype=torch.float64)
        mine[self._world.rank] = spent.worked / spent.steps
        self._windows.append(self._world.sum(mine).cpu())
        found = compare(torch.stack(list(self._windows)))
        slow_R = (found.z_R > SLOW_Z) & (found.newest_R > SLOW_Z) & (len(self._windows) == WINDOWS)
        self._in_a_row = torch.where(slow_R, self._in_a_row + 1, 0)
        new = (self._in_a_row == IN_A_ROW).nonzero().flatten().tolist()
        for line in self._lines(found, new) if new else ():
            say(line)
        rank = int(found.z_R.argmax())
        seconds, others, z = (float(values[rank]) for values in (found.seconds_R, found.others_R, found.z_R))
        return {"straggler": {"rank": rank, "z": z, "seconds": seconds, "others": others}}

    def _lines(self, found: Comparison, ranks: list[int]) -> list[str]:
        """What to say of ranks that have become slow, once for each time: a line for each host."""
        hosts: list[str] = self._world.all_gather_object(socket.gethostname())
        lines = []
        for host in dict.fromkeys(hosts[rank] for rank in ranks):
            those = [rank for rank in ranks if hosts[rank] == host]
            one, (slowest, *_) = len(those) == 1, sorted(those, key=lambda rank: -float(found.z_R[rank]))
            lines.append(
                f"rank{'' if one else 's'} {', '.join(map(str, those))} on {host} {'is' if one else 'are'} slow: rank {slowest} works "
                f"{found.seconds_R[slowest]:.3f} s for a step where the others work {found.others_R[slowest]:.3f} s, "
                f"{found.z_R[slowest]:.1f} times the usual spread more, in {IN_A_ROW} windows in a row"
            )
        return lines


def compare(windows_WR: Tensor) -> Comparison:
    """windows_WR: by window the seconds of each rank, of two ranks at least, the newest last. The lower of two middle values is the median
    of the others: of 4 ranks of which 2 are slow, a slow one is compared with a quick one.
    """
    num_ranks = windows_WR.shape[1]
    sorted_WR = windows_WR.clamp_min(1e-9).sort(dim=1).values
    middle = (num_ranks - 2) // 2  # of the others' num_ranks - 1
    low_W1, next_W1 = sorted_WR[:, middle : middle + 1], sorted_WR[:, middle + 1 : middle + 2]
    others_WR = torch.where(windows_WR <= low_W1, next_W1, low_W1)
    excess_WR = windows_WR / others_WR - 1.0
    level_R = excess_WR.quantile(0.5, dim=0)
    in_time = float((excess_WR - level_R).abs().quantile(0.5))  # of each rank about its own level
    among_ranks = float((level_R - level_R.median()).abs().median())
    spread = max(MAD_TO_DEVIATION * max(in_time, among_ranks), LEAST_SPREAD)
    return Comparison(
        seconds_R=windows_WR.quantile(0.5, dim=0),
        others_R=others_WR.quantile(0.5, dim=0),
        z_R=level_R / spread,
        newest_R=excess_WR[-1] / spread,
    )
