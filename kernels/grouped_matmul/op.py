"""grouped_matmul by Triton as one operation of torch: what torch.compile sees, and what autograd calls.

Owns: the two custom operations, their shapes, what is saved for the backward pass. Does not own: the kernels (kernel.py,
weight_gradient.py), checks and autocast (the public function).
Called by: kernels/grouped_matmul, which imports it only where Triton is there, and forms.py.
"""

import torch
from torch import Tensor

from kernels.grouped_matmul.kernel import RELU_GRADIENT, ROW_GRADIENT, Rows, launch_multiply, launch_weight_gradient
from kernels.sum_copies.kernel import add


@torch.library.custom_op("switchyard::grouped_matmul", mutates_args=())
def forward(
    rows_RM: Tensor,
    weights_GMN: Tensor,
    gates_C: Tensor | None,
    offsets_G: Tensor,
    row_index_C: Tensor | None,
    output_index_C: Tensor | None,
    output_order_C: Tensor | None,
    output_ends_P: Tensor | None,
    row_order_C: Tensor | None,
    row_ends_R: Tensor | None,
    relu: bool,
    gate_first: bool,
) -> Tensor:
    """(C, N), or (P, N) with an output index: see kernels/grouped_matmul/__init__.py.

    An output index comes with its RowCopies, a row index with its own where the rows' gradient is needed.
    """
    rows = Rows(rows_RM, row_index_C)
    out_CN, _ = launch_multiply(rows, weights_GMN, offsets_G, gates_C, relu=relu, gate_first=gate_first)
    if output_order_C is None or output_ends_P is None:
        return out_CN
    return add(out_CN, output_order_C, output_ends_P)


@forward.register_fake
def _(
    rows_RM, weights_GMN, gates_C, offsets_G, row_index_C, output_index_C, output_order_C, output_ends_P, row_order_C,
    row_ends_R, relu, gate_first,
):  # fmt: skip
    copies = rows_RM.shape[0] if row_index_C is None else row_index_C.shape[0]
    return rows_RM.new_empty(copies if output_ends_P is None else output_ends_P.shape[0], weights_GMN.shape[2])


@torch.library.custom_op("switchyard::grouped_matmul_backward", mutates_args=())
def backward(
    gradient: Tensor,
    rows_RM: Tensor,
    weights_GMN: Tensor,
    gates_C: Tensor | None,
    offsets_G: Tensor,
    row_index_C: Tensor | None,
    output_index_C: Tensor | None,
    row_order_C: Tensor | None,
    row_ends_R: Tensor | None,
    relu: bool,
    gate_first: bool,
    needs_rows: bool,
    needs_weights: bool,
    needs_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, weights and gates; an empty tensor for one that is not needed."""
    rows, gradients = Rows(rows_RM, row_index_C), Rows(gradient, output_index_C)
    rows_gradient, weights_gradient = rows_RM.new_empty(0), rows_RM.new_empty(0)
    gates_gradient_C = None
    if relu:
        before_CN, gates_gradient_C = launch_multiply(
            rows, weights_GMN, offsets_G, gates_C, ending=RELU_GRADIENT, other=gradients, gate_first=gate_first
        )
        gradients, gates_C = Rows(before_CN, None), None
    if needs_rows or (needs_gates and not relu):
        copies_CM, found_C = launch_multiply(
            gradients,
            weights_GMN.mT,
            offsets_G,
            gates_C,
            ending=ROW_GRADIENT,
            other=rows if gates_C is not None else None,
        )
        gates_gradient_C = gates_gradient_C if relu else found_C
        if needs_rows and (row_order_C is None or row_ends_R is None):
            rows_gradient = copies_CM
        elif needs_rows:
            rows_gradient = add(copies_CM, row_order_C, row_ends_R)
    if needs_weights:
        weights_gradient = launch_weight_gradient(rows, gradients, offsets_G, gates_C)
    if gates_gradient_C is None or not needs_gates:  # the kernel makes it wherever there are gates
        gates_gradient_C = rows_RM.new_empty(0, dtype=torch.float32)
    return rows_gradient, weights_gradient, gates_gradient_C


@backward.register_fake
def _(
    gradient, rows_RM, weights_GMN, gates_C, offsets_G, row_index_C, output_index_C, row_order_C, row_ends_R, relu,
    gate_first, needs_rows, needs_weights, needs_gates,
):  # fmt: skip
    return (
        rows_RM.new_empty(rows_RM.shape if needs_rows else (0,)),
        rows_RM.new_empty(weights_GMN.shape if needs_weights else (0,)),
        rows_RM.new_empty(gates_C.shape if needs_gates else (0,), dtype=torch.float32),
    )


def _setup(ctx, inputs, output) -> None:
    *tensors, relu, gate_first = inputs
    rows, weights, gates, offsets, row_index, output_index, _, _, row_order, row_ends = tensors
    ctx.save_for_backward(rows, weights, gates, offsets, row_index, output_index, row_order, row_ends)
    ctx.options = (relu, gate_first)


def _gradients(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    found = backward(gradient, *ctx.saved_tensors, *ctx.options, *needs)
    return (*(each if needed else None for each, needed in zip(found, needs, strict=True)), *([None] * 9))


forward.register_autograd(_gradients, setup_context=_setup)
