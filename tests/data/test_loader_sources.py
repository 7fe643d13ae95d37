"""Batches of several sources against a walk row by row: which rows, on which rank, from which position, how often each token."""

from collections import Counter
from dataclasses import astuple, replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from data import loader
from data.config import DataConfig
from data.index import open_index
from data.loader import Batch, train_batches
from data.split import Source, TrainSplit, open_train
from tests.data.by_hand import fast_rows, mixed_rows

SEED, LENGTH, STREAMS, ROWS = 3, 7, 4, 8
WEIGHTS = ["0.6", "0.3", "0.1"]
NAMES = ["web", "code", "books"]


@pytest.fixture
def documents(random_shards):
    """Three sources: 59, 27 and 14 rows of 7 tokens in an epoch."""
    generator = np.random.default_rng(1)
    code = [[generator.integers(1, 257, n).tolist() for n in shard] for shard in ([20, 9, 1, 30], [61], [50, 22])]
    books = [[generator.integers(1, 257, 100).tolist()]]
    return [random_shards, code, books]


@pytest.fixture
def folders(write_shards, documents):
    return [str(write_shards(shards, name=name)) for name, shards in zip(NAMES, documents, strict=True)]


def make_config(folders: list[str], **changes: object) -> DataConfig:
    shards = [{"name": n, "shards": f, "weight": float(w)} for n, f, w in zip(NAMES, folders, WEIGHTS, strict=False)]
    values = {"sequence_length": LENGTH, "global_batch_size": ROWS, "streams": STREAMS, "heldout": "heldout"}
    return DataConfig.model_validate(values | {"shards": shards} | changes)


def take(
    num: int, config: DataConfig, *, num_ranks: int = 1, accumulation_steps: int = 1, position: int = 0
) -> list[list[Batch]]:
    split = open_train(config)
    layout: dict[str, Any] = {"accumulation_steps": accumulation_steps, "num_ranks": num_ranks, "position": position}
    return [
        list(islice(train_batches(config, split, seed=SEED, rank=rank, **layout), num)) for rank in range(num_ranks)
    ]


def plain(rows: list[dict]) -> list[dict]:
    return [{name: row[name] for name in ("tokens", "targets", "documents", "continues")} for row in rows]


@pytest.mark.parametrize(
    ("num_ranks", "accumulation_steps", "num_workers"), [(1, 1, 0), (2, 1, 0), (4, 2, 0), (1, 2, 2), (2, 1, 1)]
)
def test_a_mixture_has_the_rows_of_a_walk_at_every_layout(
    folders, documents, num_ranks, accumulation_steps, num_workers
):
    num_rows = 1024 * STREAMS + 800  # across the end of a block, and dozens of epochs of each source
    expected = mixed_rows(documents, WEIGHTS, length=LENGTH, streams=STREAMS, seed=SEED, num_rows=num_rows)
    config = make_config(folders, num_workers=num_workers)
    num = num_rows // ROWS * accumulation_steps
    batches = take(num, config, num_ranks=num_ranks, accumulation_steps=accumulation_steps)
    assert list(fast_rows(batches)) == plain(expected)


@pytest.mark.parametrize("position", [8, 1600, 4088, 4096, 4104, 80_000])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_jump_to_any_position_gives_the_rows_that_walking_there_gives(folders, documents, position, num_ranks):
    walked = mixed_rows(documents, WEIGHTS, length=LENGTH, streams=STREAMS, seed=SEED, num_rows=position + 24)
    rows = list(fast_rows(take(3, make_config(folders), num_ranks=num_ranks, position=position)))
    assert rows == plain(walked[position:])


