"""The shifts of the layers: which distances they reach, by how many paths, and what follows the last of them."""

from collections import Counter
from itertools import product
from typing import Any

import pytest

from model.hsm.schedule import Schedule, largest_num_shifts


def shifts(*mixers: str, num_shifts: int | None = None, wrap: Any = "repeat", hybrid: Any = "skip") -> list[int]:
    """Of the HSM layers, in order."""
    schedule = Schedule(num_shifts=num_shifts, wrap=wrap, hybrid=hybrid)
    return [schedule.shift(mixers, depth=depth) for depth, kind in enumerate(mixers) if kind == "hsm"]


def paths(of_layers: list[int]) -> Counter[int]:
    """Number of ways to each distance when every layer either stays or hops: all 2^n choices, one by one."""
    return Counter(sum(hops) for hops in product(*[(0, amount) for amount in of_layers]))


def test_powers_of_two_reach_every_distance_by_exactly_one_path():
    for num_layers in (1, 2, 4, 7):
        of_layers = shifts(*["hsm"] * num_layers)
        assert of_layers == [2**depth for depth in range(num_layers)]
        assert paths(of_layers) == dict.fromkeys(range(2**num_layers), 1)


def test_the_table_of_schedules_counts_distances_and_paths():
    assert paths([8, 4, 2, 1]) == paths(shifts(*["hsm"] * 4))
    twice = paths(shifts(*["hsm"] * 8, num_shifts=4))
    assert sorted(twice) == list(range(31))
    assert max(twice.values()) == 16
    holes = paths([1, 3, 9])
    assert (len(holes), max(holes), set(holes.values())) == (8, 13, {1})


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [("repeat", [1, 2, 4, 1, 2, 4, 1]), ("hold", [1, 2, 4, 4, 4, 4, 4])],
)
def test_beyond_the_last_shift_the_schedule_restarts_or_holds(wrap: str, expected: list[int]):
    assert shifts(*["hsm"] * 7, num_shifts=3, wrap=wrap) == expected


def test_random_shifts_come_after_each_shift_was_used_once_and_are_the_same_every_time():
    first = shifts(*["hsm"] * 60, num_shifts=4, wrap="random")
    assert first[:4] == [1, 2, 4, 8]
    assert first == shifts(*["hsm"] * 60, num_shifts=4, wrap="random")
    counts = Counter(first[4:])
    assert set(counts) == {1, 2, 4, 8}
    assert min(counts.values()) >= 5
    assert first[4:] != (first[:4] * 15)[4:]
    # pinned, because a checkpoint is only right with the shifts that it was trained with
    assert first[4:12] == [4, 8, 2, 8, 1, 4, 2, 8]


def test_a_layer_of_another_kind_leaves_its_shift_out_or_hands_it_on():
    mixers = ("hsm", "attention", "hsm", "hsm", "switchhead")
    assert shifts(*mixers, hybrid="skip") == [1, 4, 8]
    assert shifts(*mixers, hybrid="compress") == [1, 2, 4]


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_compress_covers_two_to_the_number_of_hsm_layers_and_skip_leaves_holes(kept: int):
    mixers = ("attention",) * (4 - kept) + ("hsm",) * kept
    assert paths(shifts(*mixers, hybrid="compress")) == dict.fromkeys(range(2**kept), 1)
    skipped = paths(shifts(*mixers, hybrid="skip"))
    assert max(skipped) == 15 - (2 ** (4 - kept) - 1)
    assert len(skipped) == 2**kept


def test_the_heads_of_a_layer_are_slots_ahead_of_it():
    schedule = Schedule(num_shifts=None, wrap="repeat", hybrid="skip")
    of_heads = [[schedule.shift(("hsm",) * 4, depth=depth, head=head) for head in range(3)] for depth in range(4)]
    assert of_heads == [[1, 2, 4], [2, 4, 8], [4, 8, 1], [8, 1, 2]]


def test_the_wrap_counts_slots_of_the_schedule_not_depth_when_layers_are_left_out_of_it():
    mixers = ("attention", "hsm", "hsm", "attention", "hsm", "hsm")
    assert shifts(*mixers, num_shifts=3, hybrid="compress") == [1, 2, 4, 1]
    assert shifts(*mixers, num_shifts=3, hybrid="skip") == [2, 4, 2, 4]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 127, 128, 129, 256, 1000, 1024])
def test_the_largest_number_of_shifts_keeps_all_below_the_length_and_covers_it(length: int):
    number = largest_num_shifts(length)
    used = [2**exponent for exponent in range(number)]
    assert all(amount < length for amount in used)
    assert 2**number >= length
    assert sum(used) >= length - 1
