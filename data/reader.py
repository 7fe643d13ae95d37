"""Tokens of a line: from (epoch, first token, count) to ids, through the shards' sidecars, with a small memory of
documents.

Owns the files' reading and the memory; data/order.py says which tokens a row has, data/shards.py what a tar looks like.
One `LineReader` per source, made by data/loader.py. No file stays open between two reads: nothing to leak, and a reader
can be copied to another process.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Generic, TypeVar

import numpy as np

from data.index import ShardIndex, check_tokenizer
from data.order import shard_order
from data.shards import read_documents, read_sidecar
from data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

CACHED_SHARDS = 256  # sidecars in memory (24 bytes per document); one stream is in one shard at a time

Value = TypeVar("Value")


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a line."""

    tokens: np.ndarray  # int64 ids
    document_ids: (
        np.ndarray
    )  # int64: number of each token's document in the order of the index, the same in every epoch


@dataclass(frozen=True)
class _Shard:
    records: np.ndarray  # the sidecar
    starts: np.ndarray  # int64, first token of each document, and the shard's number of tokens at the end


class LineReader:
    """Reads the line of one source. `seed` permutes the shards per epoch; None keeps the order of the index."""

    def __init__(self, index: ShardIndex, *, seed: int | None, cached_documents: int) -> None:
        self._index = index
        self._seed = seed
        self._first_document = [0, *accumulate(shard.documents for shard in index.shards)]
        self._epochs: _Recent[_Epoch] = _Recent(2)  # a micro-step may lie across the end of an epoch
        self._shards: _Recent[_Shard] = _Recent(max(CACHED_SHARDS, cached_documents))
        self._documents: _Recent[np.ndarray] = _Recent(cached_documents)

    def read(self, *, epoch: int, first_token: int, count: int) -> Span:
        """The tokens [first_token, first_token + count) of an epoch's line.

        Raises RuntimeError, naming the file, for a damaged shard.
        """
        line = self._epochs.get(epoch, lambda: self._lay_out(epoch))
        tokens = np.empty(count, dtype=np.int64)
        document_ids = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            place = bisect_right(line.starts, first_token + done) - 1
            inside = first_token + done - line.starts[place]
            filled = self._fill(line.order[place], inside, tokens[done:], document_ids[done:])
            done += filled
        return Span(tokens=tokens, document_ids=document_ids)

    def _fill(self, number: int, inside: int, tokens: np.ndarray, document_ids: np.ndarray) -> int:
        """Copies what shard `number` has from its token `inside` on, as far as there is room; returns how much."""
        shard = self._shards.get(number, lambda: self._open(number))
        end = min(inside + len(tokens), int(shard.starts[-1]))
        first = int(np.searchsorted(shard.starts, inside, side="right")) - 1
        last = int(np.searchsorted(shard.starts, end, side="left"))
        for document, content in zip(range(first, last), self._read(number, shard, first, last), strict=True):
            start = int(shard.starts[document])
            low, high = max(inside, start), min(end, start + len(content))
            tokens[low - inside : high - inside] = content[low - start : high - start]
            document_ids[low - inside : high - inside] = self._first_document[number] + document
        return end - inside

    def _read(self, number: int, shard: _Shard, first: int, last: int) -> list[np.ndarray]:
        """The documents [first, last) of a shard; those that are not remembered are read in one go."""
        contents = [self._documents.peek((number, document)) for document in range(first, last)]
        remembered = [content for content in contents if content is not None]
        if len(remembered) == last - first:
            return remembered
        start = first + next(i for i, content in enumerate(contents) if content is None)
        path = self._index.folder / self._index.shards[number].name
        fresh = list(
            read_documents(path, shard.records[start:last], field=self._index.document_field, tokenizer=self._tokenizer)
        )
        for document, content in zip(range(start, last), fresh, strict=True):
            self._documents.put((number, document), content)
        return remembered[: start - first] + fresh

    def _lay_out(self, epoch: int) -> "_Epoch":
        shards = self._index.shards
        order = (
            list(range(len(shards))) if self._seed is None else shard_order(len(shards), seed=self._seed, epoch=epoch)
        )
        return _Epoch(order=order, starts=[0, *accumulate(shards[number].tokens for number in order)])

    def _open(self, number: int) -> _Shard:
        records = read_sidecar(self._index.folder, self._index.shards[number])
        return _Shard(records=records, starts=np.concatenate([[0], np.cumsum(records["tokens"], dtype=np.int64)]))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = load_tokenizer(self._index.folder / TOKENIZER_FILE)
        check_tokenizer(self._index, tokenizer.tokenizer_id)
        return tokenizer


@dataclass(frozen=True)
class _Epoch:
    order: list[int]  # shard numbers
    starts: list[int]  # first token of each of them on the line, and the line's number of tokens at the end


class _Recent(Generic[Value]):
    """The `capacity` values that were used last."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: OrderedDict[object, Value] = OrderedDict()

    def get(self, key: object, make: Callable[[], Value]) -> Value:
        value = self.peek(key)
        if value is None:
            value = make()
            self.put(key, value)
        return value

    def peek(self, key: object) -> Value | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: object, value: Value) -> None:
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > self._capacity:
            self._values.popitem(last=False)
