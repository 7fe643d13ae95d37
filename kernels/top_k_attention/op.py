"""top_k_attention as one operation of torch: what torch.compile sees, and what autograd calls.

Owns: the two custom operations, their shapes, what is saved for the backward pass. Does not own: the kernels (kernel.py), checks and
autocast (the public function). Called by: kernels/top_k_attention, which imports it only where Triton is there.

Saved are q, k, v, the output, and three numbers per query and head. The precision of the products is an argument: the backward pass
has to choose the keys that the forward pass chose, whatever torch's switch for TF32 says by then.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.top_k_attention import kernel


@torch.library.custom_op("switchyard::top_k_attention", mutates_args=())
def forward_op(
    q_BHSC: Tensor, k_BGMC: Tensor, v_BGMD: Tensor, first_BS: Tensor | None, top_k: int, scale: float, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output (B, H, S, D); log_sum, lowest and last (B, H, S) of `kernel.Chosen`, (0,) for None. All tensors contiguous."""
    output, chosen = kernel.forward(
        q_BHSC, k_BGMC, v_BGMD, first_BS, top_k=top_k, scale=scale, precision=precision
    )  # fmt: skip
    if chosen.lowest is None or chosen.last is None:
        return output, chosen.log_sum, *_nothing(q_BHSC)
    return output, chosen.log_sum, chosen.lowest, chosen.last


def _nothing(q_BHSC: Tensor) -> tuple[Tensor, Tensor]:
    return q_BHSC.new_empty(0, dtype=torch.float32), q_BHSC.new_empty(0, dtype=torch.int32)


@forward_op.register_fake
def _forward_fake(q_BHSC, k_BGMC, v_BGMD, first_BS, top_k, scale, precision):
    output = v_BGMD.new_empty(*q_BHSC.shape[:3], v_BGMD.shape[3])
    log_sum = q_BHSC.new_empty(q_BHSC.shape[:3], dtype=torch.float32)
    if output.numel() == 0 or top_k >= k_BGMC.shape[2]:
        return output, log_sum, *_nothing(q_BHSC)
    return output, log_sum, torch.empty_like(log_sum), torch.empty_like(log_sum, dtype=torch.int32)


@torch.library.custom_op("switchyard::top_k_attention_backward", mutates_args=())
def backward_op(
    gradient_BHSD: Tensor,
    q_BHSC: Tensor,
    k_BGMC: Tensor,
    v_BGMD: Tensor,
    first_BS: Tensor | None,
    output_BHSD: Tensor,
    log_sum_BHS: Tensor,
    lowest_BHS: Tensor,
    last_BHS: Tensor,
    scale: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    selects = lowest_BHS.numel() > 0
    chosen = kernel.Chosen(log_sum_BHS, lowest_BHS if selects else None, last_BHS if selects else None)
    return kernel.backward(
        gradient_BHSD, q_BHSC, k_BGMC, v_BGMD, output_BHSD, chosen, first_BS, scale=scale, precision=precision
    )


@backward_op.register_fake
def _backward_fake(
    gradient_BHSD, q_BHSC, k_BGMC, v_BGMD, first_BS, output_BHSD, log_sum_BHS, lowest_BHS, last_BHS, scale, precision
):
    return torch.empty_like(q_BHSC), torch.empty_like(k_BGMC), torch.empty_like(v_BGMD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, first, _, ctx.scale, ctx.precision = inputs
    ctx.save_for_backward(q, k, v, first, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros are made for what has no gradient


def _backward(ctx: Any, gradient_BHSD: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    found = backward_op(gradient_BHSD.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.precision)
    asked = ctx.needs_input_grad[:3]
    return *(gradient if of_it else None for of_it, gradient in zip(asked, found, strict=True)), *[None] * 4


forward_op.register_autograd(_backward, setup_context=_save)
