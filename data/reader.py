"""Tokens of a line: from (epoch, first token, count) to ids, through the shards' sidecars, with a small memory of
documents.

Owns the files' reading, the memory, and what is done about a document that cannot be read; data/order.py says which tokens a row has,
data/shards.py what a tar looks like, data/cache.py has the tars that are fetched. One `LineReader` per source, made by data/loader.py.
No file stays open between two reads: nothing to leak.
"""

import time
from bisect import bisect_right
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from data.ahead import Ahead
from data.damage import NodeTrouble
from data.index import ShardIndex, check_tokenizer
from data.order import shard_order
from data.recent import Recent
from data.shards import read_documents, read_sidecar
from data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

CACHED_SHARDS = 256  # sidecars in memory (24 bytes per document); one stream is in one shard at a time
CACHED_EPOCHS = 8  # streams of a mixture may be in different ones, as may the rows of a micro-step
RETRY_S = 300.0  # until a shard that could not be fetched is tried again, which takes 7.5 s or more
NO_DOCUMENT = -1  # the document id of a place that has no token, or one that cannot be read

_UNREADABLE = np.empty(0, dtype=np.uint8)  # remembered in place of a document


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a line."""

    tokens: np.ndarray  # int64 ids; the end token where a document cannot be read
    document_ids: (
        np.ndarray
    )  # int64: number of each token's document in the order of the index, the same in every epoch; else NO_DOCUMENT


@dataclass(frozen=True)
class _Shard:
    records: np.ndarray | None  # the sidecar; None: it cannot be read
    starts: np.ndarray  # int64, first token of each document, and the shard's number of tokens at the end


class LineReader:
    """Reads the line of one source. `seed` permutes the shards per epoch; None keeps the order of the index.

    tolerant: a document that cannot be read becomes end tokens with NO_DOCUMENT, and its shard a key of `damaged`. That is a matter of
    this document alone: the same in every process that sees the same files, whatever it read before. A shard that cannot be fetched is
    tried again after RETRY_S; NodeTrouble is raised in any case.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        seed: int | None,
        cached_documents: int,
        tolerant: bool = False,
        first_id: int = 0,
        ahead: bool = False,
    ) -> None:
        """first_id: of the index's first document, where several sources number theirs in a row. ahead: the shard after each one that
        is begun is fetched too, where tars are fetched."""
        self.damaged: dict[str, str] = {}  # path -> problem, of the shards met so far
        self._index = index
        self._seed = seed
        self._tolerant = tolerant
        self._first_document = list(accumulate((shard.documents for shard in index.shards), initial=first_id))
        self._epochs: Recent[_Epoch] = Recent(CACHED_EPOCHS)
        self._shards: Recent[_Shard] = Recent(max(CACHED_SHARDS, cached_documents))
        self._documents: Recent[np.ndarray] = Recent(cached_documents)
        self._fetched_again: set[int] = set()
        self._next_try: dict[
            int, float
        ] = {}  # when, by time.monotonic(), a shard that could not be fetched is tried again
        self._ahead = Ahead(index.cache) if ahead and index.cache is not None else None
        self._begun: set[tuple[int, int]] = set()  # epoch and place of each shard, if there is an `_ahead`

    def read(self, *, epoch: int, first_token: int, count: int) -> Span:
        """The tokens [first_token, first_token + count) of an epoch's line.

        Raises RuntimeError, naming the file, for a damaged shard, unless the reader is tolerant.
        """
        line = self._epochs.get(epoch, lambda: self._lay_out(epoch))
        tokens = np.empty(count, dtype=np.int64)
        document_ids = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            place = bisect_right(line.starts, first_token + done) - 1
            inside = first_token + done - line.starts[place]
            if self._ahead is not None and (epoch, place) not in self._begun:
                self._begun.add((epoch, place))
                if place + 1 < len(line.order):
                    self._ahead.want(self._index.shards[line.order[place + 1]])
            filled = self._fill(line.order[place], inside, tokens[done:], document_ids[done:])
            done += filled
        return Span(tokens=tokens, document_ids=document_ids)

    def _fill(self, number: int, inside: int, tokens: np.ndarray, document_ids: np.ndarray) -> int:
        """Copies what shard `number` has from its token `inside` on, as far as there is room; returns how much."""
        shard = self._shards.get(number, lambda: self._open(number))
        end = min(inside + len(tokens), int(shard.starts[-1]))
        first = int(shard.starts.searchsorted(inside, side="right")) - 1
        last = int(shard.starts.searchsorted(end, side="left"))
        bounds = shard.starts[first : last + 1].tolist()
        for i, content in enumerate(self._read(number, shard, first, last)):
            start = bounds[i]
            low, high = max(inside, start), min(end, bounds[i + 1])
            if content is _UNREADABLE:
                tokens[low - inside : high - inside] = self._index.end_token
                document_ids[low - inside : high - inside] = NO_DOCUMENT
                continue
            tokens[low - inside : high - inside] = content[low - start : high - start]
            document_ids[low - inside : high - inside] = self._first_document[number] + first + i
        return end - inside

    def _read(self, number: int, shard: _Shard, first: int, last: int) -> list[np.ndarray]:
        """The documents [first, last) of a shard; those that are not remembered are read in one go."""
        if shard.records is None:
            return [_UNREADABLE] * (last - first)
        contents = [self._documents.peek((number, document)) for document in range(first, last)]
        remembered = [content for content in contents if content is not None]
        if len(remembered) == last - first:
            return remembered
        start = first + next(i for i, content in enumerate(contents) if content is None)
        end = int(shard.records["offset"][last]) if last < len(shard.records) else self._index.shards[number].bytes
        fresh = self._read_fresh(number, shard.records[start:last], end)
        if not self._is_out_of_reach(number):  # else a later try may have them
            for document, content in zip(range(start, last), fresh, strict=True):
                self._documents.put((number, document), content)
        return remembered[: start - first] + fresh

    def _read_fresh(self, number: int, records: np.ndarray, end: int) -> list[np.ndarray]:
        problems: list[RuntimeError] = []
        contents = self._read_tar(number, records, end, problems)
        cache = self._index.cache
        if problems and cache is not None and not (self._is_out_of_reach(number) or number in self._fetched_again):
            self._fetched_again.add(number)
            cache.discard(self._index.shards[number])  # it was whole when it was fetched: this node's disk changed it
            problems.clear()
            contents = self._read_tar(number, records, end, problems)
        if problems:
            self._report(number, problems[0])
        return contents

    def _read_tar(self, number: int, records: np.ndarray, end: int, problems: list[RuntimeError]) -> list[np.ndarray]:
        index, info = self._index, self._index.shards[number]
        if self._is_out_of_reach(number):
            return [_UNREADABLE] * len(records)
        held = nullcontext(index.folder / info.name) if index.cache is None else index.cache.hold(info)
        try:
            with held as path:
                documents = read_documents(
                    path,
                    records,
                    end=end,
                    field=index.document_field,
                    tokenizer=self._tokenizer,
                    on_damage=problems.append,
                )
                return [_UNREADABLE if document is None else document for document in documents]
        except NodeTrouble:
            raise
        except RuntimeError as error:  # of the fetching; the documents' own are told by on_damage
            problems.append(error)
            self._next_try[number] = time.monotonic() + RETRY_S
            return [_UNREADABLE] * len(records)

    def _is_out_of_reach(self, number: int) -> bool:
        return time.monotonic() < self._next_try.get(number, 0.0)

    def _report(self, number: int, error: RuntimeError) -> None:
        if not self._tolerant:
            raise error
        self.damaged.setdefault(self._index.place_of(self._index.shards[number].name), str(error))

    def _lay_out(self, epoch: int) -> "_Epoch":
        shards = self._index.shards
        order = (
            list(range(len(shards))) if self._seed is None else shard_order(len(shards), seed=self._seed, epoch=epoch)
        )
        return _Epoch(order=order, starts=[0, *accumulate(shards[number].tokens for number in order)])

    def _open(self, number: int) -> _Shard:
        info = self._index.shards[number]
        try:
            records = read_sidecar(self._index.folder, info)
        except RuntimeError as error:
            self._report(number, error)
            return _Shard(records=None, starts=np.array([0, info.tokens]))
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
