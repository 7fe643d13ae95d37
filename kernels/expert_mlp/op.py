"""expert_mlp as one operation of torch: what torch.compile sees, and what autograd calls.

Owns: the two custom operations, their shapes, what is saved for the backward pass. Does not own: the kernels (kernel.py), checks and
autocast (the public function). Called by: kernels/expert_mlp, which imports it only where Triton is there.

Saved are the rows, the weights, the gates and the routes; with keep_hidden also relu(x @ W1) (C, F), which the backward pass
otherwise makes again: kernels/expert_mlp/traffic.py has the bytes of both.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.expert_mlp import kernel
from kernels.grouped_matmul.kernel import Rows, launch_weight_gradient
from kernels.sum_copies.kernel import add


@torch.library.custom_op("switchyard::expert_mlp", mutates_args=())
def forward_op(
    rows_RD: Tensor,
    up_LDF: Tensor,
    down_LFD: Tensor,
    gates_C: Tensor,
    row_index_C: Tensor,
    output_index_C: Tensor,
    offsets_L: Tensor,
    factors_CF: Tensor | None,
    output_order_C: Tensor,
    output_ends_P: Tensor,
    row_order_C: Tensor,
    row_ends_R: Tensor,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """The output (P, D), and the hidden activations (C, F), or (0, F) if they are not kept. All tensors contiguous."""
    partials_CD, hidden_CF = kernel.forward(
        rows_RD, up_LDF, down_LFD, gates_C, row_index_C=row_index_C, offsets_L=offsets_L, factors_CF=factors_CF,
        keep_hidden=keep_hidden,
    )  # fmt: skip
    output_PD = add(partials_CD, output_order_C, output_ends_P)
    return output_PD, rows_RD.new_empty(0, up_LDF.shape[2]) if hidden_CF is None else hidden_CF


@forward_op.register_fake
def _forward_fake(
    rows_RD, up_LDF, down_LFD, gates_C, row_index_C, output_index_C, offsets_L, factors_CF, output_order_C, output_ends_P,
    row_order_C, row_ends_R, keep_hidden,
):  # fmt: skip
    num_kept = len(gates_C) if keep_hidden else 0
    return rows_RD.new_empty(len(output_ends_P), rows_RD.shape[1]), rows_RD.new_empty(num_kept, up_LDF.shape[2])


@torch.library.custom_op("switchyard::expert_mlp_backward", mutates_args=())
def backward_op(
    gradient_PD: Tensor,
    rows_RD: Tensor,
    up_LDF: Tensor,
    down_LFD: Tensor,
    gates_C: Tensor,
    row_index_C: Tensor,
    output_index_C: Tensor,
    offsets_L: Tensor,
    factors_CF: Tensor | None,
    row_order_C: Tensor,
    row_ends_R: Tensor,
    hidden_CF: Tensor | None,
    of_rows: bool,
    of_up: bool,
    of_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of rows, up, down and gates; of what is not asked for an empty tensor."""
    found = kernel.backward(
        gradient_PD, rows_RD, up_LDF, down_LFD, gates_C, row_index_C=row_index_C, output_index_C=output_index_C,
        offsets_L=offsets_L, factors_CF=factors_CF, hidden_CF=hidden_CF, of_rows=of_rows,
    )  # fmt: skip
    nothing = [rows_RD.new_empty(0) for _ in range(3)]
    rows_gradient, up_gradient, down_gradient = nothing
    if found.rows_CD is not None:
        rows_gradient = add(found.rows_CD, row_order_C, row_ends_R)
    if of_up:
        up_gradient = launch_weight_gradient(Rows(rows_RD, row_index_C), Rows(found.hidden_CF, None), offsets_L, None)
    if of_down:
        down_gradient = launch_weight_gradient(
            Rows(found.gated_CF, None), Rows(gradient_PD, output_index_C), offsets_L, None
        )
    return rows_gradient, up_gradient, down_gradient, found.gates_C


@backward_op.register_fake
def _backward_fake(
    gradient_PD, rows_RD, up_LDF, down_LFD, gates_C, row_index_C, output_index_C, offsets_L, factors_CF, row_order_C,
    row_ends_R, hidden_CF, of_rows, of_up, of_down,
):  # fmt: skip
    asked = zip((of_rows, of_up, of_down), (rows_RD, up_LDF, down_LFD), strict=True)
    return *(torch.empty_like(tensor) if of_it else tensor.new_empty(0) for of_it, tensor in asked), torch.empty_like(
        gates_C
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, keep_hidden = inputs
    rows, up, down, gates, row_index, output_index, offsets, factors, _, _, row_order, row_ends = tensors
    hidden = output[1] if keep_hidden else None
    ctx.save_for_backward(rows, up, down, gates, row_index, output_index, offsets, factors, row_order, row_ends, hidden)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros (C, F) are made for the second output


def _backward(ctx: Any, gradient_PD: Tensor, _: None) -> tuple[Tensor | None, ...]:
    of_rows, of_up, of_down, of_gates = ctx.needs_input_grad[:4]
    found = backward_op(gradient_PD.contiguous(), *ctx.saved_tensors, of_rows, of_up, of_down)
    asked = (of_rows, of_up, of_down, of_gates)
    return *(gradient if of_it else None for of_it, gradient in zip(asked, found, strict=True)), *[None] * 9


forward_op.register_autograd(_backward, setup_context=_save)
