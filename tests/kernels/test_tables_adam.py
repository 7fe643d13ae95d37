"""RowAdam: lazy, row by row; as a loop in torch, and inside the backward passes of the table operations."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from kernels.tables.adam import RowAdam
from kernels.tables.routes import TableRoutes
from tests.kernels.tables import NAMES, Case, apply, by_loop, make_inputs

Run = Callable[..., Any]
SETTINGS: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.999), "eps": 1e-6, "weight_decay": 0.1}
OTHER: dict[str, Any] = {"lr": 0.01, "betas": (0.6, 0.99), "eps": 1e-4, "weight_decay": 0.3}
SETTINGS_OF = {"up": SETTINGS, "down": OTHER}
TABLES = {"experts": ("up", "down"), "products": ("up",), "bag": ("down",)}
CASE = Case([9, 0, 5, 12], 12, 10, rows=7)
SOME = (0, 4, 5, 9)


def stepped_by(adam: RowAdam, table: Tensor, gradient_LD: Tensor, rows: list[int]) -> None:
    """One row and one number after the other, in float64; Adam's algorithm 1 (arXiv 1412.6980) with decoupled decay."""
    (beta_1, beta_2), state = adam.betas, (adam.exp_avg_LD, adam.exp_avg_sq_LD)
    for row in rows:
        adam.steps_L[row] += 1
        t = int(adam.steps_L[row])
        for d in range(table.shape[1]):
            g, theta = float(gradient_LD[row, d]), float(table[row, d])
            m, v = (float(each[row, d]) for each in state)
            m, v = beta_1 * m + (1 - beta_1) * g, beta_2 * v + (1 - beta_2) * g * g
            state[0][row, d], state[1][row, d] = m, v
            theta -= adam.lr * adam.weight_decay * theta
            table[row, d] = theta - adam.lr * (m / (1 - beta_1**t)) / ((v / (1 - beta_2**t)) ** 0.5 + adam.eps)


