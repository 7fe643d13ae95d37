"""Geometry of the line and order of the shards: pure arithmetic, checked against enumeration and pinned values."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import Line, rank_positions, shard_order

FEW = settings(max_examples=60, deadline=None)


@pytest.mark.parametrize(
    ("seed", "epoch", "order"),
    [(1, 0, [5, 3, 7, 0, 4, 2, 6, 1]), (1, 1, [5, 2, 3, 7, 4, 1, 0, 6]), (2, 0, [3, 2, 6, 1, 5, 4, 0, 7])],
)
def test_shard_order_is_what_it_was_in_every_earlier_version(seed, epoch, order):
    assert shard_order(8, seed=seed, epoch=epoch) == order


@FEW
@given(num_shards=st.integers(0, 40), seed=st.integers(0, 2**40), epoch=st.integers(0, 2**40))
def test_every_epoch_reads_every_shard_once(num_shards, seed, epoch):
    assert sorted(shard_order(num_shards, seed=seed, epoch=epoch)) == list(range(num_shards))


@FEW
@given(length=st.integers(1, 9), streams=st.integers(1, 7), surplus=st.integers(0, 300))
def test_training_rows_of_an_epoch_share_no_target_and_waste_less_than_a_row_per_stream(length, streams, surplus):
    num_tokens = streams * length + 1 + surplus
    line = Line.for_training(num_tokens, length=length, streams=streams)
    targets = []
    for position in range(line.rows_per_epoch):
        row = line.locate(position)
        assert (row.epoch, row.num_targets) == (0, length)
        targets += range(row.first_token + 1, row.first_token + length + 1)
    assert len(set(targets)) == len(targets)
    assert set(targets) <= set(range(1, num_tokens))
    assert num_tokens - 1 - len(targets) < (streams + 1) * length


@FEW
@given(
    length=st.integers(1, 9), streams=st.integers(1, 7), surplus=st.integers(0, 300), position=st.integers(0, 10**30)
)
def test_row_p_plus_streams_continues_row_p_inside_an_epoch(length, streams, surplus, position):
    line = Line.for_training(streams * length + 1 + surplus, length=length, streams=streams)
    row, later = line.locate(position), line.locate(position + streams)
    assert later.stream == row.stream
    if later.epoch == row.epoch:
        assert (later.row, later.first_token) == (row.row + 1, row.first_token + length)
    else:
        assert (later.epoch, later.row) == (row.epoch + 1, 0)
        assert later.first_token == row.stream * line.rows_per_stream * length


@FEW
@given(
    num_tokens=st.integers(2, 300), length=st.integers(1, 9), streams=st.integers(1, 7), max_tokens=st.integers(1, 400)
)
def test_evaluation_rows_score_each_target_exactly_once(num_tokens, length, streams, max_tokens):
    line = Line.for_evaluation(num_tokens, length=length, streams=streams, max_tokens=max_tokens)
    targets = []
    for position in range(line.rows_per_epoch):
        row = line.locate(position)
        targets += range(row.first_token + 1, row.first_token + row.num_targets + 1)
    assert sorted(targets) == list(range(1, min(num_tokens, max_tokens + 1)))


@FEW
@given(first=st.integers(0, 10**20), rows=st.integers(1, 12), num_ranks=st.integers(1, 6))
def test_the_ranks_share_out_a_micro_step_by_position_modulo_ranks(first, rows, num_ranks):
    parts = [
        list(rank_positions(first, micro_step_rows=rows, rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)
    ]
    assert sorted(position for part in parts for position in part) == list(range(first, first + rows))
    assert all(position % num_ranks == rank for rank, part in enumerate(parts) for position in part)


def test_sizes_beyond_64_bits_do_not_overflow():
    line = Line.for_training(10**30, length=4096, streams=1024)
    row = line.locate(10**40)
    assert 0 <= row.first_token <= 10**30 - 4097
    assert row.epoch == 10**40 // (((10**30 - 1) // 4096 // 1024) * 1024)


@pytest.mark.parametrize(("num_tokens", "fits"), [(33, True), (32, False), (0, False)])
def test_training_needs_streams_times_length_plus_one_tokens(num_tokens, fits):
    if fits:
        assert Line.for_training(num_tokens, length=8, streams=4).rows_per_stream == 1
        return
    with pytest.raises(
        ValueError, match=rf"data.streams x data.sequence_length \+ 1 = 4 x 8 \+ 1 = 33 tokens.*hold {num_tokens}"
    ):
        Line.for_training(num_tokens, length=8, streams=4)


def test_evaluation_without_a_target_is_refused():
    with pytest.raises(ValueError, match=r"data\.heldout holds 1 tokens"):
        Line.for_evaluation(1, length=8, streams=4, max_tokens=100)
