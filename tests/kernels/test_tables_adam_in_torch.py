"""Adam in the backward pass of peer_experts, peer_products and embedding_bag in torch (invariant 20 of the PEER specification)."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.tables.adam import RowAdam
from kernels.tables.routes import TableRoutes
from tests.kernels.tables import NAMES, Case, by_loop, make_inputs
from tests.kernels.test_tables_in_torch import OPS, apply

SETTINGS: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
ALL_READ, SOME_READ = Case([12] * 4, 6, 4), Case([3, 2, 4], 6, 20)
OTHER: dict[str, Any] = {"lr": 0.02, "betas": (0.6, 0.99), "eps": 1e-4, "weight_decay": 0.3}
SETTINGS_OF = {"up": SETTINGS, "down": OTHER}
TABLES = {"experts": ("up", "down"), "products": ("up",), "bag": ("down",)}


def batch(case: Case, step: int) -> dict[str, Any]:
    """Rows, gates and entries of a step; the tables are those of the first."""
    inputs = make_inputs(case)
    generator = torch.Generator().manual_seed(step)
    routes: TableRoutes = inputs["routes"]
    entry_C = torch.randint(0, case.entries, routes.entry_C.shape, generator=generator)
    if case is ALL_READ:
        entry_C[: case.entries] = torch.arange(case.entries)
    sizes: dict[str, Any] = {"num_rows": routes.num_rows, "num_outputs": routes.num_outputs}
    inputs["routes"] = TableRoutes.of(entry_C, routes.row_C, routes.row_C, **sizes)
    for name in ("rows", "gates", "gradient", "gradient_of_products"):
        inputs[name] = torch.randn(inputs[name].shape, generator=generator)
    return inputs


def train(op: str, case: Case, *, steps: int) -> tuple[dict[str, Tensor], list[RowAdam], list[dict[str, Tensor]]]:
    """The tables and their state after some steps, and the gradients of rows and gates in each."""
    tables = {name: make_inputs(case)[name].requires_grad_() for name in TABLES[op]}
    adams = [RowAdam.zeros(table, **SETTINGS_OF[name]) for name, table in tables.items()]
    others: list[dict[str, Tensor]] = []
    for step in range(steps):
        inputs = batch(case, step)
        leaves = {name: tables[name] if name in tables else inputs[name].requires_grad_() for name in NAMES[op]}
        adam = (adams[0], adams[1]) if op == "experts" else adams[0]
        output = apply(op, list(leaves.values()), inputs["routes"], adam=adam)
        output.backward(inputs["gradient_of_products" if op == "products" else "gradient"])
        assert all(table.grad is None for table in tables.values())
        others.append({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
    return {name: table.detach() for name, table in tables.items()}, adams, others


def lazy_by_loop(op: str, case: Case, *, steps: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Row by row in float64, by the gradients of a loop over the copies; weight decay and count of touched rows only."""
    tables = {name: make_inputs(case)[name].double() for name in TABLES[op]}
    moments = {name: [torch.zeros_like(table), torch.zeros_like(table)] for name, table in tables.items()}
    counts = [0] * case.entries
    others = []
    for step in range(steps):
        inputs = batch(case, step) | tables
        found = by_loop(op, inputs)
        others.append({name: found[name] for name in NAMES[op] if name not in tables})
        for entry in set(inputs["routes"].entry_C.tolist()):
            counts[entry] += 1
            for name, table in tables.items():
                gradient, (first, second) = found[name][entry], moments[name]
                lr, (beta_1, beta_2), eps, decay = SETTINGS_OF[name].values()
                first[entry] = beta_1 * first[entry] + (1 - beta_1) * gradient
                second[entry] = beta_2 * second[entry] + (1 - beta_2) * gradient**2
                mean = first[entry] / (1 - beta_1 ** counts[entry])
                spread = (second[entry] / (1 - beta_2 ** counts[entry])).sqrt()
                table[entry] -= lr * (decay * table[entry] + mean / (spread + eps))
    return tables, others


