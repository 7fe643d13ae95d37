"""What a step of Adam in a backward pass refuses or survives: checkpoints, hooks on saved tensors, tables that are shared or computed.

By both backends: in Triton's interpreter and in torch. A function here returns what happened, since the interpreter is another process.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.embedding_bag import embedding_bag
from kernels.peer_experts import peer_experts, peer_products
from kernels.tables.adam import RowAdam
from tests.kernels.tables import Case, make_inputs

Run = Callable[..., Any]
INPUTS = make_inputs(Case([3, 2, 4], 6, 20))
LATER = "were changed in place since"
backends = pytest.mark.parametrize("backend", ["triton", "torch"])


def run(backend: str, interpreted: Run, function: Run, *args: Any) -> Any:
    return interpreted(function, backend, *args) if backend == "triton" else function(backend, *args)


def fresh() -> tuple[Tensor, RowAdam]:
    table = INPUTS["down"].clone().requires_grad_()
    return table, RowAdam.zeros(table, lr=0.1)


def applied(op: str, table: Tensor, adam: RowAdam, backend: str) -> Tensor:
    rows, gates, routes = (INPUTS[name] for name in ("rows", "gates", "routes"))
    if op == "bag":
        return embedding_bag(table, gates, routes=routes, backend=backend, adam=adam)
    if op == "products":
        return peer_products(rows, table, routes=routes, backend=backend, adam=adam)
    down = INPUTS["down"].clone().requires_grad_()
    adams = (adam, RowAdam.zeros(down, lr=0.1))
    return peer_experts(rows, table, down, gates, routes=routes, activation="gelu", backend=backend, adam=adams)


def used(backend: str, op: str, how: str) -> tuple[str, list[int], int]:
    """What was refused, the steps of each row, and how often a step would have been made for each."""
    table, adam = fresh()
    scale = torch.ones((), requires_grad=True)

    def once(scale: Tensor) -> Tensor:
        return applied(op, table, adam, backend) * scale

    def twice(scale: Tensor) -> Tensor:
        return once(scale) + once(scale) ** 2

    if how == "plainly":
        output = twice(scale)
    elif how == "in one checkpoint":
        output = checkpoint(twice, scale, use_reentrant=False)
    elif how == "in two checkpoints":
        output = sum(checkpoint(once, scale, use_reentrant=False) for _ in range(2))
    else:
        output = once(scale)
        with torch.no_grad():
            adam.exp_avg_LD.add_(1.0)
    assert isinstance(output, Tensor)
    try:
        output.sum().backward()
    except RuntimeError as error:
        return str(error), adam.steps_L.tolist(), int(adam.steps_L.max())
    return "nothing", adam.steps_L.tolist(), int(adam.steps_L.max())


@backends
@pytest.mark.parametrize("how", ["plainly", "in one checkpoint", "in two checkpoints"])
def test_a_table_that_is_used_twice_before_the_backward_pass_is_stepped_once_and_refused(
    how: str, backend: str, interpreted: Run
) -> None:
    for op in ("bag", "products", "experts"):
        refused, _, most = run(backend, interpreted, used, op, how)
        assert LATER in refused, op
        assert most == 1


@backends
def test_a_state_that_was_changed_since_the_forward_pass_is_refused(backend: str, interpreted: Run) -> None:
    refused, _, most = run(backend, interpreted, used, "bag", "with another state")
    assert LATER in refused
    assert most == 0


def stepped(backend: str, op: str, how: str) -> list[Tensor]:
    table, adam = fresh()
    if how == "hooks that copy":
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
            output = applied(op, table, adam, backend)
    elif how == "a checkpoint":
        scale = torch.ones((), requires_grad=True)
        output = checkpoint(lambda one: applied(op, table, adam, backend) * one, scale, use_reentrant=False)
    else:
        output = applied(op, table, adam, backend)
    assert isinstance(output, Tensor)
    output.sum().backward()
    return [table.detach(), *adam.state]


@backends
@pytest.mark.parametrize("how", ["hooks that copy", "a checkpoint"])
def test_the_step_is_made_on_the_table_itself_whatever_is_done_with_saved_tensors(
    how: str, backend: str, interpreted: Run
) -> None:
    for op in ("bag", "products", "experts"):
        found, wanted = (run(backend, interpreted, stepped, op, each) for each in (how, "plainly"))
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True)), op
        assert wanted[3].any()
        assert not torch.equal(wanted[0], INPUTS["down"])


def test_a_table_that_was_computed_is_refused() -> None:
    table, adam = fresh()
    with pytest.raises(ValueError, match=r"must be leaves, but a table of .* was computed by <MulBackward0"):
        applied("bag", table * 1.0, adam, "torch")
    with torch.no_grad():
        applied("bag", table * 1.0, adam, "torch")


def test_tables_and_states_that_share_memory_are_refused() -> None:
    rows, gates, routes = (INPUTS[name] for name in ("rows", "gates", "routes"))
    (up, one), (down, other) = fresh(), fresh()
    both = torch.zeros(40, 6)
    halves = [both[:20].requires_grad_(), both[20:].requires_grad_()]
    for first, second, adams in ((up, down, (one, one)), (up, up, (one, other)), (*halves, (one, other))):
        with pytest.raises(ValueError, match=r"no two may share memory, got 8 tensors in [57] storages"):
            peer_experts(rows, first, second, gates, routes=routes, activation="gelu", backend="torch", adam=adams)
    itself = RowAdam(exp_avg_LD=one.exp_avg_LD, exp_avg_sq_LD=one.exp_avg_LD, steps_L=one.steps_L, lr=0.1)
    with pytest.raises(ValueError, match="got 4 tensors in 3 storages"):
        applied("bag", up, itself, "torch")
