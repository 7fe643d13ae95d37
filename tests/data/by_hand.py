"""The rows of a training run by plain loops over Python lists, and the rows that the loader gave, in one form.

Called by the tests of rows beside it. Nothing here uses data/mixture.py or data/reader.py.
"""

from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from hashlib import shake_128
from itertools import cycle
from math import floor
from typing import Any

from data.loader import IGNORED, Batch
from data.order import shard_order

Shards = Sequence[Sequence[Sequence[int]]]


def fast_rows(batches: list[list[Batch]]) -> Iterator[dict]:
    """The rows of all ranks' batches, in the order of their positions, with the micro-steps in order."""
    for of_ranks in zip(*batches, strict=True):
        rows = {}
        for batch in of_ranks:
            for i, position in enumerate(batch.positions_B.tolist()):
                assert position not in rows
                rows[position] = {
                    "tokens": batch.tokens_BS[i].tolist(),
                    "targets": batch.targets_BS[i].tolist(),
                    "documents": batch.document_ids_BS[i].tolist(),
                    "continues": batch.continues_B[i].item(),
                }
        yield from (rows[position] for position in sorted(rows))


def mixed_rows(
    sources: Sequence[Shards], weights: Sequence[str], *, length: int, streams: int, seed: int, num_rows: int
) -> list[dict[str, Any]]:
    """The first rows of a mixture, walked one by one; a row also tells its source and epoch."""
    walks = [
        [_walk(shards, length=length, streams=streams, stream=stream, seed=seed) for stream in range(streams)]
        for shards in sources
    ]
    first_ids = [sum(len(shard) for before in sources[:k] for shard in before) for k in range(len(sources))]
    plans = [plan_of_stream(weights, stream=stream, seed=seed) for stream in range(streams)]
    rows, last = [], [-1] * streams
    for position in range(num_rows):
        stream = position % streams
        source = next(plans[stream])
        row = next(walks[source][stream])
        row["documents"] = [first_ids[source] + number for number in row["documents"]]
        rows.append(row | {"continues": row["continues"] and last[stream] == source, "source": source})
        last[stream] = source
    return rows


def rows_of(
    shards: Shards, *, length: int, streams: int, seed: int, num_epochs: int, bad: Collection[tuple[int, int]] = ()
) -> list[dict[str, Any]]:
    """The rows of some epochs of one source, in the order of their positions. bad: (shard, document) of those that cannot be read."""
    walks = [_walk(shards, length=length, streams=streams, stream=n, seed=seed, bad=bad) for n in range(streams)]
    rows = []
    for walk in cycle(walks):
        row = next(walk)
        if row.pop("epoch") == num_epochs:
            return rows
        rows.append(row)
    raise AssertionError("a source has streams")


def plan_of_stream(weights: Sequence[str], *, stream: int, seed: int) -> Iterator[int]:
    """The source of each row of a stream: in each block, the rows with the least hashes are the first source's, and so on."""
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    block = 0
    while True:
        counts = []
        for k in range(len(shares)):
            through, before = sum(shares[: k + 1], Fraction(0)), sum(shares[:k], Fraction(0))
            had, has = (floor(1024 * b * through) - floor(1024 * b * before) for b in (block, block + 1))
            counts.append(has - had)
        digest = shake_128(f"{seed}/{stream}/{block}".encode()).digest(8192)
        ranked = sorted(range(1024), key=lambda row: digest[8 * row : 8 * row + 8][::-1])
        of_row = {}
        for k, count in enumerate(counts):
            for _ in range(count):
                of_row[ranked[len(of_row)]] = k
        for row in range(1024):
            yield of_row[row]
        block += 1


def _walk(
    shards: Shards, *, length: int, streams: int, stream: int, seed: int, bad: Collection[tuple[int, int]] = ()
) -> Iterator[dict[str, Any]]:
    """One source's rows in one of its streams, epoch after epoch.

    On the line, each token of a bad document is an end token (0) that is no target and in no document.
    """
    numbers = {}
    for s, documents in enumerate(shards):
        for d in range(len(documents)):
            numbers[s, d] = len(numbers)
    epoch = 0
    while True:
        line = []
        for s in shard_order(len(shards), seed=seed, epoch=epoch):
            for d, document in enumerate(shards[s]):
                for token in [*document, 0]:
                    line.append((0, IGNORED, -1) if (s, d) in bad else (token, token, numbers[s, d]))
        rows_per_stream = (len(line) - 1) // length // streams
        for j in range(rows_per_stream):
            first = (stream * rows_per_stream + j) * length
            row = line[first : first + length + 1]
            yield {
                "tokens": [token for token, _, _ in row[:-1]],
                "targets": [target for _, target, _ in row[1:]],
                "documents": [number for _, _, number in row[:-1]],
                "continues": j > 0,
                "epoch": epoch,
            }
        epoch += 1
