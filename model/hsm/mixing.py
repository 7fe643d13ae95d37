"""The mixing functions: what a position makes of its own token u and of the token v that was shifted to it.

All are position-wise, m[t] = M(u[t], v[t]), so nothing here knows of positions. Owns their parameters. Does not own the shift
(shift.py). Built by model/hsm/layer.py. Equations: docs/hsm.md, our reading of arXiv 2601.22852. Shape letters: B rows, S positions,
D model width, H heads or slices, C width of a slice, F hidden width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.hsm.config import HSMConfig
from model.layer import Linear
from model.parameters import DeclaringModule, Initializer, normal, zeros

STD = 0.02  # of every matrix, as in GPT-2; those that write to the residual stream have it divided by sqrt(2 * num_layers)


class Scale(DeclaringModule):
    """One factor per slice of the width: 1 slice is a scalar, D slices a vector. 1-D, so that it never decays."""

    weight: Tensor

    def __init__(self, num_slices: int, *, initial: float) -> None:
        super().__init__()
        self.num_slices = num_slices
        self.declare("weight", (num_slices,), lambda shape, generator: torch.full(shape, initial))

    def forward(self, x_BSD: Tensor) -> Tensor:
        return (self.weight[:, None] * x_BSD.unflatten(-1, (self.num_slices, -1))).flatten(-2)


class BlockLinear(DeclaringModule):
    """A block-diagonal matrix: slice h of the output reads slice h of the input. weight (H, C, C), from channel last."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, d_model: int, num_blocks: int, *, draw: Initializer, bias: bool) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        width = d_model // num_blocks
        self.declare("weight", (num_blocks, width, width), draw)
        if bias:
            self.declare("bias", (d_model,), zeros)
        else:
            self.bias = None

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSHC = x_BSD.unflatten(-1, (self.num_blocks, -1))
        y_BSD = torch.einsum("bshi,hoi->bsho", x_BSHC, self.weight).flatten(-2)
        return y_BSD if self.bias is None else y_BSD + self.bias


class LinearMix(DeclaringModule):
    """m = f(u) + g(v): (a,b) and A,B in all their forms, by what f and g are."""

    def __init__(self, of_token: nn.Module, of_shifted: nn.Module) -> None:
        super().__init__()
        self.of_token = of_token
        self.of_shifted = of_shifted

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """a and b, of as many slices each, where tokens are only scaled: such a mix needs no v in memory (kernels/shift_mix)."""
        if isinstance(self.of_token, Scale) and isinstance(self.of_shifted, Scale):
            return self.of_token.weight, self.of_shifted.weight
        return None

    def forward(self, u_BSD: Tensor, v_BSD: Tensor) -> Tensor:
        return self.of_token(u_BSD) + self.of_shifted(v_BSD)


class Gate(DeclaringModule):
    """One gate: m = g u + (1 - g) v. Two: m = g1 u + g2 v. [g] or [g1; g2] = sigma(G [u; v] + bias), elementwise products."""

    def __init__(self, d_model: int, *, num_gates: int, bias: bool) -> None:
        super().__init__()
        self.num_gates = num_gates
        self.gate = Linear(2 * d_model, num_gates * d_model, draw=normal(STD), bias=bias)

    def forward(self, u_BSD: Tensor, v_BSD: Tensor) -> Tensor:
        gates = self.gate(torch.cat([u_BSD, v_BSD], dim=-1)).sigmoid()
        of_token, of_shifted = gates.chunk(2, dim=-1) if self.num_gates == 2 else (gates, 1 - gates)
        return of_token * u_BSD + of_shifted * v_BSD


class Fusion(DeclaringModule):
    """m = W2 phi(W1 [u; v]): a small network over both tokens."""

    def __init__(self, d_model: int, hidden_dim: int, *, activation: str, draw_out: Initializer, bias: bool) -> None:
        super().__init__()
        self.phi = F.relu if activation == "relu" else F.gelu
        self.up = Linear(2 * d_model, hidden_dim, draw=normal(STD), bias=bias)
        self.down = Linear(hidden_dim, d_model, draw=draw_out, bias=bias)

    def forward(self, u_BSD: Tensor, v_BSD: Tensor) -> Tensor:
        return self.down(self.phi(self.up(torch.cat([u_BSD, v_BSD], dim=-1))))


def mixing(config: HSMConfig, *, d_model: int, num_layers: int) -> nn.Module:
    """The mixing function of `config.variant`, called with (u_BSD, v_BSD). `num_layers` sets the scale of what writes to the residual."""
    bias = config.bias is not False
    heads = config.num_heads or 1
    a = 0.5 if config.initial_a is None else config.initial_a
    b = 0.5 if config.initial_b is None else config.initial_b
    draw_out = normal(STD / math.sqrt(2 * num_layers))
    if config.variant in ("constant", "vector", "multihead"):
        slices = d_model if config.variant == "vector" else heads
        return LinearMix(Scale(slices, initial=a), Scale(slices, initial=b))
    if config.variant == "matrix_scalar":
        return LinearMix(Linear(d_model, d_model, draw=draw_out, bias=bias), Scale(1, initial=b))
    if config.variant == "matrix":
        of_token = Linear(d_model, d_model, draw=draw_out, bias=bias)  # one bias serves the sum
        return LinearMix(of_token, Linear(d_model, d_model, draw=draw_out))
    if config.variant == "multihead_matrix":
        of_token = BlockLinear(d_model, heads, draw=draw_out, bias=bias)
        return LinearMix(of_token, BlockLinear(d_model, heads, draw=draw_out, bias=False))
    if config.variant == "fusion":
        assert config.hidden_dim is not None
        activation = config.activation or "gelu"
        return Fusion(d_model, config.hidden_dim, activation=activation, draw_out=draw_out, bias=bias)
    return Gate(d_model, num_gates=2 if config.variant == "double_gate" else 1, bias=bias)
