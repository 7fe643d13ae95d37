"""embedding_bag in torch alone, forward and backward. Owns: its autograd function. Does not own: the sums (kernels/table_sums.py).

Kept for the backward pass: table, gates and ids; no row of a copy. Called by: kernels/embedding_bag.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.table_routes import TableRoutes
from kernels.table_sums import dots, sums, sums_by_entry, wide_dtype


def bag(table_LD: Tensor, gates_C: Tensor, routes: TableRoutes) -> Tensor:
    """(P, D), float32 at least."""
    return _Bag.apply(table_LD, gates_C, routes)


class _Bag(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_LD: Tensor, gates_C: Tensor, routes: TableRoutes) -> Tensor:
        ctx.save_for_backward(table_LD, gates_C, routes.entry_C, routes.output_C, routes.order_C)
        weights_C = gates_C.to(wide_dtype(table_LD))
        return sums(table_LD, routes.entry_C, weights_C, routes.output_ends_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_PD: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        table_LD, gates_C, entry_C, output_C, order_C = ctx.saved_tensors
        of_table_LD = of_gates_C = None
        if ctx.needs_input_grad[0]:
            weights_C, ids = gates_C.to(gradient_PD.dtype), {"entry_C": entry_C, "order_C": order_C}
            found_LD = sums_by_entry(gradient_PD, output_C, weights_C, **ids, num_entries=len(table_LD))
            of_table_LD = found_LD.to(table_LD.dtype)
        if ctx.needs_input_grad[1]:
            of_gates_C = dots(gradient_PD, output_C, table_LD, entry_C).to(gates_C.dtype)
        return of_table_LD, of_gates_C, None