def test_each_token_of_a_source_is_a_target_once_in_each_epoch_of_it(write_shards, wide_tokenizer):
    """Each place of a line has its own id. After k blocks a stream took a known number of rows: each place was a target as often as its
    row was taken, and the unused tail never."""
    lines = {"web": range(1, 201), "code": range(300, 361)}
    folders = [str(write_shards([[list(ids)]], name=name, tokenizer=wide_tokenizer)) for name, ids in lines.items()]
    config = make_config(folders, global_batch_size=256)  # weights 0.6 and 0.3: 2 to 1
    blocks = 3
    (batches,) = take(blocks * 1024 * STREAMS // 256, config)
    seen = Counter(torch.cat([batch.targets_BS.flatten() for batch in batches]).tolist())
    of_stream = [1024 * blocks * 2 // 3, 1024 * blocks - 1024 * blocks * 2 // 3]
    for taken, ids in zip(of_stream, lines.values(), strict=True):
        rows_per_stream = len(ids) // LENGTH // STREAMS
        used = list(ids)[1 : rows_per_stream * STREAMS * LENGTH + 1]
        for place, token in enumerate(used):
            row = place // LENGTH % rows_per_stream
            assert seen[token] == (taken - row + rows_per_stream - 1) // rows_per_stream
        assert not any(seen[token] for token in [ids[0], *list(ids)[len(used) + 1 :]])


def test_counts_over_whole_blocks_are_the_weights_to_a_row_in_every_stream(folders, documents):
    (batches,) = take(2 * 1024 * STREAMS // 256, make_config(folders, global_batch_size=256))
    ends = np.cumsum([sum(map(len, shards)) for shards in documents])
    for stream in range(STREAMS):
        ids = torch.cat([b.document_ids_BS[b.positions_B % STREAMS == stream][:, 0] for b in batches])
        counts = np.bincount(np.searchsorted(ends, ids.numpy(), side="right"), minlength=3)
        for count, weight in zip(counts, WEIGHTS, strict=True):
            assert abs(count - 2048 * float(weight)) < 1


def test_document_ids_tell_the_sources_apart(folders, documents):
    (batches,) = take(512, make_config(folders))
    ids = torch.cat([batch.document_ids_BS.flatten() for batch in batches]).unique().tolist()
    assert ids == list(range(sum(len(shard) for shards in documents for shard in shards)))


def test_a_list_of_one_source_has_the_rows_of_its_path(folders):
    path, listed = make_config([], shards=folders[0]), make_config(folders[:1])
    (rows,), (others,) = take(60, path), take(60, listed)
    for batch, other in zip(rows, others, strict=True):
        for value, same in zip(astuple(batch), astuple(other), strict=True):
            assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same


def test_a_source_that_is_too_small_is_named(folders, write_shards):
    tiny = str(write_shards([[[1, 2]]], name="tiny"))
    config = make_config([folders[0], tiny])
    with pytest.raises(ValueError, match=r"4 x 7 \+ 1 = 29 tokens, but the shards of the source code hold 3"):
        take(1, config)


def test_one_open_split_serves_any_number_of_loaders(folders):
    config = make_config(folders)
    split = open_train(config)
    assert isinstance(split, TrainSplit)
    layout: dict[str, Any] = {"seed": SEED, "accumulation_steps": 1, "rank": 0, "num_ranks": 1, "position": 0}
    one, other = (train_batches(config, split, **layout) for _ in range(2))
    assert all(torch.equal(next(one).tokens_BS, next(other).tokens_BS) for _ in range(20))


def test_ids_of_documents_beyond_int32_come_through_the_pipe(folders, monkeypatch):
    """A first source of 2^31 documents, none of which can be read, moves the ids of the second."""
    huge, other = (open_index(folder) for folder in folders[:2])
    shard = replace(huge.shards[0], documents=1 << 31)
    split = TrainSplit(
        (Source("huge", 0.5, replace(huge, shards=(shard, *huge.shards[1:]))), Source("other", 0.5, other))
    )
    config = make_config(folders[:2], max_skipped_shards=5, num_workers=1)
    monkeypatch.setattr(loader, "in_processes", lambda work, *, num_workers: work(0, 1))
    batches = train_batches(config, split, seed=SEED, accumulation_steps=1, rank=0, num_ranks=1, position=0)
    ids = torch.cat([next(batches).document_ids_BS for _ in range(20)])
    first = (1 << 31) + sum(shard.documents for shard in huge.shards[1:])
    found = set(ids[ids >= first].tolist())
    assert found == set(range(first, first + other.num_documents))
    assert ids.min() == -1
