"""Batches against a slow loop over Python lists: which tokens, on which rank, from which position, at every layout."""

from dataclasses import astuple
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.config import DataConfig
from data.index import open_index
from data.loader import IGNORED, Batch, heldout_batches, train_batches
from tests.data.by_hand import fast_rows, rows_of

SEED = 3


def make_config(**changes: int) -> DataConfig:
    values = {"sequence_length": 7, "global_batch_size": 8, "streams": 4} | changes
    return DataConfig(shards="train", heldout="heldout", **values)  # type: ignore[arg-type]


@pytest.fixture
def folder(write_shards, random_shards) -> Path:
    return write_shards(random_shards)


def take(
    num: int, config: DataConfig, folder: Path, *, num_ranks: int, accumulation_steps: int = 1, position: int = 0
) -> list[list[Batch]]:
    """The next batches of every rank."""
    index = open_index(folder)
    return [
        list(
            islice(
                train_batches(
                    config,
                    index,
                    seed=SEED,
                    accumulation_steps=accumulation_steps,
                    rank=rank,
                    num_ranks=num_ranks,
                    position=position,
                ),
                num,
            )
        )
        for rank in range(num_ranks)
    ]


@pytest.mark.parametrize(
    ("num_ranks", "accumulation_steps", "num_workers"),
    [(1, 1, 0), (2, 1, 0), (4, 1, 0), (1, 2, 0), (4, 2, 0), (1, 2, 2)],
)
def test_two_and_a_half_epochs_are_the_slow_loops_rows_at_every_layout(
    folder, random_shards, num_ranks, accumulation_steps, num_workers
):
    expected = rows_of(random_shards, length=7, streams=4, seed=SEED, num_epochs=4)
    micro_step_rows = 8 // accumulation_steps
    num = 5 * len(expected) // 8 // micro_step_rows
    config = make_config(num_workers=num_workers)
    batches = take(num, config, folder, num_ranks=num_ranks, accumulation_steps=accumulation_steps)
    assert list(fast_rows(batches)) == expected[: num * micro_step_rows]
    for rank, of_rank in enumerate(batches):
        for k, batch in enumerate(of_rank):
            assert batch.positions_B.tolist() == [
                p for p in range(k * micro_step_rows, (k + 1) * micro_step_rows) if p % num_ranks == rank
            ]


@pytest.mark.parametrize(("streams", "rows", "length"), [(1, 3, 11), (8, 4, 5), (3, 6, 40), (2, 2, 200)])
def test_rows_follow_the_definition_for_other_shapes(folder, random_shards, streams, rows, length):
    expected = rows_of(random_shards, length=length, streams=streams, seed=SEED, num_epochs=9)
    config = make_config(streams=streams, global_batch_size=rows, sequence_length=length)
    num = len(expected) // rows
    assert list(fast_rows(take(num, config, folder, num_ranks=1))) == expected[: num * rows]


def test_a_resume_at_any_position_repeats_the_same_rows(folder):
    config = make_config()
    whole = list(fast_rows(take(30, config, folder, num_ranks=1)))
    for micro_step in range(29):
        resumed = take(2, config, folder, num_ranks=2, position=8 * micro_step)
        assert list(fast_rows(resumed)) == whole[8 * micro_step : 8 * micro_step + 16]


def test_a_row_continues_the_row_one_round_of_streams_before_it(folder):
    rows = list(fast_rows(take(20, make_config(), folder, num_ranks=1)))
    kept = 0
    for before, after in zip(rows, rows[4:], strict=False):
        if after["continues"]:
            assert after["tokens"][0] == before["targets"][-1]
            kept += 1
    assert 0 < kept < len(rows) - 4


def test_bytes_are_those_of_the_targets(folder):
    for batch in take(9, make_config(), folder, num_ranks=2)[1]:
        assert batch.num_bytes == (batch.targets_BS != 0).sum()


def test_types_and_shapes_are_those_that_are_promised(folder):
    batch = take(1, make_config(), folder, num_ranks=2)[0][0]
    assert batch.tokens_BS.shape == batch.targets_BS.shape == batch.document_ids_BS.shape == (4, 7)
    assert batch.positions_B.shape == batch.continues_B.shape == (4,)
    assert {tensor.dtype for tensor in astuple(batch)[:4]} == {torch.int64}
    assert batch.continues_B.dtype == torch.bool


