"""Work at which one rank may fail and of which all must hear: every rank then ends with that rank's sentence.

Without it the others would wait in the next collective until the connection breaks, and bury the reason. Owns when the ranks compare
notes; what they then raise is the mesh's (parallel/mesh.py). Called by train/run.py and the modules beside it, by all ranks alike.
"""

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

Result = TypeVar("Result")
Item = TypeVar("Item")


class Ranks(Protocol):
    """What is asked of the mesh."""

    @property
    def rank(self) -> int: ...
    def raise_together(self, error: Exception | None) -> None: ...


def on_every_rank(ranks: Ranks, work: Callable[[], Result]) -> Result:
    """Runs `work`, in which no collective may be, on this rank; if it fails on any rank, all raise that rank's error.

    One `raise_together`: an all-reduce of 4 bytes when nothing failed.
    """
    try:
        result = work()
    except Exception as error:
        ranks.raise_together(error)
        raise
    ranks.raise_together(None)
    return result


def on_rank_zero(ranks: Ranks, work: Callable[[], Result]) -> Result | None:
    """Like `on_every_rank`, but only rank 0 works; the others get None."""
    return on_every_rank(ranks, lambda: work() if ranks.rank == 0 else None)


def read_together(ranks: Ranks, items: Iterator[Item]) -> Iterator[Item]:
    """The items of this rank, of which every rank has as many; if the reading fails on any rank, all raise that rank's error."""
    while (item := on_every_rank(ranks, lambda: next(items, None))) is not None:
        yield item
