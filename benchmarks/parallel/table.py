"""The one table of bench_exchange.py: its rows, what a row must reach, and which did not.

Pure: knows nothing of what is measured. Called by parts.py, which makes rows, and by bench_exchange.py, which prints them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

HEADER = "| case | processes | measured | Switchyard | beside it | ratio | bar | |\n|---|---|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Bar:
    """The ratio must be `at_least` or `at_most` the limit, the limit included."""

    kind: Literal["at least", "at most"]
    limit: float

    def met(self, ratio: float) -> bool:
        return ratio >= self.limit if self.kind == "at least" else ratio <= self.limit

    def __str__(self) -> str:
        return f"{self.kind} {self.limit:.3g}"


@dataclass(frozen=True)
class Row:
    """One line. values: of Switchyard and of what stands beside it, with units; ratio: as `measured` says, None where there is none."""

    case: str
    processes: int
    measured: str
    values: tuple[str, str]
    ratio: float | None = None
    bar: Bar | None = None

    @property
    def missed(self) -> bool:
        return self.bar is not None and (self.ratio is None or not self.bar.met(self.ratio))

    @property
    def number(self) -> str:
        return "" if self.ratio is None else f"{self.ratio:.3g}"

    def __str__(self) -> str:
        verdict = "" if self.bar is None else "**missed**" if self.missed else "met"
        cells = [
            self.case,
            str(self.processes),
            self.measured,
            *self.values,
            self.number,
            str(self.bar or ""),
            verdict,
        ]
        return f"| {' | '.join(cells)} |"


def as_table(rows: Iterable[Row]) -> str:
    return "\n".join([HEADER, *map(str, rows)])


def missed(rows: Iterable[Row]) -> list[str]:
    """A sentence for each row that does not reach its bar."""
    return [
        f"{row.case} on {row.processes} processes, {row.measured}: the ratio must be {row.bar}, but it is {row.number or 'unknown'}"
        for row in rows
        if row.missed
    ]
