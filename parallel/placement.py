"""Which expert sits on which rank, while a run goes on: counts what each group is sent, and moves groups when that is uneven.

Only banks whose rows travel: where the weights travel every rank computes its own tokens and nothing is to be balanced. Tables stay as
they are: a row is too small to be worth a place of its own in a table. Owns the order of a move over all banks and what a checkpoint
must know of it. Does not own the choice of a table (parallel/balance.py), the way of the elements (parallel/moving.py), nor when a move
is due (train/placing.py). Made by parallel/zero.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.owners import OwnerTable
from model.parameters import ExpertBank, Table, logical_parameters
from parallel.balance import balanced
from parallel.expert import AllToAllDispatcher
from parallel.moving import Move, Stored, Weight, clear_padding

if TYPE_CHECKING:
    from parallel.zero import ZeroEngine


@dataclass(frozen=True)
class Placed:
    """A bank that was looked at. before, after: the busiest rank's load over the mean. num_moved: groups with another place."""

    path: str
    before: float
    after: float
    num_moved: int


class Placement:
    """The places of an engine's banks. Every rank makes the same calls in the same order, between steps."""

    def __init__(self, engine: "ZeroEngine") -> None:
        self._engine, self._mesh = engine, engine.mesh
        modules = dict(engine.model.named_modules())
        dispatchers = [getattr(module, "dispatcher", None) for module in modules.values()]
        self._dispatchers = [one for one in dispatchers if isinstance(one, AllToAllDispatcher)]
        stay = {bank for dispatcher in self._dispatchers for bank in dispatcher.gathered}
        self._banks: dict[str, ExpertBank] = {
            path: module
            for path, module in modules.items()
            if isinstance(module, ExpertBank) and not isinstance(module, Table) and module not in stay
        }
        if self._mesh.ep_size == 1:
            self._banks = {}
        self._counts: dict[str, Tensor] = {}

    @property
    def banks(self) -> list[str]:
        """The paths of those that can be placed anew."""
        return list(self._banks)

    def count(self) -> None:
        """From now on the copies for each group of these banks are counted: 8 bytes a group, and no wait for the device."""
        self._counts = {
            path: torch.zeros(bank.num_groups, dtype=torch.int64, device=self._mesh.device)
            for path, bank in self._banks.items()
        }
        counts: dict[ExpertBank, Tensor] = {self._banks[path]: count_G for path, count_G in self._counts.items()}
        for dispatcher in self._dispatchers:
            dispatcher.counts = counts

    def loads(self) -> dict[str, list[int]]:
        """What was counted since the last move, by bank, over all ranks: an all-reduce of 8 bytes a group. Nothing if nothing is."""
        if not self._counts:
            return {}
        total = self._mesh.sum(torch.cat(list(self._counts.values())))
        parts = total.split([len(count_G) for count_G in self._counts.values()])
        return {path: part_G.tolist() for path, part_G in zip(self._counts, parts, strict=True)}

    def tables(self) -> dict[str, list[int]]:
        """The place of each group, of the banks that have moved."""
        moved = {path: bank.seats.table for path, bank in self._banks.items()}
        return {path: list(table.places) for path, table in moved.items() if table is not None}

    def restore(self, tables: Mapping[str, Sequence[int]], loads: Mapping[str, Sequence[int]]) -> None:
        """Puts what `tables` and `loads` gave back; a bank without a table gets the identity. The engine must then be filled anew.

        Raises:
            ValueError: a table is not one of these banks over as many ranks.
        """
        found = {path: self._read(bank, tables.get(path)) for path, bank in self._banks.items()}
        moved = {path: table for path, table in found.items() if table != self.table(path)}
        for path, table in moved.items():
            self._banks[path].place(table)
            clear_padding(self._weights(path), table, rank=self._mesh.ep_rank)
        for path, count_G in self._counts.items():
            total = loads.get(path, [0] * len(count_G)) if self._mesh.rank == 0 else [0] * len(count_G)
            count_G.copy_(torch.tensor(total))

    def move(self) -> list[Placed]:
        """Moves the groups of each bank where that helps by what was counted, and counts anew. Weights and moments travel with them.

        Raises:
            RuntimeError: on all ranks, with the first failing rank's sentence.
        """
        loads = self.loads()
        before = {path: self.table(path) for path in loads}
        after = {path: balanced(before[path], load_G) for path, load_G in loads.items()}
        self.place(after)
        for count_G in self._counts.values():
            count_G.zero_()
        return [
            Placed(
                path,
                _busiest_over_mean(before[path].loads(load_G)),
                _busiest_over_mean(after[path].loads(load_G)),
                _num_moved(before[path], after[path]),
            )
            for path, load_G in loads.items()
        ]

    def place(self, tables: Mapping[str, OwnerTable]) -> None:
        """Moves the groups of banks to where `tables` says, one bank after the other: what travels is in memory of one at a time."""
        moved = {path: table for path, table in tables.items() if _num_moved(self.table(path), table)}
        for path, table in moved.items():
            self._place(path, table)
        if moved:
            self._engine.gather_weights()

    def _place(self, path: str, table: OwnerTable) -> None:
        move, error, weights = None, None, self._weights(path)
        try:
            move = Move(weights, self.table(path), table, path=path, mesh=self._mesh)
        except RuntimeError as caught:  # no memory for it, on this rank: the others would wait in the exchange
            error = caught
        self._mesh.raise_together(error)
        assert move is not None
        move.exchange()
        move.finish()
        self._banks[path].place(table)

    def table(self, path: str) -> OwnerTable:
        """Where the groups of a bank are."""
        bank = self._banks[path]
        return bank.seats.table or OwnerTable.identity(bank.num_groups, bank.num_ranks)

    def _read(self, bank: ExpertBank, places: Sequence[int] | None) -> OwnerTable:
        if places is None:
            return OwnerTable.identity(bank.num_groups, bank.num_ranks)
        if len(places) != bank.num_groups:
            raise ValueError(
                f"a table must have a place for each of the bank's {bank.num_groups} groups, but has {len(places)}: "
                "use the table that was made for this bank"
            )
        return OwnerTable(tuple(places), bank.num_ranks)

    def _weights(self, path: str) -> list[Weight]:
        bank, held = self._banks[path], self._engine.held
        return [
            Weight(math.prod(parameter.spec.shape[1:]), self._stored[parameter.name], held(parameter))
            for parameter in logical_parameters(self._engine.model)
            if parameter.module is bank
        ]

    @cached_property
    def _stored(self) -> dict[str, list[list[Stored]]]:
        """By weight and expert rank, what each rank stores, which never changes. Every rank asks for it first at the same time."""
        mine = {}
        for parameter in logical_parameters(self._engine.model):
            if parameter.module in self._banks.values():
                held = self._engine.held(parameter)
                mine[parameter.name] = [0, 0] if held is None else [held.start, held.start + held.numel]
        everyone = self._mesh.all_gather_object(mine)
        size = self._mesh.ep_size  # the ranks of an expert group are consecutive
        return {
            name: [
                [Stored(rank, rank // size, *everyone[rank][name]) for rank in range(owner, len(everyone), size)]
                for owner in range(size)
            ]
            for name in mine
        }


def _num_moved(before: OwnerTable, after: OwnerTable) -> int:
    return sum(old != new for old, new in zip(before.places, after.places, strict=True))


def _busiest_over_mean(load_W: Sequence[int]) -> float:
    return max(load_W) * len(load_W) / max(1, sum(load_W))
