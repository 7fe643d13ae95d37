"""Where the groups of an expert bank sit: the owner table, and what of it one rank has.

A bank over W ranks has W * L places, L = ceil(G / W): place p is local place p mod L of rank p div L. A table gives each of the G
groups a place of its own; padding takes the places left over. Without a table group g sits at place g. Owns no weights: they move in
parallel/moving.py. Called by model/parameters.py and by what chooses tables (parallel/balance.py).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

GlobalIds = Callable[[Tensor], Tensor]  # makes global ids of local places


def same_ids(places: Tensor) -> Tensor:
    """GlobalIds where all groups are here, each at its own place."""
    return places


class Range(NamedTuple):
    """`numel` elements, from `local` on in what a rank has and from `start` on in the whole."""

    local: int
    start: int
    numel: int


@dataclass(frozen=True)
class OwnerTable:
    """places[g]: the place of group g over `num_ranks` ranks.

    Raises:
        ValueError: a place is taken twice, or is none of the W * L.
    """

    places: tuple[int, ...]
    num_ranks: int

    def __post_init__(self) -> None:
        last = self.num_ranks * self.num_local - 1
        taken: dict[int, int] = {}
        for group, place in enumerate(self.places):
            if place in taken or not 0 <= place <= last:
                wrong = f"that of group {taken[place]} too" if place in taken else "none of them"
                raise ValueError(
                    f"each of {len(self.places)} groups over {self.num_ranks} ranks must have a place of its own from 0 to {last}, but "
                    f"that of group {group} is {place}, {wrong}: use the table that was made for these numbers"
                )
            taken[place] = group

    @staticmethod
    def identity(num_groups: int, num_ranks: int) -> "OwnerTable":
        """Group g at place g."""
        return OwnerTable(tuple(range(num_groups)), num_ranks)

    @property
    def num_local(self) -> int:
        """L, the places of a rank."""
        return math.ceil(len(self.places) / self.num_ranks)

    @property
    def is_identity(self) -> bool:
        return self.places == tuple(range(len(self.places)))

    def groups_of(self, rank: int) -> list[int | None]:
        """The group at each local place of a rank, None for padding."""
        held: list[int | None] = [None] * self.num_local
        for group, place in enumerate(self.places):
            if place // self.num_local == rank:
                held[place % self.num_local] = group
        return held

    def ranges_of(self, rank: int) -> list[Range]:
        """The groups of a rank in the order of their places, those with consecutive ids together: an element is a group."""
        return list(_runs(self.groups_of(rank)))

    def loads(self, load_G: Sequence[int]) -> list[int]:
        """The load of each rank, given that of each group."""
        total_W = [0] * self.num_ranks
        for place, load in zip(self.places, load_G, strict=True):
            total_W[place // self.num_local] += load
        return total_W


class Seats:
    """Where a bank's groups sit, as one rank computes with it. Until they move nothing is looked up: group g is at place g."""

    _place_G: Tensor  # on the device of the weights, once the groups have moved
    _group_L: Tensor

    def __init__(self, num_groups: int, *, first_group: int) -> None:
        self.num_groups, self.first_group = num_groups, first_group
        self.table: OwnerTable | None = None
        self.rank = 0

    @classmethod
    def at(cls, table: OwnerTable, *, rank: int, device: torch.device) -> Self:
        seats = cls(len(table.places), first_group=rank * table.num_local)
        if not table.is_identity:
            held = [len(table.places) if group is None else group for group in table.groups_of(rank)]
            seats.table, seats.rank = table, rank
            seats._place_G, seats._group_L = torch.tensor(table.places).to(device), torch.tensor(held).to(device)
        return seats

    @property
    def has_moved(self) -> bool:
        return self.table is not None

    def places(self, ids: Tensor) -> Tensor:
        """Of global ids. Any shape."""
        return self._place_G[ids] if self.has_moved else ids

    def global_ids(self, local: Tensor) -> Tensor:
        """Of local places at which groups are. Any shape."""
        return self._group_L[local] if self.has_moved else self.first_group + local

    def in_order(self, rows_PX: Tensor) -> Tensor:
        """Of one row for each place, those of the groups in the order of their ids (G, X). Differentiable."""
        return rows_PX.index_select(0, self._place_G) if self.has_moved else rows_PX[: self.num_groups]

    def ranges(self, size: int) -> list[Range]:
        """Where the elements here lie in the whole, each group having `size` of them; for groups that have moved."""
        assert self.table is not None
        return [Range(size * run.local, size * run.start, size * run.numel) for run in self.table.ranges_of(self.rank)]


def _runs(groups: Sequence[int | None]) -> Iterator[Range]:
    first = 0
    for end in range(1, len(groups) + 1):
        here = groups[first]
        if end < len(groups) and here is not None and groups[end] == here + end - first:
            continue
        if here is not None:
            yield Range(first, here, end - first)
        first = end
