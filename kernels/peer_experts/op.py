"""peer_experts and peer_products by Triton as operations of torch: what torch.compile sees, and what autograd calls.

Owns: the custom operations, their shapes, what is saved for the backward pass. Does not own: the passes (kernel.py), the tables'
gradients (kernels/tables/op.py), checks and autocast (the public functions).
Called by: kernels/peer_experts, which imports it only where Triton is there.

Saved are the arguments, the routes and z = row . up[entry], 4 bytes per copy.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.peer_experts import kernel
from kernels.tables.adam import RowAdam, pending, table_of, without
from kernels.tables.by_row import products
from kernels.tables.op import contiguous, of_adam, of_no_adam, sums_op, table_gradient
from kernels.tables.routes import TableRoutes


def experts_op(
    rows_RD: Tensor, up_LD: Tensor, down_LD: Tensor, gates_C: Tensor, routes: TableRoutes, activation: str,
    adam: tuple[RowAdam, RowAdam] | None = None,
) -> Tensor:  # fmt: skip
    """(P, D); see the public function. adam: of up and of down."""
    tensors = (rows_RD, up_LD, down_LD, gates_C, routes.entry_C, routes.row_C, routes.output_C, routes.order_C)
    ends = (routes.row_ends_R, routes.output_ends_P)
    return forward_op(*contiguous(*tensors, *ends), activation == "relu", *of_adam(*(adam or ())))[0]


def products_op(rows_RX: Tensor, up_LX: Tensor, routes: TableRoutes, adam: RowAdam | None = None) -> Tensor:
    """z_C; see the public function."""
    tensors = (rows_RX, up_LX, routes.entry_C, routes.row_C, routes.order_C, routes.row_ends_R)
    return partial_op(*contiguous(*tensors), *of_adam(adam))


@torch.library.custom_op("switchyard::peer_experts", mutates_args=())
def forward_op(
    rows_RD: Tensor,
    up_LD: Tensor,
    down_LD: Tensor,
    gates_C: Tensor,
    entry_C: Tensor,
    row_C: Tensor,
    output_C: Tensor,
    order_C: Tensor,
    row_ends_R: Tensor,
    output_ends_P: Tensor,
    relu: bool,
    adam_state: list[Tensor],
    adam_settings: list[float],
) -> tuple[Tensor, Tensor]:
    """The output, and z_C. adam_state, adam_settings: of the RowAdam of up, then of down, or empty; only the backward pass reads them."""
    return kernel.forward(
        rows_RD, up_LD, down_LD, gates_C, entry_C=entry_C, row_ends_R=row_ends_R, output_ends_P=output_ends_P, relu=relu
    )


@forward_op.register_fake
def _(
    rows_RD, up_LD, down_LD, gates_C, entry_C, row_C, output_C, order_C, row_ends_R, output_ends_P, relu, adam_state,
    adam_settings,
):  # fmt: skip
    return rows_RD.new_empty(len(output_ends_P), up_LD.shape[1]), torch.empty_like(gates_C)


@torch.library.custom_op("switchyard::peer_experts_backward", mutates_args=())
def tokens_op(
    gradient_PD: Tensor,
    rows_RD: Tensor,
    up_LD: Tensor,
    down_LD: Tensor,
    gates_C: Tensor,
    hidden_C: Tensor,
    entry_C: Tensor,
    row_ends_R: Tensor,
    output_ends_P: Tensor,
    relu: bool,
    of_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of rows (an empty tensor if not asked for), gates and z, and gate * act(z)."""
    found = kernel.backward(
        gradient_PD, up_LD, down_LD, gates_C, hidden_C, entry_C=entry_C, row_ends_R=row_ends_R, output_ends_P=output_ends_P,
        relu=relu, dtype=rows_RD.dtype if of_rows else None,
    )  # fmt: skip
    rows_gradient = rows_RD.new_empty(0) if found.rows_RD is None else found.rows_RD
    return rows_gradient, found.gates_C, found.hidden_C, found.gated_C


