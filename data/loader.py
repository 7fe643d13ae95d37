"""Rows to batches: one micro-step's rows of one rank at a time, for training without end and for evaluation once.

Owns the making of batches; data/mixture.py says which source a row comes from, data/order.py where it lies there, data/reader.py fetches
it, data/workers.py has the reader processes. Nothing here has a state beyond one integer, the data position (and, for the log, which
damaged shards were met). Called by train/run.py and train/evaluate.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, count

import numpy as np
import torch

from data.cache import GB
from data.config import DataConfig, check_layout
from data.damage import check_limit
from data.index import ShardIndex
from data.mixture import Mixture, MixtureOrder
from data.order import Line, RowLocation, rank_positions
from data.reader import NO_DOCUMENT, LineReader
from data.split import TrainSplit, one_source
from data.workers import in_processes

IGNORED = -100  # the target of a place that is not scored (the default of torch's cross entropy)


@dataclass(frozen=True)
class Batch:
    """One micro-step's rows of one rank. Tensors on the CPU; B rows, S = data.sequence_length."""

    tokens_BS: torch.Tensor  # int64
    targets_BS: torch.Tensor  # int64: the next token on the line; IGNORED where none is scored
    document_ids_BS: torch.Tensor  # int64: equal inside one document, different between documents of a row
    positions_B: torch.Tensor  # int64: data position of each row (evaluation: number of the row)
    continues_B: torch.Tensor  # bool: the row goes on where row p - streams ended (false: it starts its stream afresh)
    num_bytes: int  # text bytes of the targets that are scored, on this rank
    damaged: Mapping[str, str] = field(
        default_factory=dict
    )  # path -> problem, of the shards that its reader passed over so far


class TrainBatches(Iterator[Batch]):
    """The endless batches of one rank, and the damaged shards that they met."""

    def __init__(self, batches: Iterator[Batch], *, damaged: Mapping[str, str], limit: int) -> None:
        self.damaged: dict[str, str] = dict(damaged)  # path -> problem
        self._batches = batches
        self._limit = limit

    def __next__(self) -> Batch:
        """Raises RuntimeError, naming all of them, if more damaged shards were met than `data.max_skipped_shards`."""
        batch = next(self._batches)
        self.add_damaged(batch.damaged)
        return batch

    def add_damaged(self, found: Mapping[str, str]) -> None:
        """Counts what other processes met too. Raises RuntimeError as `__next__` does."""
        self.damaged = {**found, **self.damaged}
        check_limit(self.damaged, limit=self._limit)


def train_batches(
    config: DataConfig,
    split: TrainSplit | ShardIndex,
    *,
    seed: int,
    accumulation_steps: int,
    rank: int,
    num_ranks: int,
    position: int,
    passed_over: Mapping[str, str] | None = None,
) -> TrainBatches:
    """Endless batches of rank `rank` of `num_ranks`, one per micro-step, from data position `position` on.

    `position` counts the rows that all ranks together consumed: a multiple of the micro-step's rows, which are the same
    at every layout and every `config.num_workers`. passed_over: the damaged shards (path -> problem) that the run met before this
    position; they count, unless none may be passed over any more. Raises ValueError at once for a layout or position that cannot be,
    RuntimeError at once or while iterating for damaged shards beyond `config.max_skipped_shards`.
    """
    check_layout(config, accumulation_steps=accumulation_steps, num_ranks=num_ranks)
    micro_step_rows = config.global_batch_size // accumulation_steps
    if position < 0 or position % micro_step_rows:
        raise ValueError(
            f"the data position must be a multiple of the micro-step's rows, but the position is {position} and "
            f"data.global_batch_size / optim.accumulation_steps is {micro_step_rows}: resume with the batch size and "
            "accumulation of the checkpoint"
        )
    split = one_source(split) if isinstance(split, ShardIndex) else split
    indexes = tuple(source.index for source in split.sources)
    plan = _Plan(
        indexes=indexes,
        lines=training_lines(config, split),
        mixture=mixture_of(config, split, seed=seed),
        seed=seed,
        micro_step_rows=micro_step_rows,
        rank=rank,
        num_ranks=num_ranks,
        first_micro_step=position // micro_step_rows,
        tolerant=config.max_skipped_shards > 0,
        ahead=config.cache_gb * GB >= 2 * config.streams * sum(map(_largest_fetched, indexes)),
    )
    rows = in_processes(plan.share, num_workers=config.num_workers) if config.num_workers else plan.rows()
    batches = TrainBatches(map(_to_batch, rows), damaged=split.damaged, limit=config.max_skipped_shards)
    if plan.tolerant:
        batches.add_damaged(passed_over or {})
    return batches


