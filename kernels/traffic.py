"""Bytes of launches and passes, and a line of the table of bytes in kernels/README.md.

Called by: kernels/<op>/traffic.py, which counts them, benchmarks/gpu/kernel_bench.py and benchmarks/kernels/compile_table.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes of one launch, each element once.

    again: rows of a table that several copies read, for each but the first. asked: what the programs load, elements that come from the
    cache included; 0 where nobody counts it.
    """

    read: int
    written: int
    again: int = 0
    asked: int = 0

    @property
    def total(self) -> int:
        """With no row of a table found in a cache that another copy has read."""
        return self.read + self.written + self.again


@dataclass(frozen=True)
class Pass:
    """A forward or backward pass. bound: the least bytes that any implementation could move."""

    launches: Mapping[str, Traffic]
    bound: int

    @property
    def total(self) -> int:
        return sum(each.total for each in self.launches.values())


@dataclass(frozen=True, kw_only=True)
class Example:
    """The bytes of all launches of one pass (`part`) over a batch, and the least that any kernel could move."""

    shape: str
    part: str
    tokens: int
    read: int
    written: int
    bound: int


def examples(shape: str, passes: Mapping[str, Pass], *, tokens: int) -> list[Example]:
    """One for each pass."""
    found = []
    for part, each in passes.items():
        written = sum(launch.written for launch in each.launches.values())
        read = each.total - written
        found.append(Example(shape=shape, part=part, tokens=tokens, read=read, written=written, bound=each.bound))
    return found