@tokens_op.register_fake
def _(
    gradient_PD, rows_RD, up_LD, down_LD, gates_C, hidden_C, entry_C, row_ends_R, output_ends_P, relu, of_rows,
):  # fmt: skip
    rows_gradient = torch.empty_like(rows_RD) if of_rows else rows_RD.new_empty(0)
    return rows_gradient, *(torch.empty_like(gates_C) for _ in range(3))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rows, up, down, *others, ctx.relu, state, settings = inputs
    middle, numbers, needed = len(state) // 2, len(settings) // 2, ctx.needs_input_grad
    of_up = pending(up, state[:middle], settings[:numbers], needed=needed[1])
    of_down = pending(down, state[middle:], settings[numbers:], needed=needed[2])
    ctx.save_for_backward(rows, without(of_up, up), without(of_down, down), *others, output[1])
    ctx.steps, ctx.num_state = (of_up, of_down), len(state)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros (C,) are made for the second output


def _backward(ctx: Any, gradient_PD: Tensor, _: None) -> tuple[Any, ...]:
    rows, up, down, gates, entry, row, output, order, row_ends, output_ends, hidden = ctx.saved_tensors
    up, down = table_of(ctx.steps[0], up), table_of(ctx.steps[1], down)
    of_rows, of_up, of_down, of_gates = ctx.needs_input_grad[:4]
    gradient_PD = gradient_PD.contiguous()
    rows_gradient, gates_gradient, of_hidden_C, gated_C = tokens_op(
        gradient_PD, rows, up, down, gates, hidden, entry, row_ends, output_ends, ctx.relu, of_rows
    )
    # The tables after the tokens, which read them as they were.
    up_gradient = down_gradient = None
    if of_up:
        up_gradient = table_gradient(up, rows, row, of_hidden_C, entry, order, step=ctx.steps[0])
    if of_down:
        down_gradient = table_gradient(down, gradient_PD, output, gated_C, entry, order, step=ctx.steps[1])
    found = (rows_gradient if of_rows else None, up_gradient, down_gradient, gates_gradient if of_gates else None)
    return *found, *[None] * 7, *of_no_adam(ctx.num_state)


forward_op.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("switchyard::peer_products", mutates_args=())
def partial_op(
    rows_RX: Tensor,
    up_LX: Tensor,
    entry_C: Tensor,
    row_C: Tensor,
    order_C: Tensor,
    row_ends_R: Tensor,
    adam_state: list[Tensor],
    adam_settings: list[float],
) -> Tensor:
    """z_C. adam_state, adam_settings: of a RowAdam of up, or empty; only the backward pass reads them."""
    return products(rows_RX, up_LX, entry_C, row_ends_R).products_C


@partial_op.register_fake
def _(rows_RX, up_LX, entry_C, row_C, order_C, row_ends_R, adam_state, adam_settings):
    return rows_RX.new_empty(len(entry_C), dtype=torch.float32)


def _save_partial(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, up, *others, state, settings = inputs
    ctx.step, ctx.num_state = pending(up, state, settings, needed=ctx.needs_input_grad[1]), len(state)
    ctx.save_for_backward(rows, without(ctx.step, up), *others)


def _partial_backward(ctx: Any, gradient_C: Tensor) -> tuple[Any, ...]:
    rows, up, entry, row, order, row_ends = ctx.saved_tensors
    up = table_of(ctx.step, up)
    of_rows = of_up = None
    gradient_C = gradient_C.contiguous()
    if ctx.needs_input_grad[0]:
        of_rows = sums_op(up, gradient_C, entry, row_ends, rows.dtype)
    if ctx.needs_input_grad[1]:
        of_up = table_gradient(up, rows, row, gradient_C, entry, order, step=ctx.step)
    return of_rows, of_up, *[None] * 4, *of_no_adam(ctx.num_state)


partial_op.register_autograd(_partial_backward, setup_context=_save_partial)
