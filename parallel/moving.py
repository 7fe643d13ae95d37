"""Experts on their way to new places: weights and moments of a bank's groups, from the ranks that store them to those that will.

A move is planned from what every rank knows (the two tables, and which elements of the local tensors each rank's optimizer stores), so
the ranks tell each other nothing but the elements themselves: one all-to-all of a bank over all ranks. Under ZeRO 1 and 2 a group's
elements may lie on several ranks of the expert-data group; at stage 0 each expert group has them all and sends inside itself. Owns
no table and no gathering of the weights afterwards. Called by parallel/placement.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.fragments import Held
from model.owners import OwnerTable
from parallel.carry import Flight, start_all_to_all
from parallel.ledger import Where
from parallel.mesh import Mesh


class Stored(NamedTuple):
    """Elements [start, end) of the local tensor are stored by a rank, which is of expert group `copy`."""

    rank: int
    copy: int
    start: int
    end: int


@dataclass(frozen=True)
class Weight:
    """One weight of a bank. group_numel: elements of a group. stored: by expert rank, whose places it is, what the ranks with these
    places store. held: by this rank; None: nothing of it.
    """

    group_numel: int
    stored: Sequence[Sequence[Stored]]
    held: Held | None


class Journey(NamedTuple):
    """`numel` elements from a rank's local tensor, from `start` on, to another's, from `target_start` on."""

    source: int
    target: int
    start: int
    target_start: int
    numel: int


def journeys(before: OwnerTable, after: OwnerTable, weight: Weight, *, of: int) -> Iterator[Journey]:
    """Those of a weight to or from expert rank `of`, in one order on every rank: only groups whose place changes travel.

    Raises:
        RuntimeError: no rank stores an element of a group that moves.
    """
    size, num_local = weight.group_numel, before.num_local
    for old, new in zip(before.places, after.places, strict=True):
        owners = (old // num_local, new // num_local)
        if old == new or of not in owners:
            continue
        here, there = (place % num_local * size for place in (old, new))
        for wants in weight.stored[owners[1]]:
            at, end = max(wants.start, there), min(wants.end, there + size)
            while at < end:
                element = at - there + here
                source = _source(weight.stored[owners[0]], copy=wants.copy, element=element)
                numel = min(end - at, source.end - element)
                yield Journey(source.rank, wants.rank, element, at, numel)
                at += numel


def _source(stored: Sequence[Stored], *, copy: int, element: int) -> Stored:
    """The rank that stores an element of a local tensor; where several do, the one in expert group `copy`."""
    found = [one for one in stored if one.start <= element < one.end]
    if not found:
        raise RuntimeError(
            f"every element of a group must be stored by a rank, but element {element} of a local tensor is stored by none: "
            "this version of DeepSpeed lays partitions out differently; use the version in requirements.lock"
        )
    return next((one for one in found if one.copy == copy), found[0])


class Move:
    """One bank's move. Every rank makes it and calls `exchange`, then `finish`; up to `finish` nothing has changed."""

    def __init__(
        self, weights: Sequence[Weight], before: OwnerTable, after: OwnerTable, *, path: str, mesh: Mesh
    ) -> None:
        """Allocates what leaves and what arrives: 4 bytes for each weight and moment that this rank sends, and that it receives.

        Raises:
            RuntimeError: there is no memory for it, or no rank stores an element; on this rank perhaps alone.
        """
        self._weights, self._after, self._where, self._mesh = weights, after, Where("optimizer", path, "move"), mesh
        leaving: list[list[Tensor]] = [[] for _ in range(mesh.world_size)]
        self._arriving: list[list[Tensor]] = [[] for _ in range(mesh.world_size)]
        for weight in weights:
            for one in journeys(before, after, weight, of=mesh.ep_rank):
                if one.source == mesh.rank:
                    leaving[one.target] += _views(weight, one.start, one.numel)
                if one.target == mesh.rank:
                    self._arriving[one.source] += _views(weight, one.target_start, one.numel)
        self._send = [sum(view.numel() for view in views) for views in leaving]
        self._receive = [sum(view.numel() for view in views) for views in self._arriving]
        none = torch.empty(0, dtype=torch.float32, device=mesh.device)
        self._sent = torch.cat([none, *(view for views in leaving for view in views)])
        self._received = none.new_empty(sum(self._receive))

    def exchange(self) -> None:
        """One all-to-all over all ranks."""
        sizes, peers = {"receive": self._receive, "send": self._send}, self._mesh.world
        work = start_all_to_all(self._received, self._sent, **sizes, peers=peers, where=self._where)
        Flight(self._received, self._sent, work, peers, self._where).land()

    def finish(self) -> None:
        """What has arrived takes its place, and what is padding now becomes zero."""
        views = [view for of_rank in self._arriving for view in of_rank]
        for view, values in zip(views, self._received.split([view.numel() for view in views]), strict=True):
            view.copy_(values)
        clear_padding(self._weights, self._after, rank=self._mesh.ep_rank)


def clear_padding(weights: Sequence[Weight], table: OwnerTable, *, rank: int) -> None:
    """Zero for weights and moments where no group sits: under another table there was one."""
    for weight in weights:
        size = weight.group_numel
        for place, group in enumerate(table.groups_of(rank)):
            if group is None and weight.held is not None:
                first = max(place * size, weight.held.start)
                numel = min((place + 1) * size, weight.held.start + weight.held.numel) - first
                for view in weight.held.part(first, max(0, numel)).values():
                    view.zero_()


def _views(weight: Weight, start: int, numel: int) -> list[Tensor]:
    assert weight.held is not None
    kinds = weight.held.part(start, numel)
    return [kinds[kind] for kind in sorted(kinds)]
