"""What values at ordinary precision cannot show: where sums are wide, when a rank waits, what is let go, what makes no exchange."""

import gc
import weakref
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import parallel.carry
from model.dispatch import LocalPlan, Routing
from model.parameters import ExpertBank
from parallel.exchange import Load, plan_hop
from parallel.ledger import Ledger, Where
from parallel.peers import Peers
from tests.parallel.routed import Layout, Shape, apply, banks_of, dispatcher_of, routings, rows_of

SHAPE = Shape()


def narrow(layout: Layout) -> tuple[float, float, float]:
    """One token on each of 4 ranks chooses all 4 experts of width 1: output, gradient of the token, gradient of the rank's expert.

    The summands are 256, 1, 1, 1 from the ranks in order: 259 in float32, 256 or 260 where two of them meet in bfloat16.
    """
    with dispatcher_of(layout) as (mesh, dispatcher), torch.autocast("cpu", torch.bfloat16):
        factor = [256.0, 1.0, 1.0, 1.0][mesh.rank]
        bank = ExpertBank(4, {"weight": ((1, 1), lambda shape, g: torch.zeros(shape))})
        bank.shard(rank=mesh.ep_rank, size=4)
        bank.register_parameter("weight", torch.nn.Parameter(torch.full((1, 1, 1), factor)))
        dispatcher.gathered = () if layout.exchange == "tokens" else (bank,)
        x, token = torch.ones(1, 1, requires_grad=True), torch.arange(1)
        (exchange,) = dispatcher.plan(Routing(torch.ones(1, 4), torch.arange(4)[None], token, token, 1, 1, bank))
        y = apply(dispatcher, exchange, x, label="test")
        (y.float() * factor).sum().backward()
        assert x.grad is not None
        gradient = bank.weights()["weight"].grad
        assert gradient is not None
        return y.item(), x.grad.item() / factor, gradient.item()


def test_under_bfloat16_what_the_ranks_send_is_summed_in_float32(pool):
    for _, of_the_token, _ in pool(4).run(narrow, Layout(4)):
        assert of_the_token == 259
    for _, _, of_the_expert in pool(4).run(narrow, Layout(4, exchange="weights")):
        assert of_the_expert == 259


class _Mark(torch.autograd.Function):
    """Work that is put between a start and its wait: it tells when it runs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, events: list[str]) -> torch.Tensor:
        ctx.events = events
        events.append("work")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.events.append("work")
        return gradient, None


class _Watched:
    """A started collective that tells when it is waited for."""

    def __init__(self, work: Any, events: list[str]) -> None:
        self.work, self.events = work, events

    def wait(self) -> None:
        self.events.append("wait")
        self.work.wait()


def order_of_events(layout: Layout) -> tuple[list[str], list[str]]:
    """Starts, waits and the work between of V's exchange, forward and backward."""
    events: list[str] = []

    def started(name: str) -> Any:
        original = getattr(dist, name)

        def start(*args: Any, async_op: bool = False, **options: Any) -> Any:
            work = original(*args, async_op=async_op, **options)
            if async_op:
                events.append("start")
            return _Watched(work, events) if async_op else work

        return mock.patch.object(dist, name, start)

    with dispatcher_of(layout) as (mesh, dispatcher):
        rows = rows_of(mesh.rank, SHAPE, routing="random", tokens=5)
        banks = banks_of(SHAPE, layout, mesh.ep_rank, torch.double)
        dispatcher.gathered = banks if layout.exchange == "weights" else ()
        x, z = rows.x_TD.clone().requires_grad_(), torch.ones(1, requires_grad=True)
        value, _ = dispatcher.plan(*routings(rows, SHAPE, rows.gates_XK, banks))
        with started("all_to_all_single"), started("all_gather_into_tensor"):
            arriving = dispatcher.dispatch(value, x, label="value")
            gathering = dispatcher.weights(value, label="value")
            marked = _Mark.apply(z, events)
            weight = gathering.wait()["weight"]

            def experts(rows_RX: torch.Tensor, plan: LocalPlan) -> torch.Tensor:
                copies = rows_RX[plan.row_index_C] @ weight.sum((0,))
                sums = copies.new_zeros(plan.num_outputs, weight.shape[2])
                return sums.index_add(0, plan.output_index_C, copies * plan.gates_C[:, None])

            y = dispatcher.combine(arriving, experts, label="value").wait()
            forward, events[:] = list(events), []
            (y.sum() + marked.sum()).backward()
    return forward, list(events)


@pytest.mark.parametrize("exchange", ["tokens", "weights"])
def test_work_between_start_and_wait_runs_while_rows_or_weights_travel_in_both_passes(pool, exchange):
    for forward, backward in pool(2).run(order_of_events, Layout(2, exchange=exchange)):
        assert forward.index("start") < forward.index("work") < forward.index("wait")
        assert "start" in backward[: backward.index("work")]
        assert "wait" in backward[backward.index("work") :]
    for forward, backward in pool(2).run(order_of_events, Layout(2, exchange=exchange, overlap=False)):
        assert forward[: forward.index("work")].count("wait") >= forward[: forward.index("work")].count("start")
        assert backward[: backward.index("work")].count("wait") >= backward[: backward.index("work")].count("start")


def plan_and_dispatch_without_width() -> list[int]:
    """All-to-alls of a plan, and of a dispatch of rows of width 0 without gates."""
    with dispatcher_of(Layout(2)) as (mesh, dispatcher):
        rows = rows_of(mesh.rank, SHAPE, routing="random", tokens=4)
        banks = banks_of(SHAPE, Layout(2), mesh.ep_rank, torch.double)
        routing = replace(routings(rows, SHAPE, rows.gates_XK, banks)[0], gates_NK=None)
        with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchanged:
            (exchange,) = dispatcher.plan(routing)
            planned = exchanged.call_count
            dispatcher.dispatch(exchange, rows.x_TD[:, :0], label="pkm")
            return [planned, exchanged.call_count]


