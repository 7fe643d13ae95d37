"""The four parts of bench_exchange.py: each runs its workers on a pool and makes rows of the table of what they give back.

Owns the bars and the sizes of the sweeps. Does not own what a worker measures (workers.py) nor the processes (tests/pool.py).
"""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from benchmarks.parallel import messages, trace, workers
from benchmarks.parallel.placing import Way
from benchmarks.parallel.subjects import FEED_FORWARDS, HEADS, LENGTHS, FeedForward, Heads, SwitchAll, place
from benchmarks.parallel.table import Bar, Row
from benchmarks.parallel.timing import as_milliseconds, median_ratio, slowest
from benchmarks.parallel.workers import DEEPSPEED, NO_EXCHANGE, OURS, Noted, Timed
from parallel.volume import ExpertGroup, choose_exchange

TIMEOUT = 540.0  # seconds for one job of a pool; 1B on 4 processes takes 60 on an idle 2-core machine
CHUNKS = (1, 2, 4)
LABELS = ("value", "output")


class Processes(Protocol):
    """tests.pool.Pool."""

    size: int

    def run(self, function: Any, *args: Any, timeout: float) -> list[Any]: ...


@dataclass(frozen=True)
class Settings:
    """repetitions: of every timed step, after the warm-up. traces: the folder for chrome traces."""

    repetitions: int
    traces: Path


def deepspeed(pool: Processes, settings: Settings) -> Iterator[Row]:
    """Time and bytes of sigma-MoE beside DeepSpeed's layer. Bars: 3 times faster with k of 4 and more, 1.5 times with 1."""
    for subject in FEED_FORWARDS:
        ranks = pool.run(workers.beside_deepspeed, subject, settings.repetitions, timeout=TIMEOUT)
        case = f"{subject.name}, {subject.length} tokens a rank"
        bar = Bar("at least", 3.0 if subject.top_k >= 4 else 1.5)
        yield _time_row(case, pool.size, "DeepSpeed's time to ours", ranks, (OURS, DEEPSPEED), bar)
        measured = "DeepSpeed's time to that of our experts without any exchange, the most that an exchange can reach"
        yield _time_row(case, pool.size, measured, ranks, (NO_EXCHANGE, DEEPSPEED))
        yield _bytes_row(case, pool.size, "DeepSpeed's bytes to ours", ranks, (OURS, DEEPSPEED))


def heads(pool: Processes, settings: Settings) -> Iterator[Row]:
    """Bytes of SwitchHead's exchanges by the formula, and beside one row for each choice. Bars for H k = 8 on 2 and on 4 ranks."""
    for subject in HEADS:
        ranks = pool.run(workers.chosen_and_sent, subject, timeout=TIMEOUT)
        formula = by_formula(subject, ranks)
        right = sum(rank.sent == expected for rank, expected in zip(ranks, formula, strict=True)) / len(ranks)
        totals = tuple(sum(sum(one.values()) for one in of) for of in ([rank.sent for rank in ranks], formula))
        measured = "share of ranks whose every counter is the formula's"
        yield Row(subject.name, pool.size, measured, _in_bytes(*totals), right, Bar("at least", 1.0))
        for label in LABELS:
            choices, bank = [rank.choices[label] for rank in ranks], subject.bank(label)
            ours = sum(sum(one.values()) for one in messages.sent(choices, bank))
            ours += pool.size * messages.counts(routings=1, ranks=pool.size)
            each = sum(messages.undeduplicated(choices, bank))
            bar = Bar("at most", 1 / 3 if pool.size == 2 else 0.55)
            measured = "bytes to those of one row for each choice"
            yield Row(f"{subject.name}, {label}", pool.size, measured, _in_bytes(ours, each), ours / each, bar)


def by_formula(subject: Heads, ranks: Sequence[Noted]) -> list[Counter[tuple[str, str, bool]]]:
    """What the counters of each rank must say, from the choices of all."""
    found: list[Counter[tuple[str, str, bool]]] = [Counter() for _ in ranks]
    for label in LABELS:
        sent = messages.sent([rank.choices[label] for rank in ranks], subject.bank(label))
        for expected, of_rank in zip(found, sent, strict=True):
            for (verb, backward), size in of_rank.items():
                expected["" if verb == "plan" else label, verb, backward] += size
    for expected in found:
        expected["", "plan", False] += messages.counts(routings=len(LABELS), ranks=len(ranks))
    return found


