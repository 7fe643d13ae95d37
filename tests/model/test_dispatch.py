"""The one-process dispatcher: its plan is the routing, sorted by group."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.dispatch import LocalDispatcher, LocalPlan, Routing, group_ends
from model.parameters import ExpertBank
from model.parameters import normal as draw_normal
from tests.model.build import normal
from tests.parallel.routed import assert_copies_of_rows


def routing(num_routings: int, *, num_choices: int, num_rows: int, num_outputs: int, num_groups: int) -> Routing:
    """Random rows, distinct experts per routing; several routings share rows and outputs."""
    generator = torch.Generator().manual_seed(4)
    ids = [torch.randperm(num_groups, generator=generator)[:num_choices] for _ in range(num_routings)]
    return Routing(
        gates_NK=normal(num_routings, num_choices).requires_grad_(),
        expert_ids_NK=torch.stack(ids) if ids else torch.empty(0, num_choices, dtype=torch.int64),
        source_row_N=torch.randint(num_rows, (num_routings,), generator=generator).sort().values,
        output_row_N=torch.randint(num_outputs, (num_routings,), generator=generator).sort().values,
        num_rows=num_rows,
        num_outputs=num_outputs,
        bank=ExpertBank(num_groups, {}),
    )


def table(rows_RX: Tensor, weights: list[float], routed: Routing) -> Tensor:
    """What the routing means: sums of gate * weight of the group * row, choice by choice."""
    sums = torch.zeros(routed.num_outputs, rows_RX.shape[1], dtype=torch.float64)
    assert routed.gates_NK is not None
    for n in range(routed.expert_ids_NK.shape[0]):
        for k in range(routed.expert_ids_NK.shape[1]):
            weight = weights[int(routed.expert_ids_NK[n, k])]
            sums[routed.output_row_N[n]] += routed.gates_NK[n, k].detach() * weight * rows_RX[routed.source_row_N[n]]
    return sums


@pytest.mark.parametrize("num_routings", [9, 1, 0])
def test_a_plan_is_the_routing_sorted_by_group(num_routings: int):
    routed = routing(num_routings, num_choices=2, num_rows=5, num_outputs=4, num_groups=7)
    rows, weights = normal(5, 3), [1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6]
    dispatcher = LocalDispatcher()
    (exchange,) = dispatcher.plan(routed)

    def experts(received: Tensor, plan: LocalPlan) -> Tensor:
        assert_copies_of_rows(plan, num_rows=len(received))
        partials = torch.zeros(plan.num_outputs, 3, dtype=torch.float64)
        start = 0
        for group, end in enumerate(plan.offsets_L.tolist()):
            for copy in range(start, end):
                row = received[plan.row_index_C[copy]]
                partials[plan.output_index_C[copy]] += plan.gates_C[copy].detach() * weights[group] * row
            start = end
        assert start == num_routings * 2
        return partials

    arriving = dispatcher.dispatch(exchange, rows, label="test")
    found = dispatcher.combine(arriving, experts, label="test").wait()
    torch.testing.assert_close(found, table(rows, weights, routed))


def groups_of(plan: LocalPlan) -> Tensor:
    return torch.arange(7).repeat_interleave(torch.diff(plan.offsets_L, prepend=plan.offsets_L.new_zeros(1)))


@pytest.mark.parametrize("late", [False, True])
def test_gradients_of_the_gates_come_back_to_their_places(late: bool):
    """Whether the routing has them or `combine` is given them."""
    routed = routing(9, num_choices=2, num_rows=5, num_outputs=4, num_groups=7)
    gates_NK = routed.gates_NK
    assert gates_NK is not None
    dispatcher = LocalDispatcher()
    (exchange,) = dispatcher.plan(replace(routed, gates_NK=None) if late else routed)
    arriving = dispatcher.dispatch(exchange, normal(5, 3), label="test")
    found = dispatcher.combine(
        arriving, lambda _, plan: plan.gates_C * groups_of(plan), label="test", gates_NK=gates_NK if late else None
    )
    found.wait().sum().backward()
    assert gates_NK.grad is not None
    assert torch.equal(gates_NK.grad, routed.expert_ids_NK.double())


def test_a_number_for_each_copy_comes_back_to_its_place():
    routed = routing(9, num_choices=2, num_rows=5, num_outputs=4, num_groups=7)
    dispatcher, scale = LocalDispatcher(), torch.ones(7, dtype=torch.float64, requires_grad=True)
    (exchange,) = dispatcher.plan(routed)
    arriving = dispatcher.dispatch(exchange, normal(5, 3), label="test")
    found = dispatcher.reply(arriving, lambda _, plan: (torch.arange(7) * scale)[groups_of(plan)], label="test").wait()
    assert torch.equal(found, routed.expert_ids_NK.double())
    (found * found.detach()).sum().backward()
    expected = torch.zeros(7, dtype=torch.float64)
    for group in routed.expert_ids_NK.flatten().tolist():
        expected[group] += group * group
    assert scale.grad is not None
    assert torch.equal(scale.grad, expected)


def test_the_hash_of_a_routing_comes_with_each_of_its_copies():
    routed = routing(9, num_choices=2, num_rows=5, num_outputs=4, num_groups=7)
    hashes = torch.arange(9) + 2**40
    (exchange,) = LocalDispatcher().plan(replace(routed, hashes_N=hashes))
    found = exchange.plan.hashes_C
    assert found is not None
    for group in range(7):
        of_group = found[groups_of(exchange.plan) == group]
        assert set(of_group.tolist()) == set(hashes[(routed.expert_ids_NK == group).any(1)].tolist())


def test_one_exchange_is_given_for_each_routing_in_order():
    first, second = (routing(n, num_choices=2, num_rows=5, num_outputs=4, num_groups=7) for n in (3, 6))
    exchanges = LocalDispatcher().plan(first, second)
    assert [len(exchange.plan.gates_C) for exchange in exchanges] == [6, 12]


@pytest.mark.parametrize(
    ("ids", "ends"),
    [([0, 0, 2, 2, 2], [2, 2, 5, 5]), ([], [0, 0, 0, 0]), ([3], [0, 0, 0, 1]), ([0, 1, 2, 3], [1, 2, 3, 4])],
)
def test_group_ends_close_every_group_also_the_empty_ones(ids: list[int], ends: list[int]):
    found = group_ends(torch.tensor(ids, dtype=torch.int64), 4)
    assert found.tolist() == ends
    assert found.dtype == torch.int32


def test_on_one_process_the_weights_are_the_banks_own():
    bank = ExpertBank(7, {"weight": ((2, 2), draw_normal(1.0))})
    routed = replace(routing(3, num_choices=2, num_rows=5, num_outputs=4, num_groups=7), bank=bank)
    dispatcher = LocalDispatcher()
    (exchange,) = dispatcher.plan(routed)
    assert dispatcher.weights(exchange, label="test").wait() == dict(bank.named_parameters())
