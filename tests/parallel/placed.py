"""Owner tables for the tests of placement: groups, and padding, at random places."""

import random
from typing import TYPE_CHECKING

from model.owners import OwnerTable
from model.parameters import ExpertBank

if TYPE_CHECKING:
    from parallel.zero import ZeroEngine


def random_table(num_groups: int, num_ranks: int, *, seed: str) -> OwnerTable:
    places = range(-(-num_groups // num_ranks) * num_ranks)
    return OwnerTable(tuple(random.Random(seed).sample(places, num_groups)), num_ranks)


def bank_at(engine: "ZeroEngine", path: str) -> ExpertBank:
    bank = engine.model.get_submodule(path)
    assert isinstance(bank, ExpertBank)
    return bank


def random_tables(engine: "ZeroEngine", *, seed: int = 1) -> dict[str, OwnerTable]:
    """For each bank that can be placed anew."""
    banks = {path: bank_at(engine, path) for path in engine.placement.banks}
    return {path: random_table(one.num_groups, one.num_ranks, seed=f"{seed}/{path}") for path, one in banks.items()}
