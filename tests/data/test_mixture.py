"""How sources share the rows: counts against fractions, places against a walk row by row, and any jump."""

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.mixture import Mixture, MixtureOrder
from tests.data.by_hand import plan_of_stream

weights_of_sources = st.lists(st.integers(1, 40), min_size=1, max_size=9).map(
    lambda parts: [part / 8 for part in parts]
)


def exact(weights: list[float]) -> list[Fraction]:
    return [Fraction(str(weight)) / sum(Fraction(str(other)) for other in weights) for weight in weights]


@given(weights=weights_of_sources, block=st.integers(0, 10**25))
def test_after_any_number_of_blocks_each_source_is_within_one_row_of_its_weight(weights, block):
    rows = Mixture.of_weights(weights, streams=4, seed=1).rows_before(block)
    assert sum(rows) == 1024 * block
    for taken, share in zip(rows, exact(weights), strict=True):
        assert abs(taken - 1024 * block * share) < 1


@given(weights=weights_of_sources, block=st.integers(0, 10**25))
def test_a_block_has_1024_rows_and_each_source_within_two_of_its_weight(weights, block):
    mixture = Mixture.of_weights(weights, streams=4, seed=1)
    counts = [b - a for a, b in zip(mixture.rows_before(block), mixture.rows_before(block + 1), strict=True)]
    assert sum(counts) == 1024
    tolerance = 1 if len(weights) == 2 else 2
    for count, share in zip(counts, exact(weights), strict=True):
        assert count >= 0
        assert abs(count - 1024 * share) < tolerance


@pytest.mark.parametrize("weight", [1 / 1023, 0.001])
def test_the_smallest_weight_that_the_config_lets_pass_never_takes_a_row_back(weight):
    mixture = Mixture.of_weights([0.3456, weight, 0.6543 - weight], streams=1, seed=1)
    before = [mixture.rows_before(block) for block in range(3000)]
    assert all(after >= earlier for a, b in pairwise(before) for earlier, after in zip(a, b, strict=True))
    assert before[-1][1] > 2900


def test_weights_mean_what_is_written():
    """0.1 as a binary fraction would be a little more than a tenth, and after 10^17 blocks hundreds of rows more."""
    blocks = 10**17
    rows = Mixture.of_weights([0.7, 0.2, 0.1], streams=1, seed=1).rows_before(blocks)
    assert rows == [7 * 1024 * blocks // 10, 2 * 1024 * blocks // 10, 1024 * blocks // 10]


@pytest.mark.parametrize("weights", [["1"], ["0.5", "0.5"], ["0.7", "0.2", "0.1"], ["3", "1", "1", "0.01"]])
def test_rows_lie_where_a_walk_finds_them(weights):
    streams, seed = 3, 11
    order = MixtureOrder(Mixture.of_weights(list(map(float, weights)), streams=streams, seed=seed), remembered_blocks=6)
    plans = [plan_of_stream(weights, stream=stream, seed=seed) for stream in range(streams)]
    taken, last = [Counter() for _ in range(streams)], [-1] * streams
    for position in range(2 * 1024 * streams + 700):
        stream = position % streams
        source = next(plans[stream])
        row = order.locate(position)
        assert (row.source, row.position) == (source, taken[stream][source] * streams + stream)
        assert row.continues == (last[stream] == source)
        taken[stream][source] += 1
        last[stream] = source


@given(
    weights=weights_of_sources,
    streams=st.integers(1, 7),
    seed=st.integers(0, 2**62),
    position=st.integers(0, 10**30),
    remembered=st.integers(1, 4),
)
def test_a_jump_finds_what_walking_there_finds(weights, streams, seed, position, remembered):
    mixture = Mixture.of_weights(weights, streams=streams, seed=seed)
    walking = MixtureOrder(mixture, remembered_blocks=8)
    first = max(0, position - 40 * streams)
    walked = [walking.locate(p) for p in range(first, position + 1)][-1]
    assert MixtureOrder(mixture, remembered_blocks=remembered).locate(position) == walked


@given(weights=weights_of_sources, seed=st.integers(0, 2**62), block=st.integers(0, 10**20))
def test_the_rows_that_a_stream_takes_of_a_source_are_consecutive(weights, seed, block):
    streams = 5
    mixture = Mixture.of_weights(weights, streams=streams, seed=seed)
    order = MixtureOrder(mixture, remembered_blocks=2)
    expected = [rows * streams + 2 for rows in mixture.rows_before(block)]
    for row in range(1024 * block, 1024 * (block + 1)):
        found = order.locate(row * streams + 2)
        assert found.position == expected[found.source]
        expected[found.source] += streams
    assert expected == [rows * streams + 2 for rows in mixture.rows_before(block + 1)]


def test_streams_and_seeds_mix_in_orders_of_their_own():
    def sources(stream: int, seed: int) -> list[int]:
        order = MixtureOrder(Mixture.of_weights([0.5, 0.5], streams=2, seed=seed), remembered_blocks=1)
        return [order.locate(row * 2 + stream).source for row in range(1024)]

    orders = [sources(0, 1), sources(1, 1), sources(0, 2)]
    assert all(sum(order) == 512 for order in orders)
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_the_order_is_what_it_was_in_every_earlier_version():
    order = MixtureOrder(Mixture.of_weights([0.5, 0.3, 0.2], streams=2, seed=7), remembered_blocks=1)
    assert [order.locate(p).source for p in range(24)] == [
        2,
        0,
        0,
        0,
        0,
        0,
        0,
        1,
        1,
        1,
        0,
        2,
        1,
        0,
        1,
        0,
        0,
        1,
        1,
        1,
        2,
        1,
        1,
        1,
    ]
    assert order.locate(10**15).position == 500000000000000


def test_rows_taken_are_exact_at_the_end_of_a_block_and_between_counts_inside():
    mixture = Mixture.of_weights([0.75, 0.25], streams=4, seed=1)
    assert mixture.rows_taken(0) == [0, 0]
    assert mixture.rows_taken(4 * 1024 * 3) == [9216, 3072]
    assert mixture.rows_taken(4 * 1024 * 3 + 1000) == [9216 + 750, 3072 + 250]