def training_lines(config: DataConfig, split: TrainSplit) -> tuple[Line, ...]:
    """The line of each source. Raises ValueError, naming it, if one is too short for a row in each stream."""
    return tuple(
        Line.for_training(
            source.index.num_tokens,
            length=config.sequence_length,
            streams=config.streams,
            shards=f"the shards of the source {source.name}" if source.name else "the shards",
        )
        for source in split.sources
    )


def mixture_of(config: DataConfig, split: TrainSplit, *, seed: int) -> Mixture:
    """How the sources share the rows."""
    return Mixture.of_weights([source.weight for source in split.sources], streams=config.streams, seed=seed)


def heldout_batches(
    config: DataConfig, index: ShardIndex, *, max_tokens: int, accumulation_steps: int, rank: int, num_ranks: int
) -> Iterator[Batch]:
    """The batches of one evaluation, as many on every rank: together they score each of the first `max_tokens` targets
    once.

    The micro-step's rows are the streams, the shards are read in the order of the index. Always read in this process:
    to start reader processes for each evaluation would take longer than the reading.
    """
    check_layout(config, accumulation_steps=accumulation_steps, num_ranks=num_ranks)
    micro_step_rows = config.global_batch_size // accumulation_steps
    line = Line.for_evaluation(
        index.num_tokens, length=config.sequence_length, streams=micro_step_rows, max_tokens=max_tokens
    )
    plan = _Plan(
        indexes=(index,),
        lines=(line,),
        mixture=Mixture.of_weights([1.0], streams=micro_step_rows, seed=0),
        seed=None,
        micro_step_rows=micro_step_rows,
        rank=rank,
        num_ranks=num_ranks,
        first_micro_step=0,
        num_micro_steps=line.rows_per_stream,
    )
    return map(_to_batch, plan.rows())


def _largest_fetched(index: ShardIndex) -> int:
    """Bytes of the largest shard that comes into the cache. Each stream has one of each source open."""
    return 0 if index.cache is None else max(shard.bytes for shard in index.shards)


@dataclass(frozen=True)
class _Plan:
    """Everything that determines one rank's batches. Small enough to send to a reader process."""

    indexes: tuple[ShardIndex, ...]  # of the sources
    lines: tuple[Line, ...]
    mixture: Mixture
    seed: int | None
    micro_step_rows: int
    rank: int
    num_ranks: int
    first_micro_step: int
    num_micro_steps: int | None = None  # None: endless
    tolerant: bool = False
    ahead: bool = False  # the cache has room for each stream's shard of each source, and the next

    def rows(self, *, worker: int = 0, num_workers: int = 1) -> Iterator["_Rows"]:
        """Those of every `num_workers`-th micro-step from the `worker`-th on."""
        maker = _RowMaker(self)
        for micro_step in count(self.first_micro_step + worker, num_workers):
            if self.num_micro_steps is not None and micro_step >= self.num_micro_steps:
                return
            yield maker.make(micro_step * self.micro_step_rows)

    def share(self, worker: int, num_workers: int) -> Iterator["_Rows"]:
        """What one of some reader processes makes, in half of the bytes where the numbers are small enough."""
        small = (
            sum(index.num_documents for index in self.indexes) < 1 << 31
        )  # ids of tokens always are (data/tokenizer.py)
        for rows in self.rows(worker=worker, num_workers=num_workers):
            yield replace(rows, numbers=rows.numbers.astype(np.int32)) if small else rows


