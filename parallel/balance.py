"""A better owner table by measured load: groups change places with each other until the busiest rank cannot be helped.

Integers only and ties by the lowest id, so that every rank finds the same table from the same counts. Owns neither the counts
(parallel/expert.py) nor the move (parallel/moving.py). Called by parallel/placement.py.

Shape letters: G groups, W ranks, L places of a rank, P = W L places in all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from model.owners import OwnerTable

# What a move must bring, in percent. An exchange of two places costs the bytes of two groups with their moments, 12 bytes a weight, so
# one is made only if a rank's load falls by more than 1 % of the mean: below it the counts of a few thousand tokens are noise
# (1 / sqrt(10,000) = 1 %). And a bank whose busiest rank would not fall by 5 % in all stays as it is: since the ranks wait for the
# busiest, that is about what the experts' share of a step could gain, and the all-gather of weights after a move is one of a step.
LEAST_SWAP_PERCENT = 1
LEAST_MOVE_PERCENT = 5


class _Swap(NamedTuple):
    """Two places, the first of the busiest rank, and the larger load of their two ranks afterwards."""

    busy: int
    other: int
    load: int


def balanced(table: OwnerTable, load_G: Sequence[int]) -> OwnerTable:
    """The table after the exchanges that help, or `table` itself where they do not help enough. load_G: copies routed to each group.

    Step by step the group and the place of another rank (perhaps of padding) change that lower the larger load of the two ranks the
    most. The table that comes out is not changed again by the same loads, and its busiest rank never has more than before.
    """
    size, num_ranks = table.num_local, table.num_ranks
    group_P = np.full(size * num_ranks, -1)
    group_P[list(table.places)] = np.arange(len(table.places))
    load_P = np.append(np.array(load_G, dtype=np.int64), 0)[group_P]  # padding is the -1st group
    total = int(load_P.sum())
    before = int(load_P.reshape(num_ranks, size).sum(1).max())
    while (swap := _best_swap(load_P.reshape(num_ranks, size), total)) is not None:
        for values in (load_P, group_P):
            values[[swap.busy, swap.other]] = values[[swap.other, swap.busy]]
    after = int(load_P.reshape(num_ranks, size).sum(1).max())
    if (before - after) * 100 < before * LEAST_MOVE_PERCENT or before == after:
        return table
    place_of = {int(group): place for place, group in enumerate(group_P)}
    return OwnerTable(tuple(place_of[group] for group in range(len(table.places))), num_ranks)


def _best_swap(load_WL: np.ndarray, total: int) -> _Swap | None:
    """Of the busiest rank with any other. None: no exchange lowers the larger load of the two by more than LEAST_SWAP_PERCENT."""
    num_ranks, size = load_WL.shape
    load_W = load_WL.sum(1)
    busiest = int(load_W.argmax())  # the first of equal ones
    gained_LP = load_WL[busiest][:, None] - load_WL.reshape(-1)  # by which the busiest falls and the other grows
    larger_LP = np.maximum(load_W[busiest] - gained_LP, np.repeat(load_W, size) + gained_LP)
    larger_LP[:, busiest * size : (busiest + 1) * size] = load_W[busiest]
    best = int(larger_LP.argmin())  # the first of equal ones
    place, other = divmod(best, num_ranks * size)
    load = int(larger_LP[place, other])
    if (int(load_W[busiest]) - load) * 100 * num_ranks <= total * LEAST_SWAP_PERCENT:
        return None
    return _Swap(busiest * size + place, other, load)
