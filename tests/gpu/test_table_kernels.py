"""The table operations on a GPU, in each dtype: output and gradients against the reference in float64, and bit for bit twice.

Uninitialised memory holds NaN in one of the runs, as in test_kernels.py.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.embedding_bag import embedding_bag
from kernels.embedding_bag.reference import reference as bag_reference
from kernels.peer_experts import peer_experts, peer_products
from kernels.peer_experts.reference import products_reference
from kernels.peer_experts.reference import reference as experts_reference
from kernels.tables.adam import RowAdam
from kernels.tables.routes import TableRoutes
from tests.gpu.cases import DTYPES, SMOKE, TOLERANCE, assert_close, full_or_tiny, normal
from tests.gpu.test_kernels import check

pytestmark = pytest.mark.gpu


@dataclass(frozen=True)
class Table:
    """N tokens of K copies each, D, entries L; hot: of `hot` entries alone."""

    tokens: int
    choices: int
    width: int
    entries: int
    hot: int | None = None

    def __str__(self) -> str:
        return f"T{self.tokens}_K{self.choices}_D{self.width}_L{self.entries}" + f"_hot{self.hot}" * bool(self.hot)


TABLES = full_or_tiny(
    (
        Table(512, 128, 1024, 4096),
        Table(700, 32, 412, 100_000),
        Table(301, 128, 2048, 5000, hot=1),
        Table(300, 64, 128, 3000, hot=7),
        Table(5, 200, 1, 9),
        Table(0, 8, 64, 100),
    ),
    (Table(3, 8, 20, 40), Table(4, 5, 3, 6, hot=1)),
)
every_table = pytest.mark.parametrize("table", TABLES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def inputs_of(table: Table, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Tensor], TableRoutes]:
    generator = torch.Generator().manual_seed(3)
    entry_C = torch.randint(0, table.hot or table.entries, (table.tokens * table.choices,), generator=generator).to(
        device
    )
    token_C = torch.arange(table.tokens, device=device).repeat_interleave(table.choices)
    leaves = {
        "rows": normal(table.tokens, table.width, seed=1, device=device).to(dtype),
        "up": (normal(table.entries, table.width, seed=2, device=device) / table.width**0.5).to(dtype),
        "down": normal(table.entries, table.width, seed=4, device=device).to(dtype),
        "gates": normal(len(entry_C), seed=5, device=device) / table.choices**0.5,
    }
    return leaves, TableRoutes.of(entry_C, token_C, token_C, num_rows=table.tokens, num_outputs=table.tokens)


@every_dtype
@every_table
def test_peer_experts_equals_its_reference(device: torch.device, table: Table, dtype: torch.dtype):
    leaves, routes = inputs_of(table, dtype, device)
    check(
        lambda rows, up, down, gates: peer_experts(
            rows, up, down, gates, routes=routes, activation="gelu", backend="triton"
        ),
        lambda rows, up, down, gates: experts_reference(rows, up, down, gates, routes=routes, activation="gelu"),
        leaves,
        dtype,
    )


@every_dtype
@every_table
def test_peer_products_equals_its_reference(device: torch.device, table: Table, dtype: torch.dtype):
    leaves, routes = inputs_of(table, dtype, device)
    check(
        lambda rows, up: peer_products(rows, up, routes=routes, backend="triton"),
        lambda rows, up: products_reference(rows, up, routes=routes),
        {name: leaves[name] for name in ("rows", "up")},
        dtype,
    )


@every_dtype
@every_table
def test_embedding_bag_equals_its_reference(device: torch.device, table: Table, dtype: torch.dtype):
    leaves, routes = inputs_of(table, dtype, device)
    check(
        lambda down, gates: embedding_bag(down, gates, routes=routes, backend="triton"),
        lambda down, gates: bag_reference(down, gates, routes),
        {name: leaves[name] for name in ("down", "gates")},
        dtype,
    )


@every_table
def test_adam_in_the_backward_pass_equals_a_step_by_the_gradient(device: torch.device, table: Table):
    leaves, routes = inputs_of(table, torch.float32, device)
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.1}
    found, wanted = leaves["down"].clone().requires_grad_(), leaves["down"].clone().requires_grad_()
    adam, other = RowAdam.zeros(found, **settings), RowAdam.zeros(wanted, **settings)
    for _ in range(2):
        embedding_bag(found, leaves["gates"], routes=routes, backend="triton", adam=adam).square().sum().backward()
        output = embedding_bag(wanted, leaves["gates"], routes=routes, backend="triton")
        (gradient,) = torch.autograd.grad(output.square().sum(), [wanted])
        rows_U = routes.entry_C.unique()
        other.step(wanted, rows_U, gradient[rows_U])
    assert found.grad is None
    state, expected = (
        {"table": values.detach(), "first": each.exp_avg_LD, "second": each.exp_avg_sq_LD, "steps": each.steps_L}
        for values, each in ((found, adam), (wanted, other))
    )
    assert_close(state, expected, TOLERANCE[torch.float32])


def test_entries_beyond_two_to_the_31_numbers(device: torch.device):
    last = 8 if SMOKE else 2**21  # 4 GiB; tests/kernels/test_table_operations.py does it without memory
    entry_C = torch.tensor([0, last - 1, last, last + 1], device=device)
    token_C = torch.arange(4, device=device)
    table = torch.zeros(last + 2, 1024, dtype=torch.bfloat16, device=device)
    table[entry_C] = torch.randn(4, 1024, device=device).bfloat16()
    table.requires_grad_()
    routes = TableRoutes.of(entry_C, token_C, token_C, num_rows=4, num_outputs=4)
    output = embedding_bag(table, torch.ones(4, device=device), routes=routes, backend="triton")
    assert torch.equal(output, table[entry_C])
    (gradient,) = torch.autograd.grad(output, [table], output.detach())
    assert torch.equal(gradient, table)