def overlap(pool: Processes, settings: Settings) -> Iterator[Row]:
    """A SwitchAll block with exchanges under way while it computes, and with each waited for at once; whole and in parts."""
    subject = SwitchAll()
    ways = [Way(chunks=chunks, overlap=under_way) for chunks in CHUNKS for under_way in (True, False)]
    ranks = pool.run(workers.in_all_ways, subject, ways, settings.repetitions, timeout=TIMEOUT)
    for chunks in CHUNKS:
        way, waiting = Way(chunks=chunks), Way(chunks=chunks, overlap=False)
        case = f"{subject.name}, {subject.sequences * subject.length} tokens a rank, {chunks} part{'s' * (chunks > 1)}"
        yield _time_row(case, pool.size, "time without overlap to with", ranks, (way.name, waiting.name))
        if chunks > 1:
            yield _time_row(case, pool.size, "time in one part to this, with overlap", ranks, (way.name, Way().name))
        shares = (f"{_share_held(ranks, way.name):.0%}", f"{_share_held(ranks, waiting.name):.0%}")
        yield Row(case, pool.size, "share of a step held by the exchange, with and without overlap", shares)
        with_it, without = (_traced(pool, subject, one, settings) for one in (way, waiting))
        shares = (f"{with_it.both / with_it.exchange:.0%}", f"{without.both / without.exchange:.0%}")
        yield Row(case, pool.size, "share of an exchange under which a rank computes, with and without overlap", shares)


def carriers(pool: Processes, settings: Settings) -> Iterator[Row]:
    """Tokens beside weights at several numbers of tokens, and what `auto` makes of the bytes."""
    for length in LENGTHS:
        subject = replace(FEED_FORWARDS[0], length=length)
        ways = [Way("tokens"), Way("weights")]
        ranks = pool.run(workers.in_all_ways, subject, ways, settings.repetitions, timeout=TIMEOUT)
        names = (ways[0].name, ways[1].name)
        case, chosen = f"{subject.name}, {length} tokens a rank", _auto(subject, pool.size)
        yield _time_row(case, pool.size, "time with weights to tokens", ranks, names)
        yield _bytes_row(case, pool.size, f"bytes with weights to tokens; auto takes {chosen}", ranks, names)


def _auto(subject: FeedForward, ep_size: int) -> str:
    (bank,) = subject.config().banks(place(subject.d_model, "sigma_moe"))
    group = ExpertGroup(ep_size, node_size=ep_size)
    return choose_exchange(bank, group, tokens=subject.length, wire_bytes=4).mode


Names = tuple[str, str]  # of what was timed: Switchyard's, then what stands beside it


def _time_row(
    case: str, processes: int, measured: str, ranks: Sequence[Timed], names: Names, bar: Bar | None = None
) -> Row:
    seconds = slowest([rank.seconds for rank in ranks])
    ours, beside = (seconds[name] for name in names)
    values = (as_milliseconds(ours), as_milliseconds(beside))
    return Row(case, processes, measured, values, median_ratio(ours, beside), bar)


def _bytes_row(case: str, processes: int, measured: str, ranks: Sequence[Timed], names: Names) -> Row:
    """Means over the ranks, of one forward and backward pass."""
    ours, beside = (statistics.mean(rank.sent[name] for rank in ranks) for name in names)
    return Row(case, processes, measured, (f"{ours / 1e6:.2f} MB", f"{beside / 1e6:.2f} MB"), beside / ours)


def _in_bytes(ours: int, beside: int) -> tuple[str, str]:
    return f"{ours:,} B", f"{beside:,} B"


def _share_held(ranks: Sequence[Timed], name: str) -> float:
    """Of a step's seconds those that the rank's main thread spent in collectives and waits: the mean over ranks."""
    return statistics.mean(rank.held[name] / statistics.mean(rank.seconds[name]) for rank in ranks)


def _traced(pool: Processes, subject: SwitchAll, way: Way, settings: Settings) -> trace.Overlap:
    """All ranks together."""
    settings.traces.mkdir(parents=True, exist_ok=True)
    paths = pool.run(workers.traced, subject, way, str(settings.traces.resolve()), timeout=TIMEOUT)
    first, *others = (trace.read(path) for path in paths)
    return sum(others, start=first)
