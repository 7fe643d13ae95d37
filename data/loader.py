"""Rows to batches: one micro-step's rows of one rank at a time, for training without end and for evaluation once.

Owns the making of batches and the reader processes; data/order.py says where each row lies, data/reader.py fetches it.
Nothing here has a state beyond one integer, the data position. Called by train/run.py and train/evaluate.py.
"""

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.config import DataConfig, check_layout
from data.index import ShardIndex
from data.order import Line, RowLocation, rank_positions
from data.reader import LineReader

IGNORED = -100  # the target of a place that is not scored (the default of torch's cross entropy)
NO_DOCUMENT = -1  # the document id of such a place


@dataclass(frozen=True)
class Batch:
    """One micro-step's rows of one rank. Tensors on the CPU; B rows, S = data.sequence_length."""

    tokens_BS: torch.Tensor  # int64
    targets_BS: torch.Tensor  # int64: the next token on the line; IGNORED where none is scored
    document_ids_BS: torch.Tensor  # int64: equal inside one document, different between documents of a row
    positions_B: torch.Tensor  # int64: data position of each row (evaluation: number of the row)
    continues_B: torch.Tensor  # bool: the row goes on where row p - streams ended (false: it starts its stream afresh)
    num_bytes: int  # text bytes of the targets that are scored, on this rank


def train_batches(
    config: DataConfig,
    index: ShardIndex,
    *,
    seed: int,
    accumulation_steps: int,
    rank: int,
    num_ranks: int,
    position: int,
) -> Iterator[Batch]:
    """Endless batches of rank `rank` of `num_ranks`, one per micro-step, from data position `position` on.

    `position` counts the rows that all ranks together consumed: a multiple of the micro-step's rows, which are the same
    at every layout and every `config.num_workers`. Raises ValueError at once for a layout or position that cannot be,
    RuntimeError while iterating for a damaged shard.
    """
    check_layout(config, accumulation_steps=accumulation_steps, num_ranks=num_ranks)
    micro_step_rows = config.global_batch_size // accumulation_steps
    if position < 0 or position % micro_step_rows:
        raise ValueError(
            f"the data position must be a multiple of the micro-step's rows, but the position is {position} and "
            f"data.global_batch_size / optim.accumulation_steps is {micro_step_rows}: resume with the batch size and "
            "accumulation of the checkpoint"
        )
    plan = _Plan(
        index=index,
        line=Line.for_training(index.num_tokens, length=config.sequence_length, streams=config.streams),
        seed=seed,
        micro_step_rows=micro_step_rows,
        rank=rank,
        num_ranks=num_ranks,
        first_micro_step=position // micro_step_rows,
    )
    return plan.batches() if config.num_workers == 0 else _batches_of_workers(plan, num_workers=config.num_workers)


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
        index=index,
        line=line,
        seed=None,
        micro_step_rows=micro_step_rows,
        rank=rank,
        num_ranks=num_ranks,
        first_micro_step=0,
    )
    return plan.batches(num_micro_steps=line.rows_per_stream)


@dataclass(frozen=True)
class _Plan:
    """Everything that determines one rank's batches. Small enough to send to a reader process."""

    index: ShardIndex
    line: Line
    seed: int | None
    micro_step_rows: int
    rank: int
    num_ranks: int
    first_micro_step: int

    def batches(self, *, num_micro_steps: int | None = None, worker: int = 0, num_workers: int = 1) -> Iterator[Batch]:
        """Every `num_workers`-th micro-step from the `worker`-th on; endless without `num_micro_steps`."""
        streams = max(self.line.streams, self.micro_step_rows) // self.num_ranks
        reader = LineReader(
            self.index, seed=self.seed, cached_documents=2 * streams + 16
        )  # each stream's document, and the next
        for micro_step in count(self.first_micro_step + worker, num_workers):
            if num_micro_steps is not None and micro_step >= num_micro_steps:
                return
            yield self._batch(reader, micro_step * self.micro_step_rows)

    def _batch(self, reader: LineReader, first_position: int) -> Batch:
        positions = rank_positions(
            first_position, micro_step_rows=self.micro_step_rows, rank=self.rank, num_ranks=self.num_ranks
        )
        shape = (len(positions), self.line.length)
        tokens_BS = np.full(shape, self.index.end_token, dtype=np.int64)
        targets_BS = np.full(shape, IGNORED, dtype=np.int64)
        document_ids_BS = np.full(shape, NO_DOCUMENT, dtype=np.int64)
        rows: list[RowLocation] = [self.line.locate(position) for position in positions]
        for i, row in enumerate(rows):
            if row.num_targets:
                span = reader.read(epoch=row.epoch, first_token=row.first_token, count=row.num_targets + 1)
                tokens_BS[i, : row.num_targets] = span.tokens[:-1]
                targets_BS[i, : row.num_targets] = span.tokens[1:]
                document_ids_BS[i, : row.num_targets] = span.document_ids[:-1]
        return Batch(
            tokens_BS=torch.from_numpy(tokens_BS),
            targets_BS=torch.from_numpy(targets_BS),
            document_ids_BS=torch.from_numpy(document_ids_BS),
            positions_B=torch.tensor(list(positions), dtype=torch.int64),
            continues_B=torch.tensor([row.row > 0 for row in rows], dtype=torch.bool),
            num_bytes=int(self.index.token_bytes_V[targets_BS[targets_BS != IGNORED]].sum()),
        )


class _WorkerBatches(IterableDataset[Batch | Exception]):
    """What one reader process yields: its share of a plan, and the error that ended it, if one did."""

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan

    def __iter__(self) -> Iterator[Batch | Exception]:
        worker = get_worker_info()
        assert worker is not None
        try:
            yield from self._plan.batches(worker=worker.id, num_workers=worker.num_workers)
        except (ValueError, RuntimeError, OSError) as error:
            yield error  # as a value, because the DataLoader would replace its one sentence by a traceback


def _batches_of_workers(plan: _Plan, *, num_workers: int) -> Iterator[Batch]:
    loader = DataLoader(
        _WorkerBatches(plan),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        multiprocessing_context=multiprocessing.get_context(
            "spawn"
        ),  # a fork of a process with threads (gloo, CUDA) may hang
        generator=torch.Generator(),  # else it draws from torch's global one, whose state then depends on num_workers
    )
    for item in loader:
        if isinstance(item, Exception):
            raise item
        yield item


def _unchanged(item: Any) -> Any:
    return item