@pytest.mark.parametrize("op", OPS)
def test_where_every_row_is_read_it_is_dense_adamw(op: str):
    tables, adams, _ = train(op, ALL_READ, steps=4)
    dense = {name: make_inputs(ALL_READ)[name].double().requires_grad_() for name in TABLES[op]}
    optimizer = torch.optim.AdamW([{"params": [table], **SETTINGS_OF[name]} for name, table in dense.items()])
    for step in range(4):
        found = by_loop(op, batch(ALL_READ, step) | {name: table.detach() for name, table in dense.items()})
        for name, table in dense.items():
            table.grad = found[name]
        optimizer.step()
    for name, table in tables.items():
        torch.testing.assert_close(table.double(), dense[name].detach(), rtol=1e-5, atol=1e-5)
    assert all(adam.steps_L.tolist() == [4] * 4 for adam in adams)


@pytest.mark.parametrize("op", OPS)
def test_where_some_rows_are_read_it_is_a_loop_over_these_and_the_others_stay_as_they_were(op: str):
    tables, adams, others = train(op, SOME_READ, steps=5)
    wanted, wanted_others = lazy_by_loop(op, SOME_READ, steps=5)
    read = torch.zeros(20, dtype=torch.int32)
    for step in range(5):
        read[batch(SOME_READ, step)["routes"].entry_C.unique()] += 1
    assert 0 < (read == 0).sum() < 20
    assert read.max() > 1
    for (name, table), adam in zip(tables.items(), adams, strict=True):
        torch.testing.assert_close(table.double(), wanted[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(table[read == 0], make_inputs(SOME_READ)[name][read == 0])
        assert not adam.exp_avg_LD[read == 0].any()
        assert torch.equal(adam.steps_L, read)
    for step, found in enumerate(others):  # they read the tables as they were before the step
        for name, gradient in found.items():
            torch.testing.assert_close(gradient.double(), wanted_others[step][name], rtol=1e-4, atol=1e-4)


def test_it_differs_from_dense_adamw_where_rows_are_left_out():
    tables, _, _ = train("bag", SOME_READ, steps=3)
    dense = make_inputs(SOME_READ)["down"].requires_grad_()
    optimizer = torch.optim.AdamW([dense], **OTHER)
    for step in range(3):
        dense.grad = by_loop("bag", batch(SOME_READ, step) | {"down": dense.detach()})["down"].float()
        optimizer.step()
    assert (tables["down"] - dense.detach()).abs().max() > 0.01


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({}, {"backend": "reference"}, "takes no adam"),
        ({"frozen": True}, {}, "requires_grad of a table of .* is False"),
        ({"exp_avg_LD": torch.zeros(4, 5)}, {}, "RowAdam needs the exp_avg"),
        ({"steps_L": torch.zeros(4)}, {}, "RowAdam needs the steps"),
    ],
    ids=["reference", "frozen", "shape", "dtype"],
)
def test_what_cannot_be_stepped_is_refused(change: dict[str, Any], options: dict[str, str], words: str):
    inputs = make_inputs(ALL_READ)
    table = inputs["down"].requires_grad_("frozen" not in change)
    state = {name: value for name, value in change.items() if name != "frozen"}
    adam = replace(RowAdam.zeros(table, lr=0.1), **state)
    with pytest.raises(ValueError, match=words):
        apply("bag", [table, inputs["gates"]], inputs["routes"], adam=adam, **options)


def test_a_step_of_one_number_is_the_formula():
    table = torch.tensor([[2.0]])
    adam = RowAdam.zeros(table, lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    adam.step(table, torch.tensor([0]), torch.tensor([[3.0]]))
    assert table.item() == pytest.approx(2.0 - 0.1 * (0.5 * 2.0 + 3.0 / math.sqrt(9.0)), rel=1e-6)