def test_a_step_of_all_rows_is_dense_adamw() -> None:
    """Invariant 20."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 5, generator=generator)
    table, dense = start.clone(), start.clone().requires_grad_()
    adam = RowAdam.zeros(table, **SETTINGS)
    optimizer = torch.optim.AdamW([dense], **SETTINGS)
    for _ in range(5):
        dense.grad = torch.randn(6, 5, generator=generator)
        optimizer.step()
        adam.step(table, torch.arange(6), dense.grad)
    torch.testing.assert_close(table, dense.detach(), rtol=1e-6, atol=1e-6)
    assert adam.steps_L.tolist() == [5] * 6


def test_a_row_that_is_not_touched_neither_moves_nor_decays_and_has_a_count_of_its_own() -> None:
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(5, 3, generator=generator)
    adam, wide = RowAdam.zeros(table, **SETTINGS), table.double()
    wanted = replace(
        adam,
        exp_avg_LD=torch.zeros_like(wide),
        exp_avg_sq_LD=torch.zeros_like(wide),
        steps_L=torch.zeros(5, dtype=torch.int32),
    )
    before = table.clone()
    for rows in ([0, 3], [3], [4, 3]):
        gradient_LD = torch.randn(5, 3, generator=generator)
        adam.step(table, torch.tensor(rows), gradient_LD[rows])
        stepped_by(wanted, wide, gradient_LD, rows)
    for found, expected in (
        (table, wide),
        (adam.exp_avg_LD, wanted.exp_avg_LD),
        (adam.exp_avg_sq_LD, wanted.exp_avg_sq_LD),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert adam.steps_L.tolist() == wanted.steps_L.tolist() == [1, 0, 0, 3, 1]
    assert torch.equal(table[[1, 2]], before[[1, 2]])


def trained(op: str, steps: list[dict[str, Any]], places: int) -> dict[str, Any]:
    """Steps of an operation with Adam in its backward pass: the other gradients of each step, at the end tables and states."""
    from kernels.tables import by_entry

    tables = {name: steps[0][name].clone().requires_grad_() for name in TABLES[op]}
    adams = {name: RowAdam.zeros(table, **SETTINGS_OF[name]) for name, table in tables.items()}
    torch.use_deterministic_algorithms(True)
    gradients, missing = [], True
    for inputs in steps:
        others = {name: inputs[name].detach().requires_grad_() for name in NAMES[op] if name not in tables}
        with patch.multiple(by_entry, PLACES=places, PARTS=2, COUNTED=4):  # runs cross programs that count, too
            given = tuple(adams.values())
            output = apply(op, others | tables, inputs["routes"], adam=given if op == "experts" else given[0])
            output.backward(inputs["gradient_of_products" if op == "products" else "gradient"])
        gradients.append({name: leaf.grad for name, leaf in others.items()})
        missing = missing and all(table.grad is None for table in tables.values())
    torch.use_deterministic_algorithms(False)
    state = {name: (tables[name].detach(), *adams[name].state) for name in tables}
    return {"gradients": gradients, "state": state, "no gradient of a table": missing}


@pytest.mark.parametrize("places", [3, 128])
@pytest.mark.parametrize("op", TABLES)
def test_adam_in_the_backward_pass_steps_the_touched_rows_by_the_gradient_of_the_loop(
    op: str, places: int, interpreted: Run
) -> None:
    """Two steps: the first reads some entries, the second others; the second is taken with the weights of the first."""
    steps = [make_inputs(replace(CASE, only=SOME)), make_inputs(replace(CASE, only=(1, 4, 9)))]
    found = interpreted(trained, op, steps, places)
    tables = {name: steps[0][name].double() for name in TABLES[op]}
    wanted = {name: RowAdam.zeros(table, **SETTINGS_OF[name]) for name, table in tables.items()}
    for inputs, gradients in zip(steps, found["gradients"], strict=True):
        loop = by_loop(op, inputs | tables)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient.double(), loop[name], rtol=1e-4, atol=1e-4, msg=f"gradient of {name}")
        for name, table in tables.items():
            stepped_by(wanted[name], table, loop[name], inputs["routes"].entry_C.unique().tolist())
    for name, (table, *state) in found["state"].items():
        torch.testing.assert_close(table.double(), tables[name], rtol=1e-4, atol=1e-4, msg=f"{name}")
        for one, other in zip(state, wanted[name].state, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=f"state of {name}")
        untouched = [2, 3, 6, 7, 8]
        assert torch.equal(table[untouched], steps[0][name][untouched])
        assert not any(each[untouched].any() for each in state)
    assert found["no gradient of a table"]


SLOW: dict[str, Any] = {"lr": 0.5, "betas": (0.9, 0.9999), "eps": 1e-12}


def first_step(inputs: dict[str, Any]) -> Tensor:
    table = torch.zeros_like(inputs["down"]).requires_grad_()
    adam = RowAdam.zeros(table, **SLOW)
    output = apply("bag", {"down": table, "gates": inputs["gates"]}, inputs["routes"], adam=adam)
    output.backward(inputs["gradient"])
    return table.detach()


@pytest.mark.parametrize("by", ["triton", "torch"])
def test_bias_corrections_are_as_exact_as_the_rest_where_beta_2_is_almost_one(by: str, interpreted: Run) -> None:
    """1 - 0.9999 in float32 has an error of 6e-4, and its root half of that."""
    inputs = make_inputs(CASE)
    gradient_LD, rows = by_loop("bag", inputs)["down"], inputs["routes"].entry_C.unique()
    table, wide = torch.zeros(10, 12), torch.zeros(10, 12, dtype=torch.float64)
    wanted = RowAdam.zeros(wide, **SLOW)
    wanted = replace(wanted, exp_avg_LD=wide.clone(), exp_avg_sq_LD=wide.clone())
    stepped_by(wanted, wide, gradient_LD, rows.tolist())
    if by == "triton":
        table = interpreted(first_step, inputs)
    else:
        RowAdam.zeros(table, **SLOW).step(table, rows, gradient_LD[rows].float())
    torch.testing.assert_close(table.double(), wide, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"exp_avg_LD": torch.zeros(4, 2)},
            r"the exp_avg as a contiguous \[4, 3\] of torch.float32 on cpu, got \[4, 2\]",
        ),
        ({"exp_avg_sq_LD": torch.zeros(3, 4).mT}, r"the exp_avg_sq as a contiguous .* strides \(1, 4\)"),
        ({"steps_L": torch.zeros(4)}, r"the steps as a contiguous \[4\] of torch.int32"),
    ],
)
def test_a_state_of_another_table_is_refused(change: dict[str, Any], message: str) -> None:
    table = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=message):
        replace(RowAdam.zeros(table, lr=1.0), **change).check(table)


def test_tables_of_sixteen_bits_and_betas_of_one_are_refused() -> None:
    table = torch.zeros(4, 3, dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"the table as a contiguous \[4, 3\] of torch.float32 .* got \[4, 3\] of torch.bfloat16"
    ):
        RowAdam.zeros(table, lr=1.0).check(table)
    with pytest.raises(ValueError, match=r"betas of RowAdam must lie between 0 and 1, got \(0.9, 1.0\)"):
        RowAdam.zeros(table, lr=1.0, betas=(0.9, 1.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "the lr of RowAdam must be finite and at least 0, got -1.0"),
        ({"lr": math.nan}, "the lr of RowAdam must be finite and at least 0, got nan"),
        ({"lr": math.inf}, "the lr of RowAdam must be finite and at least 0, got inf"),
        ({"lr": 0.1, "eps": 0.0}, "the eps of RowAdam must be finite and above 0, got 0.0"),
        ({"lr": 0.1, "weight_decay": -3.0}, "the weight_decay of RowAdam must be finite and at least 0, got -3.0"),
    ],
    ids=str,
)
def test_settings_that_would_move_rows_the_wrong_way_or_divide_by_zero_are_refused(
    settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RowAdam.zeros(torch.zeros(4, 3), **settings)
    RowAdam.zeros(torch.zeros(4, 3), lr=0.0)


def plain_and_compiled(inputs: dict[str, Any]) -> list[tuple[Tensor, ...]]:
    found = []
    for compiled in (False, True):
        table = inputs["down"].clone().requires_grad_()
        adam = RowAdam.zeros(table, **SETTINGS)

        def function(table: Tensor, gates: Tensor, adam: RowAdam = adam) -> Tensor:
            return apply("bag", {"down": table, "gates": gates}, inputs["routes"], adam=adam)

        if compiled:
            function = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
        function(table, inputs["gates"]).sum().backward()
        found.append((table.detach(), *adam.state))
    return found


def test_a_compiled_model_takes_the_same_step(interpreted: Run) -> None:
    plain, compiled = interpreted(plain_and_compiled, make_inputs(CASE))
    assert all(torch.equal(one, other) for one, other in zip(plain, compiled, strict=True))
    assert plain[3].any()


def no_copies() -> RowAdam:
    table = torch.ones(4, 3, requires_grad=True)
    adam, none = RowAdam.zeros(table, **SETTINGS), torch.zeros(0, dtype=torch.int64)
    routes = TableRoutes.of(none, none, none, num_rows=2, num_outputs=2)
    apply("bag", {"down": table, "gates": torch.zeros(0)}, routes, adam=adam).sum().backward()
    assert torch.equal(table, torch.ones(4, 3))
    return adam


def test_no_copies_are_no_step(interpreted: Run) -> None:
    assert not interpreted(no_copies).steps_L.any()
