"""Which source each row of a mixture comes from. Pure arithmetic on the data position, no files.

Row p is row n = p div streams of stream p mod streams. Each stream is cut into blocks of 1,024 of its rows. After b blocks the first k
sources of the list together have had floor(1024 b S_k) rows of the stream, S_k being their share of the weights as an exact fraction;
what a source has had is the difference of two such numbers. So the remainders of a block are carried into the next: after any number
of blocks a source is within one row of its weight, however long the run, and in one block within two (one, where there are two
sources). No table, no memory, no drift: the plainest rule that is a function of the block alone (apportioning each block by largest
remainders from what is owed would need all the blocks before it). A count cannot be below 0, because every weight is at least 1/1024 of
their sum (data/config.py).

Inside a block the order is that of hashes of (seed, stream, block). Each source has its own line (data/order.py), cut into the same
streams: the n-th row that stream s takes of a source is that source's row n of stream s. Called by data/loader.py and train/.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import shake_128
from itertools import accumulate, pairwise

import numpy as np

from data.config import BLOCK_ROWS
from data.recent import Recent


@dataclass(frozen=True)
class MixtureRow:
    """A row's source, and its position on that source's line."""

    source: int
    position: int
    continues: bool  # the row before it in its stream came from the same source


@dataclass(frozen=True)
class Mixture:
    """The sources' shares. Built by `of_weights`; one source is a mixture of one."""

    bounds: tuple[Fraction, ...]  # 0, then the share of the first k sources; the last is 1
    streams: int
    seed: int

    @classmethod
    def of_weights(cls, weights: Sequence[float], *, streams: int, seed: int) -> "Mixture":
        """Weights are taken as they are written: 0.1 is one tenth."""
        exact = [Fraction(repr(weight)) for weight in weights]
        total = sum(exact, Fraction(0))
        return cls(
            bounds=tuple(bound / total for bound in accumulate(exact, initial=Fraction(0))), streams=streams, seed=seed
        )

    def rows_before(self, block: int) -> list[int]:
        """Rows that a stream has taken of each source when its block number `block` begins."""
        bounds = [int(BLOCK_ROWS * block * bound) for bound in self.bounds]  # int() of a fraction >= 0 is its floor
        return [after - before for before, after in pairwise(bounds)]

    def rows_taken(self, position: int) -> list[float]:
        """Rows of each source among the first `position`. Exact where a block ends; in between on a straight line, because each
        stream has an order of its own."""
        block, rest = divmod(position, BLOCK_ROWS * self.streams)
        done = rest / BLOCK_ROWS
        return [
            before * self.streams + (after - before) * done
            for before, after in zip(self.rows_before(block), self.rows_before(block + 1), strict=True)
        ]


class MixtureOrder:
    """Finds rows in a mixture. Remembers blocks that it worked out, and nothing that would change an answer."""

    def __init__(self, mixture: Mixture, *, remembered_blocks: int) -> None:
        self._mixture = mixture
        self._blocks: Recent[_Block] = Recent(remembered_blocks)

    def locate(self, position: int) -> MixtureRow:
        """The row at data position `position` (>= 0); the work of one block, or two where a block begins."""
        mixture = self._mixture
        if len(mixture.bounds) == 2:
            return MixtureRow(source=0, position=position, continues=position >= mixture.streams)
        row, stream = divmod(position, mixture.streams)
        block = self._block(stream, row // BLOCK_ROWS)
        source, taken = int(block.sources[row % BLOCK_ROWS]), int(block.taken[row % BLOCK_ROWS])
        return MixtureRow(
            source=source,
            position=(block.before[source] + taken) * mixture.streams + stream,
            continues=row > 0 and self._source(stream, row - 1) == source,
        )

    def _source(self, stream: int, row: int) -> int:
        return int(self._block(stream, row // BLOCK_ROWS).sources[row % BLOCK_ROWS])

    def _block(self, stream: int, number: int) -> "_Block":
        return self._blocks.get((stream, number), lambda: _make_block(self._mixture, stream, number))


@dataclass(frozen=True)
class _Block:
    before: list[int]  # rows of each source in the stream's earlier blocks
    sources: np.ndarray  # uint16, of each row
    taken: np.ndarray  # uint16, rows of the same source before it in the block


def _make_block(mixture: Mixture, stream: int, number: int) -> _Block:
    before, after = mixture.rows_before(number), mixture.rows_before(number + 1)
    counts = [last - first for first, last in zip(before, after, strict=True)]
    words = shake_128(f"{mixture.seed}/{stream}/{number}".encode()).digest(8 * BLOCK_ROWS)
    order = np.frombuffer(words, dtype="<u8").argsort(
        kind="stable"
    )  # the hash of each row: no generator that may change
    sources, taken = np.empty(BLOCK_ROWS, dtype=np.uint16), np.empty(BLOCK_ROWS, dtype=np.uint16)
    done = 0
    for source, count in enumerate(counts):
        places = np.sort(order[done : done + count])
        sources[places], taken[places] = source, np.arange(count)
        done += count
    return _Block(before=before, sources=sources, taken=taken)
