"""AllToAllDispatcher against one process in float64: every exchange and routing, uneven and empty ranks, outputs and each gradient."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.parallel.routed import (
    ROUTINGS,
    Layout,
    Shape,
    apply,
    banks_of,
    by_dispatcher,
    by_loop,
    dispatcher_of,
    routings,
    rows_of,
    weights,
)

SHAPE = Shape()
TOKENS = {1: [7], 2: [5, 9], 4: [3, 0, 6, 1]}


def check(
    pool,
    layout: Layout,
    *,
    routing: str,
    tokens: list[int],
    bound: float,
    of_all: float = math.inf,
    shape: Shape = SHAPE,
    seed: int = 100,
) -> None:
    """All of a pool's ranks against the loop. bound: of an element, in units of the tensor's largest; of_all: of its norm."""
    found = pool(len(tokens)).run(by_dispatcher, routing, tokens, layout, shape, seed)
    rows = [rows_of(rank, shape, routing=routing, tokens=tokens[rank], seed=seed) for rank in range(len(tokens))]
    expected = [by_loop(one, shape) for one in rows]
    pairs: list[tuple[str, np.ndarray, np.ndarray]] = [
        (f"{name} of rank {rank}", found[rank][name], expected[rank][name])
        for rank in range(len(tokens))
        for name in ("y", "dx", "dgates")
    ]
    for first in range(0, len(tokens), layout.ep_size):  # expert groups are consecutive ranks, each sums its own rows
        group = range(first, first + layout.ep_size)
        for name in ("dvalue", "doutput"):
            owned = np.concatenate([found[rank][name] for rank in group])[: shape.groups]
            pairs.append((f"{name} of ranks {group}", owned, np.sum([expected[rank][name] for rank in group], axis=0)))
    for name, actual, wanted in pairs:
        scale = np.abs(wanted).max(initial=0.0)
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=bound * scale + 1e-30, err_msg=name)
        if of_all < math.inf:
            assert np.linalg.norm(actual - wanted) <= of_all * np.linalg.norm(wanted), name


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("exchange", ["tokens", "hierarchical", "weights"])
@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_every_exchange_gives_the_outputs_and_gradients_of_a_loop(pool, ep_size, exchange, chunks, dtype, routing):
    node_size = {1: None, 2: 1, 4: 2}[ep_size] if exchange == "hierarchical" else None
    kind = "weights" if exchange == "weights" else "tokens"
    layout = Layout(ep_size, node_size, kind, chunks, dtype)
    bound, of_all = (2e-6, math.inf) if dtype == "float32" else (6e-2, 2e-2)
    check(pool, layout, routing=routing, tokens=TOKENS[ep_size], bound=bound, of_all=of_all)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("tokens", "layout"),
    [
        ([0, 4], Layout(2)),
        ([2, 7, 0, 5], Layout(2, overlap=False)),
        ([3, 0, 6, 1], Layout(4, exchange="mixed", chunks=2)),
        ([3, 8, 2, 6], Layout(4, exchange="mixed, V's weights", chunks=2)),
        ([3, 8, 2, 6], Layout(4, node_size=2, chunks=3)),
    ],
    ids=["zero_rows", "two_groups", "mixed", "mixed_the_other_way", "two_nodes"],
)
def test_in_float64_the_dispatcher_and_the_loop_differ_by_rounding(pool, tokens, layout, routing):
    check(pool, layout, routing=routing, tokens=tokens, bound=1e-13)


def collectives(layout: Layout) -> list[int]:
    """How many each of a plan, a forward and a backward pass of SwitchHead's two projections makes."""
    counted = []
    with dispatcher_of(layout) as (mesh, dispatcher):
        rows = rows_of(mesh.rank, SHAPE, routing="random", tokens=4 + mesh.rank)
        gates = rows.gates_XK.clone().requires_grad_()
        with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchanged:
            exchanges = dispatcher.plan(
                *routings(rows, SHAPE, gates, banks_of(SHAPE, layout, mesh.ep_rank, torch.double))
            )
            counted.append(exchanged.call_count)
            x = rows.x_TD.requires_grad_()
            y = apply(dispatcher, exchanges[1], apply(dispatcher, exchanges[0], x, label="value"), label="output")
            counted.append(exchanged.call_count)
            y.sum().backward()
            counted.append(exchanged.call_count)
    return counted


def test_a_plan_is_two_exchanges_a_projection_three_each_way(pool):
    """The counts of V and O travel together, then the words of their copies; then rows, gates and results of each."""
    assert pool(2).run(collectives, Layout(2)) == [[2, 8, 14]] * 2
    assert pool(4).run(collectives, Layout(4, node_size=2)) == [[4, 16, 28]] * 4, "twice as many over two hops"


def gathered(layout: Layout) -> dict[str, np.ndarray]:
    """Rows of this rank's groups, given to all; each rank uses what it gets in its own way. Padding is NaN: it must not be read."""
    with dispatcher_of(layout) as (mesh, dispatcher):
        bank = banks_of(SHAPE, layout, mesh.ep_rank, torch.double)[0]
        rows = bank.weights()["weight"][:, :, 0].detach().clone().requires_grad_()
        found = dispatcher.gather(bank, rows, label="test").wait()
        (found * _use(mesh.rank)).square().sum().backward()
        assert rows.grad is not None
        return {"found": found.detach().numpy(), "gradient": rows.grad.numpy()}


def _use(rank: int) -> torch.Tensor:
    return torch.randn(SHAPE.groups, SHAPE.d_model, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


@pytest.mark.parametrize(("processes", "ep_size"), [(2, 2), (4, 4), (4, 2)])
def test_gather_gives_all_groups_in_their_order_and_sums_the_gradients_of_its_users(pool, processes, ep_size):
    seen = pool(processes).run(gathered, Layout(ep_size))
    expected = weights(SHAPE)[0][:, :, 0]
    for first in range(0, processes, ep_size):
        group = range(first, first + ep_size)
        for rank in group:
            np.testing.assert_array_equal(seen[rank]["found"], expected.numpy())
        gradient = np.concatenate([seen[rank]["gradient"] for rank in group])
        wanted = sum(2 * expected * _use(rank).square() for rank in group)
        np.testing.assert_allclose(gradient[: SHAPE.groups], wanted, rtol=1e-12)
        assert not gradient[SHAPE.groups :].any(), "padding has no gradient"


@pytest.mark.parametrize(
    "layout", [Layout(4), Layout(4, chunks=3), Layout(4, node_size=2), Layout(4, exchange="weights")]
)
def test_two_runs_are_equal_bit_for_bit(pool, layout):
    first, second = (pool(4).run(by_dispatcher, "random", [3, 8, 2, 6], layout, SHAPE) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
