"""peer_experts and peer_products in torch alone, forward and backward.

Owns: their autograd functions. Does not own: the sums (kernels/tables/sums.py), rounding under autocast (the public functions).
Kept for the backward pass: rows, tables, gates, ids, and a number z per copy; rows of the tables are read again.
Called by: kernels/peer_experts.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.tables.adam import RowAdam, pending, table_of, without
from kernels.tables.routes import TableRoutes
from kernels.tables.sums import dots, sums, table_gradient, wide_dtype


def experts(
    rows_RD: Tensor,
    up_LD: Tensor,
    down_LD: Tensor,
    gates_C: Tensor,
    routes: TableRoutes,
    activation: str,
    adam: tuple[RowAdam, RowAdam] | None,
) -> Tensor:
    """(P, D) in the dtype of the rows. adam: of up and of down."""
    return _Experts.apply(rows_RD, up_LD, down_LD, gates_C, routes, activation, adam or (None, None))


def products(rows_RX: Tensor, up_LX: Tensor, routes: TableRoutes, adam: RowAdam | None) -> Tensor:
    """z_C, float32 at least."""
    return _Products.apply(rows_RX, up_LX, routes, adam)


class _Experts(torch.autograd.Function):
    """z = u . x, y = sum of g act(z) v; backward, with c = dy . v: dg = act(z) c, dz = g act'(z) c, dx = sum of dz u, du = sum of dz x,
    dv = sum of g act(z) dy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        up_LD: Tensor,
        down_LD: Tensor,
        gates_C: Tensor,
        routes: TableRoutes,
        activation: str,
        adam: tuple[RowAdam | None, RowAdam | None],
    ) -> Tensor:
        z_C = dots(rows_RD.to(wide_dtype(rows_RD, up_LD, down_LD)), routes.row_C, up_LD, routes.entry_C)
        ids = routes.entry_C, routes.row_C, routes.output_C, routes.order_C, routes.row_ends_R
        ctx.steps = up, down = [
            pending(table_LD, each.state if each else (), (), needed=needed)
            for table_LD, each, needed in zip((up_LD, down_LD), adam, ctx.needs_input_grad[1:3], strict=True)
        ]
        ctx.save_for_backward(rows_RD, without(up, up_LD), without(down, down_LD), gates_C, z_C, *ids)
        ctx.activation, ctx.adam = activation, adam
        return sums(down_LD, routes.entry_C, gates_C * _active(z_C, activation), routes.output_ends_P).to(rows_RD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_PD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, up_LD, down_LD, gates_C, z_C, entry_C, row_C, output_C, order_C, row_ends_R = ctx.saved_tensors
        up_LD, down_LD = table_of(ctx.steps[0], up_LD), table_of(ctx.steps[1], down_LD)
        of_rows, of_up, of_down, _ = ctx.needs_input_grad[:4]
        gradient_PD, active_C = gradient_PD.to(z_C.dtype), _active(z_C, ctx.activation)
        through_C = dots(gradient_PD, output_C, down_LD, entry_C)
        of_gates_C = (active_C * through_C).to(gates_C.dtype)
        of_z_C = _slope(z_C, ctx.activation) * gates_C * through_C
        of_rows_RD = of_up_LD = of_down_LD = None
        if of_rows:
            of_rows_RD = sums(up_LD, entry_C, of_z_C, row_ends_R).to(rows_RD.dtype)
        # the tables last: with Adam they are not what they were
        copies: dict[str, Any] = {"entry_C": entry_C, "order_C": order_C}
        if of_up:
            rows_RD = rows_RD.to(z_C.dtype)
            of_up_LD = table_gradient(up_LD, rows_RD, row_C, of_z_C, **copies, adam=ctx.adam[0])
        if of_down:
            weights_C = gates_C * active_C
            of_down_LD = table_gradient(down_LD, gradient_PD, output_C, weights_C, **copies, adam=ctx.adam[1])
        return of_rows_RD, of_up_LD, of_down_LD, of_gates_C, None, None, None


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RX: Tensor, up_LX: Tensor, routes: TableRoutes, adam: RowAdam | None) -> Tensor:
        ctx.step = pending(up_LX, adam.state if adam else (), (), needed=ctx.needs_input_grad[1])
        ids = routes.entry_C, routes.row_C, routes.order_C, routes.row_ends_R
        ctx.save_for_backward(rows_RX, without(ctx.step, up_LX), *ids)
        ctx.adam = adam
        return dots(rows_RX.to(wide_dtype(rows_RX, up_LX)), routes.row_C, up_LX, routes.entry_C)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_C: Tensor) -> tuple[Tensor | None, ...]:
        rows_RX, up_LX, entry_C, row_C, order_C, row_ends_R = ctx.saved_tensors
        up_LX = table_of(ctx.step, up_LX)
        of_rows_RX = of_up_LX = None
        if ctx.needs_input_grad[0]:
            of_rows_RX = sums(up_LX, entry_C, gradient_C, row_ends_R).to(rows_RX.dtype)
        if ctx.needs_input_grad[1]:
            copies = {"entry_C": entry_C, "order_C": order_C, "adam": ctx.adam}
            of_up_LX = table_gradient(up_LX, rows_RX.to(gradient_C.dtype), row_C, gradient_C, **copies)
        return of_rows_RX, of_up_LX, None, None


def _active(z_C: Tensor, activation: str) -> Tensor:
    return F.gelu(z_C) if activation == "gelu" else F.relu(z_C)


def _slope(z_C: Tensor, activation: str) -> Tensor:
    """The activation's derivative: of z Phi(z), Phi(z) + z phi(z)."""
    if activation == "relu":
        return (z_C > 0).to(z_C.dtype)
    density_C = torch.exp(-0.5 * z_C**2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(z_C) + z_C * density_C
