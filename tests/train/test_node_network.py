"""Which node is blamed for which slow or failing pairs."""

import pytest

from parallel.bandwidth import Rate, ring_rounds
from train.node_network import join_rates, judge_network
from train.node_verdict import conclude


def blamed(gb: dict[tuple[int, int], float | None], limit: float | None = None) -> tuple[int, tuple[int, ...], str]:
    """Exit code, bad ranks and sentences for all-to-all figures by pair; None: the pair failed."""
    rates = {pair: Rate(problem="it hangs") if value is None else Rate(9.0, value) for pair, value in gb.items()}
    size = 1 + max(max(pair) for pair in gb)
    names = [f"n{rank}" for rank in range(size)]
    problems = judge_network(rates, names=names, min_network_gb=limit)
    verdict = conclude(problems, size=size)
    return verdict.exit_code, verdict.bad, "\n".join(problem.sentence for problem in problems)


@pytest.mark.parametrize("size", [3, 4, 5, 8])
def test_the_node_with_a_slow_link_is_found_at_every_size(size: int):
    for slow in range(size):
        pairs = [pair for pairs in ring_rounds(size) for pair in pairs]
        code, bad, said = blamed({pair: 0.4 if slow in pair else 1.0 for pair in pairs})
        assert (code, bad) == (1, (slow,))
        assert f"all-to-all between n{slow} and n" in said
        assert "0.4 GB/s at best and the limit is 0.5 GB/s" in said


def test_one_slow_pair_of_two_good_nodes_blames_nobody():
    assert blamed({(0, 1): 1.0, (1, 2): 0.1, (2, 3): 1.0, (0, 3): 1.0})[0] == 0


def test_half_of_the_usual_is_enough():
    assert blamed({(0, 1): 1.0, (1, 2): 0.5, (0, 2): 0.5})[0] == 0


def test_two_nodes_are_held_to_the_limit_alone():
    assert blamed({(0, 1): 0.01})[0] == 0
    code, _, said = blamed({(0, 1): 0.01}, limit=0.02)
    assert code == 3  # which of the two it is, one pair cannot tell
    assert "--min-network-gb" in said


def test_the_limit_of_the_command_finds_what_is_usual_but_too_slow():
    assert blamed({(0, 1): 0.9, (1, 2): 0.8, (0, 2): 0.7}, limit=0.85)[:2] == (1, (2,))
    assert blamed({(0, 1): 0.7, (1, 2): 0.7, (0, 2): 0.7}, limit=0.85)[0] == 3


def test_a_node_that_reaches_nobody_is_blamed_and_each_failed_pair_named():
    code, bad, said = blamed({(0, 1): 1.0, (1, 2): None, (2, 3): None, (0, 3): 1.0})
    assert (code, bad) == (1, (2,))
    assert "between n1 and n2 it hangs" in said
    assert "between n2 and n3 it hangs" in said


def test_a_failed_pair_of_two_nodes_that_others_reach_costs_one_of_them():
    assert blamed({(0, 1): 1.0, (1, 2): None, (2, 3): 1.0, (0, 3): 1.0})[:2] == (1, (2,))


def test_where_all_pairs_fail_leaving_out_nodes_would_not_help():
    assert blamed({(0, 1): None})[0] == 3
    assert blamed({(0, 1): None, (1, 2): None, (0, 2): None})[0] == 3


def test_a_pair_has_the_smaller_figure_of_its_ends_and_fails_with_either():
    pairs = [(0, 1), (1, 2), (0, 2)]
    told = {
        0: {(0, 1): Rate(3.0, 1.0), (0, 2): Rate(1.0, 1.0)},
        1: {(0, 1): Rate(2.0, 4.0), (1, 2): Rate(problem="broken")},
    }
    joined = join_rates(told, pairs)
    assert joined[0, 1] == Rate(2.0, 1.0)
    assert joined[1, 2].problem == "broken"
    assert joined[0, 2].problem is not None  # n2 told nothing
