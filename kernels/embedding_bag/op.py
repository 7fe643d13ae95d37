"""embedding_bag by Triton as one operation of torch: what torch.compile sees, and what autograd calls.

Owns: the custom operation, its shape, what is saved for the backward pass. Does not own: the kernels and their launches (kernels/
table_rows), checks and autocast (the public function). Called by: kernels/embedding_bag, which imports it only where Triton is there.

There is no kernel.py here: the forward pass is one launch of kernels/tables/by_row.py, and so is the gates' gradient; the table's is
two of by_entry.py. Saved are the arguments and the routes.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.tables.adam import RowAdam, pending, table_of, without
from kernels.tables.by_row import weighted_sums
from kernels.tables.op import contiguous, of_adam, of_no_adam, products_op, table_gradient
from kernels.tables.routes import TableRoutes


def embedding_bag_op(
    table_LD: Tensor, gates_C: Tensor, routes: TableRoutes, dtype: torch.dtype, adam: RowAdam | None = None
) -> Tensor:
    """(P, D) in `dtype`; see the public function."""
    tensors = (table_LD, gates_C, routes.entry_C, routes.output_C, routes.order_C, routes.output_ends_P)
    return forward_op(*contiguous(*tensors), dtype, *of_adam(adam))


@torch.library.custom_op("switchyard::embedding_bag", mutates_args=())
def forward_op(
    table_LD: Tensor,
    gates_C: Tensor,
    entry_C: Tensor,
    output_C: Tensor,
    order_C: Tensor,
    output_ends_P: Tensor,
    dtype: torch.dtype,
    adam_state: list[Tensor],
    adam_settings: list[float],
) -> Tensor:
    """adam_state, adam_settings: of a RowAdam or empty; only the backward pass reads them."""
    return weighted_sums(table_LD, gates_C, entry_C, output_ends_P, dtype=dtype)


@forward_op.register_fake
def _(table_LD, gates_C, entry_C, output_C, order_C, output_ends_P, dtype, adam_state, adam_settings):
    return table_LD.new_empty(len(output_ends_P), table_LD.shape[1], dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, gates, entry, output_index, order, ends, _, state, settings = inputs
    ctx.step, ctx.num_state = pending(table, state, settings, needed=ctx.needs_input_grad[0]), len(state)
    ctx.save_for_backward(without(ctx.step, table), gates, entry, output_index, order, ends)


def _backward(ctx: Any, gradient_PD: Tensor) -> tuple[Any, ...]:
    table, gates, entry, output_index, order, ends = ctx.saved_tensors
    table = table_of(ctx.step, table)
    gradient_PD = gradient_PD.contiguous()
    of_table = of_gates = None
    if ctx.needs_input_grad[1]:
        of_gates = products_op(gradient_PD, table, entry, ends)
    if ctx.needs_input_grad[0]:  # after the gates', which reads the table as it was
        of_table = table_gradient(table, gradient_PD, output_index, gates, entry, order, step=ctx.step)
    return of_table, of_gates, *[None] * 5, *of_no_adam(ctx.num_state)


forward_op.register_autograd(_backward, setup_context=_save)