def test_reader_processes_leave_the_random_state_of_training_alone(folder):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    (folder / "train-000001.tar").write_bytes(b"\1" * (folder / "train-000001.tar").stat().st_size)
    with pytest.raises(RuntimeError, match=r"^the shard .*train-000001\.tar is damaged at byte 0: [^\n]*$"):
        take(50, make_config(num_workers=1), folder, num_ranks=1)
    assert torch.equal(torch.rand(3), expected)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def zero_sidecar(folder: Path) -> None:
    sidecar = folder / "train-000001.idx"
    sidecar.write_bytes(bytes(sidecar.stat().st_size))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda folder: flip(folder / "train-000001.tar", 512 + 140),
            r"train-000001\.tar is damaged at byte 0: .*checksum",
        ),
        (lambda folder: flip(folder / "train-000001.tar", 20), r"train-000001\.tar is damaged at byte 0"),
        (
            lambda folder: (folder / "train-000001.tar").write_bytes(bytes(10240)),
            r"train-000001\.tar is damaged at byte 0",
        ),
        (zero_sidecar, r"the sidecar .*train-000001\.idx has not the checksum"),
    ],
)
def test_damage_that_the_sizes_do_not_show_is_an_error_that_names_the_file(folder, damage, reason):
    damage(folder)
    with pytest.raises(RuntimeError, match=reason):
        take(50, make_config(), folder, num_ranks=1)


def test_a_shard_that_vanishes_while_training_is_named(folder):
    batches = train_batches(
        make_config(), open_index(folder), seed=SEED, accumulation_steps=1, rank=0, num_ranks=1, position=0
    )
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(RuntimeError, match=r"train-00000\d\.tar cannot be opened \(No such file"):
        next(batches)


def test_too_few_tokens_and_impossible_positions_are_refused_before_the_first_batch(folder):
    index = open_index(folder)
    layout: dict[str, Any] = {"seed": SEED, "accumulation_steps": 1, "rank": 0, "num_ranks": 1}
    with pytest.raises(
        ValueError, match=rf"needs at least .* = 4 x 200 \+ 1 = 801 tokens, but the shards hold {index.num_tokens}"
    ):
        train_batches(make_config(sequence_length=200), index, position=0, **layout)
    with pytest.raises(ValueError, match=r"the position is 12 and .* is 8"):
        train_batches(make_config(), index, position=12, **layout)
    with pytest.raises(ValueError, match="3 processes"):
        train_batches(make_config(), index, position=0, **{**layout, "num_ranks": 3})


@pytest.fixture
def distinct_line(write_shards, wide_tokenizer) -> Path:
    """A line in which every place but the ends of documents has its own id."""
    documents = [list(range(start, start + size)) for start, size in ((1, 50), (51, 3), (54, 200), (254, 30), (284, 7))]
    return write_shards([documents[:2], documents[2:]], tokenizer=wide_tokenizer)


@pytest.mark.parametrize("max_tokens", [1, 6, 7, 55, 56, 57, 100, 293, 294, 295, 10**9])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_every_heldout_target_is_scored_exactly_once_at_any_layout(distinct_line, max_tokens, accumulation_steps):
    index = open_index(distinct_line)
    assert index.num_tokens == 295
    line = [*range(1, 51), 0, *range(51, 54), 0, *range(54, 254), 0, *range(254, 284), 0, *range(284, 291), 0]
    num_targets = min(294, max_tokens)
    successor = {(token, i): line[i + 1] for i, token in enumerate(line[:-1])}
    for num_ranks in (1, 2, 4):
        batches = [
            list(
                heldout_batches(
                    make_config(),
                    index,
                    max_tokens=max_tokens,
                    accumulation_steps=accumulation_steps,
                    rank=rank,
                    num_ranks=num_ranks,
                )
            )
            for rank in range(num_ranks)
        ]
        assert len({len(of_rank) for of_rank in batches}) == 1
        every = [batch for of_rank in batches for batch in of_rank]
        assert {len(batch.positions_B) for batch in every} == {8 // accumulation_steps // num_ranks}
        targets = torch.cat([batch.targets_BS.flatten() for batch in every])
        tokens = torch.cat([batch.tokens_BS.flatten() for batch in every])
        documents = torch.cat([batch.document_ids_BS.flatten() for batch in every])
        scored = targets != IGNORED
        assert sorted(targets[scored].tolist()) == sorted(line[1 : num_targets + 1])
        assert sorted(tokens[scored].tolist()) == sorted(line[:num_targets])
        pairs = {
            (token, target) for token, target in zip(tokens[scored].tolist(), targets[scored].tolist(), strict=True)
        }
        assert pairs == {(token, target) for (token, i), target in successor.items() if i < num_targets}
        assert (tokens[~scored] == 0).all()
        assert (documents[~scored] == -1).all()
        assert sum(batch.num_bytes for batch in every) == 2 * sum(token > 0 for token in line[1 : num_targets + 1])


def test_evaluation_reads_the_shards_in_the_order_of_the_index(folder, random_shards):
    config = make_config(global_batch_size=1, streams=1)
    batches = heldout_batches(config, open_index(folder), max_tokens=10**6, accumulation_steps=1, rank=0, num_ranks=1)
    tokens = np.concatenate([batch.tokens_BS[batch.targets_BS != IGNORED] for batch in batches])
    line = [token for shard in random_shards for document in shard for token in [*document, 0]]
    assert tokens.tolist() == line[:-1]
