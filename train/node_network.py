"""Which nodes have a bad network, from the figures of their pairs: a function of figures alone.

Owns what must hold of them; parallel/bandwidth.py measures. Called by launcher/preflight.py on the node that decides.
"""

import statistics
from collections.abc import Mapping, Sequence

from parallel.bandwidth import Rate
from train.node_verdict import Problem

CHECK = "network"
LEAST_SHARE = 0.5  # of what is usual between nodes
VERBS = {"all_reduce_gb": "all-reduce", "all_to_all_gb": "all-to-all"}

Pair = tuple[int, int]


def join_rates(told: Mapping[int, Mapping[Pair, Rate]], pairs: Sequence[Pair]) -> dict[Pair, Rate]:
    """The figures of each pair, of which each end told its own: the smaller ones, and a problem where either end has one."""
    joined: dict[Pair, Rate] = {}
    for pair in pairs:
        ends = [told[rank][pair] for rank in pair if pair in told.get(rank, {})]
        problems = [rate.problem for rate in ends if rate.problem is not None]
        if problems or len(ends) < 2:
            joined[pair] = Rate(problem=problems[0] if problems else "one of the two told no figures")
        else:
            joined[pair] = Rate(**{verb: min(getattr(rate, verb) for rate in ends) for verb in VERBS})
    return joined


def judge_network(rates: Mapping[Pair, Rate], *, names: Sequence[str], min_network_gb: float | None) -> list[Problem]:
    """Bad is a node that no neighbour reaches at half of the usual rate, or at `min_network_gb` GB/s.

    Usual is the median over the nodes of their better neighbour's figure. The median of the pairs would not do: one bad node of three
    makes two of three pairs slow. Two nodes share one figure, so that only the limit can be missed. A pair that fails between nodes whose
    other neighbours reach them is the problem of its higher rank: one of the two has to go.
    """
    problems: list[Problem] = []
    for verb, label in VERBS.items():
        figures = {pair: getattr(rate, verb) or 0.0 for pair, rate in rates.items()}
        best = {rank: max(gb for pair, gb in figures.items() if rank in pair) for rank in sorted(set().union(*rates))}
        usual = statistics.median(best.values())
        least = LEAST_SHARE * usual
        limit, source = least, f"half of the {usual:.3g} GB/s that is usual here"
        if min_network_gb is not None and min_network_gb > least:
            limit, source = min_network_gb, "--min-network-gb"
        for rank, gb in best.items():
            if 0 < gb < limit:
                problems.append(
                    Problem(
                        rank,
                        CHECK,
                        f"{source} must be reached, but {label} between {names[rank]} and {_neighbours(rank, rates, names)} moves "
                        f"{gb:.3g} GB/s at best and the limit is {limit:.3g} GB/s: leave it out, and look at its network card",
                    )
                )
    return problems + _failed_pairs(rates, names)


def _failed_pairs(rates: Mapping[Pair, Rate], names: Sequence[str]) -> list[Problem]:
    failed = [pair for pair, rate in rates.items() if rate.problem is not None]
    well = {rank for pair, rate in rates.items() if rate.problem is None for rank in pair}
    problems: list[Problem] = []
    for pair in failed:
        lost = [rank for rank in pair if rank not in well]
        # Where one end reaches nobody it is that one. Where all pairs fail it is every node, which conclude() takes for nobody's fault.
        for rank in lost or [max(pair)]:
            problems.append(
                Problem(
                    rank,
                    CHECK,
                    f"a pair of neighbours must be measured, but between {names[pair[0]]} and {names[pair[1]]} {rates[pair].problem}: look "
                    "at their network (NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME may name the wrong card)",
                )
            )
    return problems


def _neighbours(rank: int, rates: Mapping[Pair, Rate], names: Sequence[str]) -> str:
    return " and ".join(names[other] for pair in rates if rank in pair for other in pair if other != rank)
