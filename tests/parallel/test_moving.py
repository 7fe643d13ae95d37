"""Which elements travel from where to where, against a move of every element by itself."""

import itertools
import random

import pytest

from model.owners import OwnerTable
from parallel.moving import Stored, Weight, journeys
from tests.parallel.placed import random_table


def cut(num_elements: int, parts: int, draw: random.Random) -> list[tuple[int, int]]:
    edges = [0, *sorted(draw.randint(0, num_elements) for _ in range(parts - 1)), num_elements]
    return list(itertools.pairwise(edges))


def layout(table: OwnerTable, *, size: int, copies: int, stage: int, draw: random.Random) -> list[list[Stored]]:
    """By expert rank; an expert group is `num_ranks` consecutive ranks. Stage 0: each has all; else the copies share it in any parts."""
    local = table.num_local * size
    shares = [[(0, local)] * copies if stage == 0 else cut(local, copies, draw) for _ in range(table.num_ranks)]
    return [
        [Stored(copy * table.num_ranks + owner, copy, *shares[owner][copy]) for copy in range(copies)]
        for owner in range(table.num_ranks)
    ]


def contents(
    table: OwnerTable, stored: list[list[Stored]], *, size: int
) -> dict[int, dict[int, tuple[int, int] | None]]:
    """By rank: of each element of the local tensor that it stores, the group and the element in the group; None is padding."""
    found = {}
    for owner, holders in enumerate(stored):
        groups = table.groups_of(owner)
        for one in holders:
            held = ((e, groups[e // size]) for e in range(one.start, one.end))
            found[one.rank] = {e: None if group is None else (group, e % size) for e, group in held}
    return found


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize(("groups", "ranks", "size"), [(5, 2, 3), (5, 4, 6), (7, 3, 1), (4, 2, 5)])
def test_after_the_journeys_every_element_is_where_the_new_table_wants_it(groups, ranks, size, copies, stage):
    for seed in range(5):
        draw = random.Random(seed)
        before, after = (random_table(groups, ranks, seed=f"{seed}/{which}") for which in range(2))
        stored = layout(before, size=size, copies=copies, stage=stage, draw=draw)
        old, wanted = (contents(table, stored, size=size) for table in (before, after))
        new = {rank: dict(elements) for rank, elements in old.items()}
        kept = {place for place, next_ in zip(before.places, after.places, strict=True) if place == next_}
        owner_of = {one.rank: owner for owner, holders in enumerate(stored) for one in holders}
        copy_of = {one.rank: one.copy for holders in stored for one in holders}
        every = {owner: list(journeys(before, after, Weight(size, stored, None), of=owner)) for owner in range(ranks)}
        for one in {one for of_owner in every.values() for one in of_owner}:
            for rank in (one.source, one.target):
                assert one in every[owner_of[rank]], "both ends must know of it"
            if stage == 0:
                assert copy_of[one.source] == copy_of[one.target], "each expert group sends inside itself"
            for i in range(one.numel):
                assert one.start + i in old[one.source]
                new[one.target][one.target_start + i] = old[one.source][one.start + i]
                assert owner_of[one.target] * before.num_local + (one.target_start + i) // size not in kept
        for rank, elements in wanted.items():
            for element, held in elements.items():
                if held is not None:
                    assert new[rank][element] == held


def test_what_nobody_stores_is_an_error():
    stored = [[Stored(0, 0, 0, 4)], [Stored(1, 0, 0, 3)]]
    with pytest.raises(RuntimeError, match="element 3 of a local tensor is stored by none"):
        list(journeys(OwnerTable((0, 1, 2, 3), 2), OwnerTable((3, 1, 2, 0), 2), Weight(2, stored, None), of=0))