def test_rows_of_width_zero_make_no_exchange(pool):
    assert pool(2).run(plan_and_dispatch_without_width) == [[2, 2]] * 2


def what_is_left(layout: Layout) -> int:
    """Flights that live after a forward and a backward pass, while the output does."""
    with dispatcher_of(layout) as (mesh, dispatcher):
        rows = rows_of(mesh.rank, SHAPE, routing="random", tokens=4)
        banks = banks_of(SHAPE, layout, mesh.ep_rank, torch.double)
        made: list[weakref.ref[Any]] = []
        original = parallel.carry.Flight.__init__

        def remember(self: Any, *args: Any, **options: Any) -> None:
            made.append(weakref.ref(self))
            original(self, *args, **options)

        with mock.patch.object(parallel.carry.Flight, "__init__", remember):
            gates = rows.gates_XK.clone().requires_grad_()
            value, output = dispatcher.plan(*routings(rows, SHAPE, gates, banks))
            x = rows.x_TD.clone().requires_grad_()
            y = apply(dispatcher, output, apply(dispatcher, value, x, label="value"), label="output")
            y.sum().backward()
        gc.collect()
        assert len(made) > 12
        return sum(reference() is not None for reference in made)


@pytest.mark.parametrize("layout", [Layout(2), Layout(2, chunks=2), Layout(2, node_size=1)])
def test_what_has_landed_is_let_go(pool, layout):
    assert pool(2).run(what_is_left, layout) == [0, 0]


def transposed_results(layout: Layout) -> list[np.ndarray]:
    """The output where the experts give dense rows, and where they give a transposed matrix of the same values."""
    found = []
    with dispatcher_of(layout) as (mesh, dispatcher):
        rows = rows_of(mesh.rank, SHAPE, routing="random", tokens=6)
        banks = banks_of(SHAPE, layout, mesh.ep_rank, torch.double)
        for turn in (False, True):
            value, _ = dispatcher.plan(*routings(rows, SHAPE, rows.gates_XK, banks))
            arriving = dispatcher.dispatch(value, rows.x_TD, label="value")

            def experts(rows_RX: torch.Tensor, plan: LocalPlan, turn: bool = turn) -> torch.Tensor:
                sums = torch.zeros(plan.num_outputs, rows_RX.shape[1], dtype=torch.float64)
                sums = sums.index_add(0, plan.output_index_C, rows_RX[plan.row_index_C])
                return sums.T.contiguous().T if turn else sums

            found.append(dispatcher.combine(arriving, experts, label="value").wait().numpy())
    return found


def test_results_may_lie_in_any_order_of_strides(pool):
    for dense, turned in pool(2).run(transposed_results, Layout(2)):
        np.testing.assert_array_equal(dense, turned)


class _Recorded:
    """A group of 200 ranks, of which this is number 150: what an exchange of counts is handed."""

    def __init__(self) -> None:
        self.sent: torch.Tensor | None = None

    def all_to_all_single(self, received: torch.Tensor, sent: torch.Tensor, *args: Any, **options: Any) -> Any:
        self.sent = sent.clone() if self.sent is None else self.sent
        received.zero_()
        return mock.Mock()


def test_the_counts_of_200_ranks_lie_in_the_order_of_ranks():
    ranks, recorded = torch.randint(200, (5000,), generator=torch.Generator().manual_seed(1)), _Recorded()
    peers = Peers(group=mock.Mock(), rank=150, size=200, is_near=(True,) * 200, ledger=Ledger())
    row = torch.arange(5000) // 4
    load = Load(ranks, torch.zeros(5000).long(), row, row, torch.arange(5000), None, 1250, 1250, 5000, True)
    with mock.patch.object(dist, "all_to_all_single", recorded.all_to_all_single):
        (leg,) = plan_hop([load], peers=peers, where=Where("test", "", "plan")).legs
    assert recorded.sent is not None
    copies = torch.bincount(ranks, minlength=200)
    distinct = torch.tensor([len(row[ranks == rank].unique()) for rank in range(200)])
    assert torch.equal(recorded.sent, torch.stack([copies, distinct, distinct], dim=1))
    assert leg.rows.num_here == distinct[150]
    here, leaving = leg.rows.index_N[: leg.rows.num_here], leg.rows.index_N[leg.rows.num_here :]
    assert torch.equal(here, row[ranks == 150].unique())
    assert leaving.tolist() == [r for rank in range(200) if rank != 150 for r in row[ranks == rank].unique().tolist()]


def where_the_host_reads() -> list[tuple[int, str]]:
    """Every tensor that a plan brings to the host, and the collective it is in."""
    found: list[tuple[int, str]] = []
    with dispatcher_of(Layout(2)) as (mesh, dispatcher):
        rows = rows_of(mesh.rank, SHAPE, routing="random", tokens=4)
        banks = banks_of(SHAPE, Layout(2), mesh.ep_rank, torch.double)
        original = torch.Tensor.tolist

        def read(self: torch.Tensor) -> Any:
            if self.ndim == 3:  # the counts; the sums of the host's own small tables are lists too
                found.append((self.numel(), "" if mesh.ledger.current is None else mesh.ledger.current.verb))
            return original(self)

        with mock.patch.object(torch.Tensor, "tolist", read):
            dispatcher.plan(*routings(rows, SHAPE, rows.gates_XK, banks))
    return found


def test_a_plan_reads_its_counts_within_the_collective_that_the_watchdog_sees(pool):
    assert pool(2).run(where_the_host_reads) == [[(24, "plan")]] * 2
