"""SwitchHead's V and O as operations of torch: what torch.compile sees, and what autograd calls.

Owns: the custom operations, their shapes, what is saved for the backward pass, the order of its launches. Does not own: the kernels
(kernel.py), checks and autocast (the public functions). Called by: kernels/switchhead_project, which imports it only where Triton is
there.

Saved are the inputs and nothing else: products are made again, and the routes are sorted in the backward pass, for the weights alone.
That sum runs over the chosen experts' copies, by grouped_matmul's kernel. What multiplies the weights in the forward pass is what
multiplies their gradient: in the outputs the rounded gate * y. So there the copies' gradient is the left side of the product, and its
result is turned.
"""

# pyright: reportArgumentType=false
# torch.library passes plain tensors to what it registers.

from typing import Any

import torch
from torch import Tensor

from kernels.grouped_matmul.kernel import Rows, launch_weight_gradient
from kernels.sort_routes import sort_routes
from kernels.switchhead_project.kernel import Projection, launch_outputs, launch_values


@torch.library.custom_op("switchyard::switchhead_values", mutates_args=())
def values_op(x_TD: Tensor, weights_GDC: Tensor, gates_THK: Tensor, experts_THK: Tensor) -> Tensor:
    """(T, H, C). All contiguous."""
    values_THC, _ = launch_values(x_TD, Projection(weights_GDC, gates_THK, experts_THK, to_heads=True))
    assert values_THC is not None
    return values_THC


@values_op.register_fake
def _values_fake(x_TD, weights_GDC, gates_THK, experts_THK):
    return x_TD.new_empty(*gates_THK.shape[:2], weights_GDC.shape[2])


@torch.library.custom_op("switchyard::switchhead_values_backward", mutates_args=())
def values_backward_op(
    gradient_THC: Tensor,
    x_TD: Tensor,
    weights_GDC: Tensor,
    gates_THK: Tensor,
    experts_THK: Tensor,
    of_x: bool,
    of_weights: bool,
    of_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weights and gates; of what is not asked for an empty tensor."""
    projection = Projection(weights_GDC, gates_THK, experts_THK, to_heads=True)
    x_gradient, weights_gradient, gates_gradient = (x_TD.new_empty(0), x_TD.new_empty(0), gates_THK.new_empty(0))
    if of_x:
        x_gradient = launch_outputs(gradient_THC, projection)
    if of_gates:
        _, dots_THK = launch_values(x_TD, projection, values=False, other_THC=gradient_THC)
        assert dots_THK is not None
        gates_gradient = dots_THK
    if of_weights:
        copies = _Copies(projection)
        weights_gradient = copies.weight_gradient(x_TD, gradient_THC)
    return x_gradient, weights_gradient, gates_gradient


@torch.library.custom_op("switchyard::switchhead_outputs", mutates_args=())
def outputs_op(y_THC: Tensor, weights_GCD: Tensor, gates_THK: Tensor, experts_THK: Tensor) -> Tensor:
    """(T, D). All contiguous."""
    return launch_outputs(y_THC, Projection(weights_GCD, gates_THK, experts_THK, to_heads=False))


@outputs_op.register_fake
def _outputs_fake(y_THC, weights_GCD, gates_THK, experts_THK):
    return y_THC.new_empty(len(y_THC), weights_GCD.shape[2])


@torch.library.custom_op("switchyard::switchhead_outputs_backward", mutates_args=())
def outputs_backward_op(
    gradient_TD: Tensor,
    y_THC: Tensor,
    weights_GCD: Tensor,
    gates_THK: Tensor,
    experts_THK: Tensor,
    of_y: bool,
    of_weights: bool,
    of_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of y, weights and gates; of what is not asked for an empty tensor."""
    projection = Projection(weights_GCD, gates_THK, experts_THK, to_heads=False)
    y_gradient, weights_gradient, gates_gradient = (y_THC.new_empty(0), y_THC.new_empty(0), gates_THK.new_empty(0))
    if of_y or of_gates:
        other_THC = y_THC if of_gates else None
        found_THC, dots_THK = launch_values(gradient_TD, projection, values=of_y, other_THC=other_THC)
        y_gradient = y_gradient if found_THC is None else found_THC
        gates_gradient = gates_gradient if dots_THK is None else dots_THK
    if of_weights:
        copies = _Copies(projection)
        weights_gradient = copies.weight_gradient(gradient_TD, y_THC).mT.contiguous()
    return y_gradient, weights_gradient, gates_gradient


class _Copies:
    """The T * H * K routed copies in the order of their groups."""

    def __init__(self, projection: Projection) -> None:
        _, heads, choices = projection.gates_THK.shape
        num_groups = len(projection.weights)
        first_H1 = torch.arange(heads, device=projection.weights.device)[:, None] * (num_groups // heads)
        routes = sort_routes(projection.experts_THK + first_H1, num_groups=num_groups)
        self.offsets_G = routes.offsets_G
        self.gates_C = projection.gates_THK.flatten()[routes.order_C]
        self.pair_C = routes.order_C // choices  # of (token, head)
        self.token_C = self.pair_C // heads

    def weight_gradient(self, wide_TD: Tensor, narrow_THC: Tensor) -> Tensor:
        """(G, D, C): for each group the sum over its copies of wide[token] times round(gate * narrow[token, head])."""
        wide, narrow = Rows(wide_TD, self.token_C), Rows(narrow_THC.flatten(0, 1), self.pair_C)
        return launch_weight_gradient(wide, narrow, self.offsets_G, self.gates_C)


def _backward_fake(gradient, rows, weights, gates_THK, experts_THK, of_rows, of_weights, of_gates):
    asked = zip((of_rows, of_weights, of_gates), (rows, weights, gates_THK), strict=True)
    return tuple(torch.empty_like(tensor) if of_it else tensor.new_empty(0) for of_it, tensor in asked)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _values_backward(ctx: Any, gradient_THC: Tensor) -> tuple[Tensor | None, ...]:
    return _asked(ctx, values_backward_op(gradient_THC.contiguous(), *ctx.saved_tensors, *ctx.needs_input_grad[:3]))


def _outputs_backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor | None, ...]:
    return _asked(ctx, outputs_backward_op(gradient_TD.contiguous(), *ctx.saved_tensors, *ctx.needs_input_grad[:3]))


def _asked(ctx: Any, found: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return *(each if of_it else None for each, of_it in zip(found, ctx.needs_input_grad[:3], strict=True)), None


values_backward_op.register_fake(_backward_fake)
outputs_backward_op.register_fake(_backward_fake)
values_op.register_autograd(_values_backward, setup_context=_save)
outputs_op.register_autograd(_outputs_backward, setup_context=_save)
