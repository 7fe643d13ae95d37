"""Fragments: the flat ranges of logical parameters that a checkpoint reads and fills."""

import pytest
import torch
from torch import Tensor, nn

from model.fragments import Fragment, create_state, fragments_of, held_in, set_step_count, share
from model.parameters import ExpertBank, LogicalParameter, Table, logical_parameters, materialize, normal


def bank(*, rank: int, size: int) -> tuple[LogicalParameter, torch.optim.AdamW]:
    """Five experts of 2 x 3 weights, sharded, with an optimizer whose moments are there."""
    module = ExpertBank(5, {"weight": ((2, 3), normal(1.0))})
    module.shard(rank=rank, size=size)
    materialize(module, seed=1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    create_state(optimizer)
    (parameter,) = logical_parameters(module)
    return parameter, optimizer


def whole(parameter: LogicalParameter, optimizer: torch.optim.Optimizer) -> Fragment | None:
    return in_storage(parameter, parameter.tensor, optimizer, offset=0, local_start=0, numel=parameter.tensor.numel())


def in_storage(
    parameter: LogicalParameter, storage: Tensor, optimizer: torch.optim.Optimizer, **place: int
) -> Fragment | None:
    """The one fragment, because the groups have not moved; None for nothing but padding."""
    found = fragments_of(parameter, held_in(storage, optimizer, **place))
    assert len(found) < 2
    return found[0] if found else None


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_the_fragments_of_all_ranks_lie_one_after_the_other_without_padding(size: int):
    (reference,) = logical_parameters(bank(rank=0, size=1)[0].module)
    elements: list[float] = []
    for rank in range(size):
        found = whole(*bank(rank=rank, size=size))
        if found is not None:
            assert (found.name, found.shape, found.start) == ("weight", (5, 2, 3), len(elements))
            elements += found.tensors["master"].tolist()
    assert elements == reference.tensor.flatten().tolist()


def test_a_rank_of_nothing_but_padding_has_no_fragment():
    assert whole(*bank(rank=3, size=4)) is None


def test_filling_a_fragment_fills_the_weight_and_its_moments():
    parameter, optimizer = bank(rank=1, size=2)
    found = whole(parameter, optimizer)
    assert found is not None
    assert set(found.tensors) == {"master", "exp_avg", "exp_avg_sq"}
    state = optimizer.state[parameter.tensor]
    for number, (name, live) in enumerate({"master": parameter.tensor, **state}.items()):
        if name != "step":
            found.tensors[name].fill_(number + 2.0)
            assert (live.flatten()[: parameter.numel] == number + 2.0).all()
    assert not parameter.tensor[2].any(), "the third local expert is padding and stays zero"


def test_a_partition_that_begins_inside_a_weight_knows_its_place():
    """As under ZeRO: elements 4 to 14 of rank 1's three local experts (18 elements, of which 12 count) lie at 7 in a flat storage."""
    parameter, _ = bank(rank=1, size=2)
    storage = nn.Parameter(torch.arange(30.0))
    optimizer = torch.optim.SGD([storage], lr=0.1)
    found = in_storage(parameter, storage, optimizer, offset=7, local_start=4, numel=10)
    assert found is not None
    assert found.start == 3 * 6 + 4
    assert found.tensors["master"].tolist() == list(range(7, 15)), "12 - 4 elements: the rest is padding"
    assert in_storage(parameter, storage, optimizer, offset=7, local_start=12, numel=6) is None


def test_a_partition_of_a_column_shard_is_one_range_of_its_box():
    """Rank 3 of 2 row shards and 2 columns has rows 3 and 4 (and one of padding) and columns 3 to 5 of five rows of six."""
    module = Table(5, {"up": ((6,), normal(1.0))})
    module.shard(rank=3, size=4, columns=2)
    materialize(module, seed=1)
    (parameter,) = logical_parameters(module)
    storage = nn.Parameter(torch.arange(30.0))
    found = in_storage(parameter, storage, torch.optim.SGD([storage], lr=0.1), offset=7, local_start=2, numel=7)
    assert found is not None
    assert (found.shape, found.box, found.start) == ((5, 6), ((3, 5), (3, 6)), 2)
    assert found.tensors["master"].tolist() == [7, 8, 9, 10], "6 - 2 elements: the rest is padding"
    parts = [share(found, rank=rank, size=2) for rank in range(2)]
    assert [(part.box, part.start, part.tensors["master"].tolist()) for part in parts if part] == [
        (found.box, 2, [7, 8]),
        (found.box, 4, [9, 10]),
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_replicas_together_write_every_element_of_a_shared_fragment_once(size: int):
    found = whole(*bank(rank=0, size=2))
    assert found is not None
    parts = [part for rank in range(size) if (part := share(found, rank=rank, size=size)) is not None]
    covered = [i for part in parts for i in range(part.start, part.start + part.tensors["master"].numel())]
    assert covered == list(range(18))
    for name in found.tensors:
        assert torch.equal(torch.cat([part.tensors[name] for part in parts]), found.tensors[name])


def test_the_step_count_reaches_every_parameter_and_the_created_state_trains():
    """An AdamW whose state was created at once takes the same step as one that makes its state itself."""
    created, plain = (torch.nn.Linear(3, 2) for _ in range(2))
    plain.load_state_dict(created.state_dict())
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1) for module in (created, plain)]
    create_state(optimizers[0])
    for _ in range(2):
        for module, optimizer in zip((created, plain), optimizers, strict=True):
            module(torch.ones(3)).sum().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(created.parameters(), plain.parameters(), strict=True))
    set_step_count(optimizers[0], 41)
    assert [float(state["step"]) for state in optimizers[0].state.values()] == [41.0, 41.0]


def test_plain_sgd_has_no_state_to_create():
    optimizer = torch.optim.SGD(torch.nn.Linear(3, 2).parameters(), lr=0.1)
    create_state(optimizer)
    set_step_count(optimizer, 5)
    assert not any(optimizer.state.values())
