"""shift_mix and its decoding step as operations of torch: what torch.compile sees, and what autograd calls.

Owns: the custom operations, their shapes, what is saved for the backward pass. Does not own: the kernels (kernel.py), checks (the public
functions). Called by: kernels/shift_mix, which imports it only where Triton is there.

Saved are the inputs and nothing else. The step has no gradient: it changes its ring.
"""

# pyright: reportArgumentType=false
# torch.library passes plain tensors to what it registers.

from typing import Any

import torch
from torch import Tensor

from kernels.shift_mix.kernel import launch_backward, launch_mix, launch_step


@torch.library.custom_op("switchyard::shift_mix", mutates_args=())
def mix_op(
    u_BSD: Tensor, a_X: Tensor, b_X: Tensor, first_BS: Tensor | None, shifts: list[int], boundary: str
) -> Tensor:
    """(B, S, D) in the dtype of u. All contiguous."""
    return launch_mix(u_BSD, a_X, b_X, first_BS, shifts=shifts, boundary=boundary)


@mix_op.register_fake
def _mix_fake(u_BSD, a_X, b_X, first_BS, shifts, boundary):
    return torch.empty_like(u_BSD)


@torch.library.custom_op("switchyard::shift_mix_backward", mutates_args=())
def backward_op(
    gradient_BSD: Tensor,
    u_BSD: Tensor,
    a_X: Tensor,
    b_X: Tensor,
    first_BS: Tensor | None,
    shifts: list[int],
    boundary: str,
    of_u: bool,
    of_factors: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of u, and those of a and b together (2, X) in float32; of what is not asked for an empty tensor."""
    u_gradient, factors_gradient = launch_backward(
        gradient_BSD, u_BSD, a_X, b_X, first_BS, shifts=shifts, boundary=boundary, of_u=of_u, of_factors=of_factors
    )
    return (
        u_BSD.new_empty(0) if u_gradient is None else u_gradient,
        a_X.new_empty(0) if factors_gradient is None else factors_gradient,
    )


@backward_op.register_fake
def _backward_fake(gradient_BSD, u_BSD, a_X, b_X, first_BS, shifts, boundary, of_u, of_factors):
    return (
        torch.empty_like(u_BSD) if of_u else u_BSD.new_empty(0),
        a_X.new_empty(2, len(a_X)) if of_factors else a_X.new_empty(0),
    )


@torch.library.custom_op("switchyard::shift_mix_step", mutates_args=("ring_BRW",))
def step_op(u_BW: Tensor, ring_BRW: Tensor, a_X: Tensor, b_X: Tensor, place: int, source: int, boundary: str) -> Tensor:
    """(B, W) in the dtype of u. Factors and ring contiguous, the rows of u by themselves."""
    return launch_step(u_BW, ring_BRW, a_X, b_X, place=place, source=source, boundary=boundary)


@step_op.register_fake
def _step_fake(u_BW, ring_BRW, a_X, b_X, place, source, boundary):
    return u_BW.new_empty(u_BW.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, shifts, boundary = inputs
    ctx.save_for_backward(*tensors)
    ctx.shifts, ctx.boundary = shifts, boundary


def _backward(ctx: Any, gradient_BSD: Tensor) -> tuple[Tensor | None, ...]:
    of_u, of_a, of_b = ctx.needs_input_grad[:3]
    u_gradient, factors_gradient = backward_op(
        gradient_BSD.contiguous(), *ctx.saved_tensors, ctx.shifts, ctx.boundary, of_u, of_a or of_b
    )
    return (
        u_gradient if of_u else None,
        factors_gradient[0] if of_a else None,
        factors_gradient[1] if of_b else None,
        None, None, None,
    )  # fmt: skip


mix_op.register_autograd(_backward, setup_context=_save)
