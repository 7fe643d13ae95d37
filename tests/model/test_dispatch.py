"""The one-process dispatcher: its plan is the routing, sorted by group."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.dispatch import LocalDispatcher, Routing, group_ends
from model.parameters import ExpertBank
from model.parameters import normal as draw_normal
from tests.model.build import normal


def routing(num_routings: int, *, num_choices: int, num_rows: int, num_outputs: int, num_groups: int) -> Routing:
    """Random rows, distinct experts per routing; several routings share rows and outputs."""
    generator = torch.Generator().manual_seed(4)
    ids = [torch.randperm(num_groups, generator=generator)[:num_choices] for _ in range(num_routings)]
    return Routing(
        gates_NK=normal(num_routings, num_choices).requires_grad_(),
        expert_ids_NK=torch.stack(ids) if ids else torch.empty(0, num_choices, dtype=torch.int64),
        source_row_N=torch.randint(num_rows, (num_routings,), generator=generator),
        output_row_N=torch.randint(num_outputs, (num_routings,), generator=generator),
        num_rows=num_rows,
        num_outputs=num_outputs,
        bank=ExpertBank(num_groups, {}),
    )


def table(rows_RX: Tensor, weights: list[float], routed: Routing) -> Tensor:
    """What the routing means: sums of gate * weight of the group * row, choice by choice."""
    sums = torch.zeros(routed.num_outputs, rows_RX.shape[1], dtype=torch.float64)
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
    received, plan = dispatcher.dispatch(exchange, rows, label="test").wait()
    partials = torch.zeros(plan.num_outputs, 3, dtype=torch.float64)
    start = 0
    for group, end in enumerate(plan.offsets_L.tolist()):
        for copy in range(start, end):
            row = received[plan.row_index_C[copy]]
            partials[plan.output_index_C[copy]] += plan.gates_C[copy].detach() * weights[group] * row
        start = end
    assert start == num_routings * 2
    torch.testing.assert_close(
        dispatcher.combine(exchange, partials, label="test").wait(), table(rows, weights, routed)
    )


def test_gradients_of_the_gates_come_back_to_their_places():
    routed = routing(9, num_choices=2, num_rows=5, num_outputs=4, num_groups=7)
    (exchange,) = LocalDispatcher().plan(routed)
    sorted_ids = routed.expert_ids_NK.flatten().sort().values.double()
    (exchange.plan.gates_C * sorted_ids).sum().backward()
    assert routed.gates_NK.grad is not None
    assert torch.equal(routed.gates_NK.grad, routed.expert_ids_NK.double())


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
    assert dispatcher.weights(exchange).wait() == dict(bank.named_parameters())
