"""embedding_bag in torch alone, forward and backward. Owns: its autograd function. Does not own: the sums (kernels/tables/sums.py).

Kept for the backward pass: table, gates and ids; no row of a copy. Called by: kernels/embedding_bag.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.tables.adam import RowAdam, pending, table_of, without
from kernels.tables.routes import TableRoutes
from kernels.tables.sums import dots, sums, table_gradient, wide_dtype


def bag(table_LD: Tensor, gates_C: Tensor, routes: TableRoutes, adam: RowAdam | None) -> Tensor:
    """(P, D), float32 at least."""
    return _Bag.apply(table_LD, gates_C, routes, adam)


class _Bag(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_LD: Tensor, gates_C: Tensor, routes: TableRoutes, adam: RowAdam | None) -> Tensor:
        ctx.step = pending(table_LD, adam.state if adam else (), (), needed=ctx.needs_input_grad[0])
        ids = routes.entry_C, routes.output_C, routes.order_C
        ctx.save_for_backward(without(ctx.step, table_LD), gates_C, *ids)
        ctx.adam = adam
        return sums(table_LD, routes.entry_C, gates_C.to(wide_dtype(table_LD)), routes.output_ends_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_PD: Tensor) -> tuple[Tensor | None, ...]:
        table_LD, gates_C, entry_C, output_C, order_C = ctx.saved_tensors
        table_LD = table_of(ctx.step, table_LD)
        of_table_LD = of_gates_C = None
        if ctx.needs_input_grad[1]:
            of_gates_C = dots(gradient_PD, output_C, table_LD, entry_C).to(gates_C.dtype)
        if ctx.needs_input_grad[0]:  # after the gates', which reads the table as it was
            copies = {"entry_C": entry_C, "order_C": order_C, "adam": ctx.adam}
            of_table_LD = table_gradient(table_LD, gradient_PD, output_C, gates_C.to(gradient_PD.dtype), **copies)
        return of_table_LD, of_gates_C, None, None
