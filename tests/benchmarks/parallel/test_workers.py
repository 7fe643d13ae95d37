"""The benchmark's workers on small layers: they run, they count what the formulas say, and they refuse a wrong layer."""

import math

import pytest
import torch

from benchmarks.parallel import trace, workers
from benchmarks.parallel.checks import TOLERANCE, check_close
from benchmarks.parallel.parts import by_formula
from benchmarks.parallel.placing import Way
from benchmarks.parallel.subjects import FeedForward, Heads, SwitchAll
from tests.pool import RankError


def feed_forward(top_k: int, num_experts: int = 4) -> FeedForward:
    return FeedForward("small", d_model=16, num_experts=num_experts, expert_dim=8, top_k=top_k, length=12)


@pytest.mark.parametrize("top_k", [1, 3])
def test_deepspeeds_layer_is_its_loop_and_sends_its_padded_buffers(pool, top_k):
    ranks = pool(2).run(workers.beside_deepspeed, feed_forward(top_k), 2)
    sizes = {rank.sent[workers.DEEPSPEED] for rank in ranks}
    # four exchanges of E / 2 experts' C rows of D float32 numbers; C: the most tokens of a rank that chose one expert
    (size,) = sizes
    capacity, rest = divmod(size, 4 * 2 * 16 * 4)
    assert rest == 0
    assert math.ceil(12 * top_k / 4) <= capacity <= 12
    assert all(len(one) == 2 for rank in ranks for one in rank.seconds.values())
    assert {rank.sent[workers.NO_EXCHANGE] for rank in ranks} == {0}


def test_deepspeed_refuses_experts_that_do_not_divide_over_the_ranks(pool):
    with pytest.raises(RankError, match="divisible"):
        pool(2).run(workers.beside_deepspeed, feed_forward(3, num_experts=5), 2)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("subject", [Heads(2, 2, 3, 16, 4, 1, 8), Heads(1, 4, 5, 16, 4, 2, 5)])
def test_counters_are_the_formulas(pool, processes, subject):
    ranks = pool(processes).run(workers.chosen_and_sent, subject)
    assert [rank.sent for rank in ranks] == by_formula(subject, ranks)


def test_every_way_is_timed_and_counted(pool):
    ways = [Way(chunks=2), Way("weights", overlap=False)]
    ranks = pool(2).run(workers.in_all_ways, feed_forward(3), ways, 3)
    for rank in ranks:
        assert rank.seconds.keys() == rank.sent.keys() == rank.held.keys() == {way.name for way in ways}
        assert (
            rank.sent[ways[1].name] == 2 * 2 * (2 * 16 * 8) * 4
        )  # two experts' two matrices and their gradients, to one rank
        assert all(0 < rank.held[way.name] < sum(rank.seconds[way.name]) for way in ways)


def test_a_trace_of_each_rank_shows_its_exchanges(pool, tmp_path):
    subject = SwitchAll(sequences=1, length=16)
    paths = pool(2).run(workers.traced, subject, Way(), str(tmp_path))
    assert len(set(paths)) == 2
    assert all(trace.read(path).exchange > 0 for path in paths)


@pytest.mark.parametrize(
    "found", [torch.tensor([1.0, 2.0 + 3 * TOLERANCE]), torch.tensor([1.0, math.nan]), torch.ones(3)]
)
def test_a_wrong_layer_is_refused(found):
    expected = torch.tensor([1.0, 2.0])
    check_close(expected + TOLERANCE, expected, what="it")
    with pytest.raises(RuntimeError, match="it must equal one process"):
        check_close(found, expected, what="it")
