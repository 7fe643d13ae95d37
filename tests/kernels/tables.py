"""Copies that read the rows of tables, hard ones among them, and what must come of them by loops in float64.

Called by: the tests of peer_experts, embedding_bag and their passes (test_table_*.py).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from kernels.embedding_bag import embedding_bag
from kernels.peer_experts import peer_experts, peer_products
from kernels.tables.routes import TableRoutes

NAMES = {
    "experts": ("rows", "up", "down", "gates"),
    "products": ("rows", "up"),
    "bag": ("down", "gates"),
}


@dataclass(frozen=True)
class Case:
    """Copies of each output row, D, entries L. rows: R where the received rows are others. only: the entries that copies read."""

    copies: Sequence[int]
    width: int
    entries: int
    rows: int | None = None
    only: Sequence[int] | None = None


CASES = {
    "C20_D16_L8_even": Case([4] * 5, 16, 8),
    "C23_D13_L9_odd_rows_without_copies": Case([0, 7, 1, 0, 15, 0], 13, 9),
    "C19_D20_L50_few_of_many_entries": Case([10, 9], 20, 50),
    "C41_D5_L7_one_entry_has_all": Case([20, 21], 5, 7, only=[3]),
    "C30_D33_L6_three_entries_first_and_last": Case([6] * 5, 33, 6, only=[0, 2, 5]),
    "C26_D12_L10_other_received_rows": Case([9, 0, 5, 12], 12, 10, rows=7),
    "C5_D1_L1_scalars": Case([2, 3], 1, 1),
    "C70_D3_L4_more_copies_than_a_tile": Case([0, 0, 69, 1, 0, 0], 3, 4),
    "C4_D1030_L3_wider_than_a_tile": Case([3, 1], 1030, 3),
    "C41_D300_L3_one_entry_has_all_in_two_programs_of_parts": Case([20, 21], 300, 3, only=[1]),
    "C0_D8_L3_no_copies": Case([0, 0], 8, 3),
    "C0_D8_L3_no_rows": Case([], 8, 3),
    "C0_D8_L3_no_outputs": Case([], 8, 3, rows=2),
}


def make_inputs(
    case: Case, *, rows: torch.dtype = torch.float32, tables: torch.dtype = torch.float32
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(len(case.copies) + case.width)
    num_copies, num_outputs = sum(case.copies), len(case.copies)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    output_C = torch.repeat_interleave(torch.arange(num_outputs), torch.tensor(case.copies, dtype=torch.int64))
    num_rows, row_C = num_outputs, output_C
    if case.rows is not None:
        num_rows = case.rows
        row_C = torch.randint(0, num_rows, (num_copies,), generator=generator).sort().values
    among = torch.tensor(case.only if case.only is not None else range(case.entries))
    entry_C = among[torch.randint(0, len(among), (num_copies,), generator=generator)]
    return {
        "rows": normal(num_rows, case.width).to(rows),
        "up": (normal(case.entries, case.width) / case.width**0.5).to(tables),
        "down": normal(case.entries, case.width).to(tables),
        "gates": normal(num_copies),
        "routes": TableRoutes.of(entry_C, row_C, output_C, num_rows=num_rows, num_outputs=num_outputs),
        "gradient": normal(num_outputs, case.width).to(rows),
        "gradient_of_products": normal(num_copies),
    }


def apply(
    op: str, leaves: dict[str, Tensor], routes: TableRoutes, *, activation: str = "gelu", **options: Any
) -> Tensor:
    values = [leaves[name] for name in NAMES[op]]
    if op == "experts":
        return peer_experts(*values, routes=routes, activation=activation, backend="triton", **options)
    function = peer_products if op == "products" else embedding_bag
    return function(*values, routes=routes, backend="triton", **options)


def by_kernel(op: str, inputs: dict[str, Any], places: int = 4, **options: Any) -> dict[str, Tensor]:
    """Output and gradients by name, in programs of few places, so that runs cross them. Empty memory holds NaN."""
    from kernels.tables import by_entry

    leaves = {name: inputs[name].detach().requires_grad_() for name in NAMES[op]}
    torch.use_deterministic_algorithms(True)
    try:
        with patch.multiple(by_entry, PLACES=places, PARTS=2):
            output = apply(op, leaves, inputs["routes"], **options)
            gradient = inputs["gradient_of_products" if op == "products" else "gradient"].to(output.dtype)
            found = torch.autograd.grad(output, list(leaves.values()), gradient)
    finally:
        torch.use_deterministic_algorithms(False)
    return {"output": output.detach(), **dict(zip(leaves, found, strict=True))}


def gelu(z: float) -> tuple[float, float]:
    """z * Phi(z), and its slope Phi(z) + z * phi(z)."""
    area = 0.5 * math.erfc(-z / math.sqrt(2.0))
    return z * area, area + z * math.exp(-z * z / 2.0) / math.sqrt(2.0 * math.pi)


def relu(z: float) -> tuple[float, float]:
    return max(z, 0.0), float(z > 0.0)


def by_loop(op: str, inputs: dict[str, Any], *, activation: str = "gelu") -> dict[str, Tensor]:
    """Copy after copy, forward and backward, by section 1.2 of the PEER specification."""
    routes: TableRoutes = inputs["routes"]
    x, u, v, g, dy, dz_given = (
        inputs[name].double().numpy() for name in ("rows", "up", "down", "gates", "gradient", "gradient_of_products")
    )
    act: Callable[[float], tuple[float, float]] = {"gelu": gelu, "relu": relu}[activation]
    y = np.zeros((routes.num_outputs, u.shape[1]))
    dx, du, dv, dg, z = (np.zeros_like(each) for each in (x, u, v, g, g))
    ids = (index.tolist() for index in (routes.entry_C, routes.row_C, routes.output_C))
    for copy, (e, r, p) in enumerate(zip(*ids, strict=True)):
        z[copy] = x[r] @ u[e]
        if op == "products":
            du[e] += dz_given[copy] * x[r]
            dx[r] += dz_given[copy] * u[e]
            continue
        active, slope = act(z[copy]) if op == "experts" else (1.0, 0.0)
        through = dy[p] @ v[e]
        y[p] += g[copy] * active * v[e]
        dv[e] += g[copy] * active * dy[p]
        dg[copy] = active * through
        du[e] += g[copy] * slope * through * x[r]
        dx[r] += g[copy] * slope * through * u[e]
    found = {"output": z if op == "products" else y, "rows": dx, "up": du, "down": dv, "gates": dg}
    return {name: torch.from_numpy(found[name]) for name in ("output", *NAMES[op])}
