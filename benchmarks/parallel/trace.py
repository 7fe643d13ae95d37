"""How long a process computed while one of its exchanges was under way, read off the chrome trace of a torch profiler.

An exchange is a `gloo:` event, which gloo's own threads record from its start to its end; computing is any `aten::` operator of any
thread. Waiting is neither. Pure: knows nothing of the layers. Called by bench_exchange.py.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

Interval = tuple[float, float]


@dataclass(frozen=True)
class Overlap:
    """Seconds with an exchange under way, with an operator running, and with both."""

    exchange: float
    compute: float
    both: float

    def __add__(self, other: "Overlap") -> "Overlap":
        return Overlap(self.exchange + other.exchange, self.compute + other.compute, self.both + other.both)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as disjoint intervals in ascending order."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def common(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """The points in both; each argument disjoint and ascending, as `union` gives them."""
    found, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        begin, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if begin < end:
            found.append((begin, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def read(path: Path) -> Overlap:
    """Of one process's trace, whose times are microseconds.

    Raises:
        RuntimeError: the trace has no exchange in it.
    """
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    exchanges, operators = (
        union((event["ts"], event["ts"] + event["dur"]) for event in events if event["name"].startswith(prefix))
        for prefix in ("gloo:", "aten::")
    )
    if not exchanges:
        raise RuntimeError(f"a trace must hold gloo's exchanges, but {path} has none: the profiler saw no gloo: event")
    parts = (exchanges, operators, common(exchanges, operators))
    return Overlap(*(length(part) * 1e-6 for part in parts))
