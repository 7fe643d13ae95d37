"""Where groups sit: places, padding, and which ranges of the whole a rank then has."""

import pytest
import torch

from model.owners import OwnerTable, Range, Seats
from model.parameters import ExpertBank, logical_parameters, materialize, normal

MOVED = OwnerTable((7, 1, 2, 0, 5), num_ranks=4)  # 5 groups, 4 x 2 places: 3 | 1, 2 | padding, padding | 4, padding | 0


def test_a_rank_has_the_groups_whose_places_are_its_own():
    assert [MOVED.groups_of(rank) for rank in range(4)] == [[3, 1], [2, None], [None, 4], [None, 0]]
    assert OwnerTable.identity(5, 4).groups_of(2) == [4, None]
    assert OwnerTable.identity(5, 4).groups_of(3) == [None, None]


def test_the_load_of_a_rank_is_that_of_its_groups():
    assert MOVED.loads([1, 10, 100, 1000, 10000]) == [1010, 100, 10000, 1]


def test_neighbours_in_both_orders_are_one_range():
    table = OwnerTable((4, 5, 6, 0, 1, 3, 7), num_ranks=2)
    assert table.ranges_of(0) == [Range(0, 3, 2), Range(3, 5, 1)]
    assert table.ranges_of(1) == [Range(0, 0, 3), Range(3, 6, 1)]


@pytest.mark.parametrize(
    ("places", "parts"),
    [
        ((0, 1, 1), ["group 2 is 1", "group 1 too"]),
        ((0, 1, 4), ["from 0 to 3", "group 2 is 4", "none of them"]),
        ((0, -1, 2), ["group 1 is -1", "none of them"]),
    ],
)
def test_a_place_that_is_taken_or_does_not_exist_is_refused(places: tuple[int, ...], parts: list[str]):
    with pytest.raises(ValueError, match="must have a place of its own") as caught:
        OwnerTable(places, num_ranks=2)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("rank", range(4))
def test_ids_become_places_and_local_places_ids_again(rank: int):
    seats = Seats.at(MOVED, rank=rank, device=torch.device("cpu"))
    ids_NK = torch.tensor([[0, 1], [2, 3], [4, 4]])
    assert seats.places(ids_NK).tolist() == [[7, 1], [2, 0], [5, 5]]
    for place, group in enumerate(MOVED.groups_of(rank)):
        if group is not None:
            assert int(seats.global_ids(torch.tensor(place))) == group
    rows_PX = torch.arange(8.0)[:, None]
    assert seats.in_order(rows_PX).flatten().tolist() == [7, 1, 2, 0, 5]


def test_groups_at_their_first_places_are_looked_up_nowhere():
    seats = Seats.at(OwnerTable.identity(5, 4), rank=1, device=torch.device("cpu"))
    ids = torch.tensor([0, 4])
    assert seats.places(ids) is ids
    assert seats.global_ids(torch.tensor([0, 1])).tolist() == [2, 3]
    assert not seats.has_moved


def test_a_moved_bank_says_where_its_elements_lie_in_the_logical_tensor():
    whole = ExpertBank(5, {"weight": ((2, 3), normal(1.0))})
    materialize(whole, seed=1)
    covered = []
    for rank in range(4):
        bank = ExpertBank(5, {"weight": ((2, 3), normal(1.0))})
        bank.shard(rank=rank, size=4)
        materialize(bank, seed=1)
        bank.place(MOVED)
        (parameter,) = logical_parameters(bank)
        for local, start, numel in parameter.ranges:
            covered += range(start, start + numel)
            for element in range(numel):
                assert divmod(start + element, 6)[0] == MOVED.groups_of(rank)[(local + element) // 6]
                assert (start + element) % 6 == (local + element) % 6
    assert sorted(covered) == list(range(30))
