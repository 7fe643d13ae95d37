"""Where each row lies: shard order of an epoch, geometry of the line, positions of a rank. Pure arithmetic, no files.

An epoch's shards, laid document after document, are one virtual *line* of N tokens. It is cut into `streams` contiguous
pieces of R rows each; data position p (rows consumed, the one integer that a checkpoint keeps) is row j = i div streams
of stream i mod streams, where epoch, i = divmod(p, R * streams). data/reader.py fetches the tokens, data/loader.py
makes batches; a mixture of sources has one `Line` per source. Everything is Python integers: no size overflows.
"""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Self


@dataclass(frozen=True)
class RowLocation:
    """Where one row lies on its line."""

    epoch: int
    stream: int
    row: int  # j: the row's number inside its stream; j = 0 starts afresh
    first_token: int  # index on the epoch's line
    num_targets: int  # the row's length, or less (down to 0) at the end of an evaluation


@dataclass(frozen=True)
class Line:
    """The geometry of one source's tokens. Built by `for_training` or `for_evaluation`."""

    num_tokens: int
    length: int
    streams: int
    rows_per_stream: int

    @classmethod
    def for_training(cls, num_tokens: int, *, length: int, streams: int, shards: str = "the shards") -> Self:
        """Rows of `length` tokens in `streams` streams, the same number in each; up to streams * length tokens at the
        end stay unused.

        Raises ValueError, naming `shards`, if the line is too short for one row per stream.
        """
        rows_per_stream = (num_tokens - 1) // length // streams
        if rows_per_stream < 1:
            raise ValueError(
                f"training needs at least data.streams x data.sequence_length + 1 = {streams} x {length} + 1 = "
                f"{streams * length + 1} tokens, but {shards} hold {num_tokens}: prepare more text, or lower "
                "data.streams or data.sequence_length"
            )
        return cls(num_tokens=num_tokens, length=length, streams=streams, rows_per_stream=rows_per_stream)

    @classmethod
    def for_evaluation(cls, num_tokens: int, *, length: int, streams: int, max_tokens: int) -> Self:
        """Rows that cover the first min(num_tokens, max_tokens + 1) tokens once: the last rows may hold fewer targets,
        or none.

        Raises ValueError if there is not one target.
        """
        used = min(num_tokens, max_tokens + 1)
        if used < 2:
            raise ValueError(
                f"evaluation needs at least one target, but data.heldout holds {num_tokens} tokens and eval.max_tokens "
                f"is {max_tokens}: prepare more text or raise eval.max_tokens"
            )
        rows = _ceil_div(used - 1, length)
        return cls(num_tokens=used, length=length, streams=streams, rows_per_stream=_ceil_div(rows, streams))

    @property
    def rows_per_epoch(self) -> int:
        """Positions that one pass over the line takes."""
        return self.rows_per_stream * self.streams

    def locate(self, position: int) -> RowLocation:
        """The row at data position `position` (>= 0)."""
        epoch, in_epoch = divmod(position, self.rows_per_epoch)
        row, stream = divmod(in_epoch, self.streams)
        first_token = (stream * self.rows_per_stream + row) * self.length
        num_targets = max(0, min(self.length, self.num_tokens - 1 - first_token))
        return RowLocation(epoch=epoch, stream=stream, row=row, first_token=first_token, num_targets=num_targets)


def shard_order(num_shards: int, *, seed: int, epoch: int) -> list[int]:
    """The shards' numbers in the order in which this epoch reads them.

    Sorted by a hash of (seed, epoch, number): no generator whose stream a new version of a library could change.
    """
    return sorted(
        range(num_shards), key=lambda shard: blake2b(f"{seed}/{epoch}/{shard}".encode(), digest_size=16).digest()
    )


def rank_positions(first_position: int, *, micro_step_rows: int, rank: int, num_ranks: int) -> range:
    """The positions p with p mod num_ranks == rank among the `micro_step_rows` positions from `first_position` on."""
    start = first_position + (rank - first_position) % num_ranks
    return range(start, first_position + micro_step_rows, num_ranks)


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