@dataclass(frozen=True)
class _Rows:
    """A batch on its way. From a reader process it comes through a pipe as one array: five tensors would be five files in shared
    memory, whose making and opening took longer than all the reading (benchmarks/results/2026-11-22_2-core-cpu_loader.md).
    """

    numbers: np.ndarray  # (3, B, S): tokens, targets, document ids
    positions: list[int]
    continues: list[bool]
    num_bytes: int
    damaged: Mapping[str, str]


def _to_batch(rows: _Rows) -> Batch:
    tokens_BS, targets_BS, document_ids_BS = torch.from_numpy(rows.numbers.astype(np.int64, copy=False))
    return Batch(
        tokens_BS=tokens_BS,
        targets_BS=targets_BS,
        document_ids_BS=document_ids_BS,
        positions_B=torch.tensor(rows.positions, dtype=torch.int64),
        continues_B=torch.tensor(rows.continues, dtype=torch.bool),
        num_bytes=rows.num_bytes,
        damaged=rows.damaged,
    )


class _RowMaker:
    """Makes a plan's rows. What it remembers saves reading and changes nothing."""

    def __init__(self, plan: _Plan) -> None:
        streams = max(plan.mixture.streams, plan.micro_step_rows) // plan.num_ranks
        first_ids = accumulate((index.num_documents for index in plan.indexes), initial=0)
        self._plan = plan
        self._order = MixtureOrder(plan.mixture, remembered_blocks=2 * streams)  # each stream's, and the one before
        self._readers = [
            LineReader(
                index,
                seed=plan.seed,
                cached_documents=2 * streams + 16,  # each stream's document, and the next
                tolerant=plan.tolerant,
                first_id=first_id,
                ahead=plan.ahead,
            )
            for index, first_id in zip(plan.indexes, first_ids, strict=False)
        ]

    def make(self, first_position: int) -> _Rows:
        plan = self._plan
        positions = rank_positions(
            first_position, micro_step_rows=plan.micro_step_rows, rank=plan.rank, num_ranks=plan.num_ranks
        )
        numbers = np.empty((3, len(positions), plan.lines[0].length), dtype=np.int64)
        tokens_BS, targets_BS, document_ids_BS = numbers
        tokens_BS[:], targets_BS[:], document_ids_BS[:] = plan.indexes[0].end_token, IGNORED, NO_DOCUMENT
        continues = []
        for i, position in enumerate(positions):
            place = self._order.locate(position)
            row = plan.lines[place.source].locate(place.position)
            continues.append(row.row > 0 and place.continues)
            if row.num_targets:
                self._fill(place.source, row, tokens_BS[i], targets_BS[i], document_ids_BS[i])
        scored = targets_BS[targets_BS != IGNORED]
        return _Rows(
            numbers=numbers,
            positions=list(positions),
            continues=continues,
            num_bytes=int(plan.indexes[0].token_bytes_V[scored].sum()),
            damaged={path: problem for reader in self._readers for path, problem in reader.damaged.items()},
        )

    def _fill(self, source: int, row: RowLocation, tokens: np.ndarray, targets: np.ndarray, ids: np.ndarray) -> None:
        """One row. A target that cannot be read is ignored; what follows a document that cannot be is predicted from its end
        token, which is known."""
        span = self._readers[source].read(epoch=row.epoch, first_token=row.first_token, count=row.num_targets + 1)
        tokens[: row.num_targets] = span.tokens[:-1]
        targets[: row.num_targets] = span.tokens[1:]
        ids[: row.num_targets] = span.document_ids[:-1]
        if self._readers[source].damaged:
            targets[: row.num_targets][span.document_ids[1:] == NO_DOCUMENT] = IGNORED
