"""RMoE's router, which remembers what the layers below have routed by (Qiu et al., arXiv 2408.06793).

Owns the recurrence over the depth; the choice of experts is selection.py's. Called by sigma_moe.py, and the state goes from layer to layer
as LayerOutput.carry_TX. Shape letters: T tokens, D model width, E experts, X width of the state.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.parameters import DeclaringModule, Initializer, normal, zeros
from model.section import Place

ROUTER_DIM = 256  # of the authors' models


class Recurrence(DeclaringModule):
    """A gated recurrent unit, one for all layers of a model, with the gates reset, update, new in this order.

    h' = (1 - z) n + z h, r and z sigmoids of W x + b + U h + c, n = tanh(W x + b + r (U h + c)). Biases start at 0, weights with variance
    1 / X (our reading: the authors draw the biases like the weights).
    """

    input_weight: Tensor
    input_bias: Tensor
    state_weight: Tensor
    state_bias: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        for name in ("input", "state"):
            self.declare(f"{name}_weight", (3 * dim, dim), normal(1 / math.sqrt(dim)), decays=False)
            self.declare(f"{name}_bias", (3 * dim,), zeros)

    def forward(self, x_TX: Tensor, state_TX: Tensor) -> Tensor:
        reset, update, new = F.linear(x_TX, self.input_weight, self.input_bias).chunk(3, dim=1)
        from_reset, from_update, from_new = F.linear(state_TX, self.state_weight, self.state_bias).chunk(3, dim=1)
        update_TX = (update + from_update).sigmoid()
        new_TX = (new + (reset + from_reset).sigmoid() * from_new).tanh()
        return (1 - update_TX) * new_TX + update_TX * state_TX


class Scored(NamedTuple):
    """Logits (T, 1, E) and the state (T, X) for the next layer, float32 both."""

    logits_T1E: Tensor
    state_TX: Tensor


class RecurrentRouter(DeclaringModule):
    """logits = W2 h, h = GRU(W1 x, state of the layer below); in float32 whatever the run's dtype, the state 0 below the first layer."""

    input_weight: Tensor
    weight: Tensor

    def __init__(self, place: Place, *, dim: int, num_experts: int, draw_input: Initializer) -> None:
        super().__init__()
        self.declare("input_weight", (dim, place.d_model), draw_input, decays=False)
        self.declare("weight", (num_experts, dim), normal(1 / math.sqrt(dim)), decays=False)
        self.recurrence = place.shared.setdefault("recurrent_router", Recurrence(dim))

    def forward(self, x_TD: Tensor, state_TX: Tensor | None) -> Scored:
        with torch.autocast(x_TD.device.type, enabled=False):
            projected_TX = F.linear(x_TD.to(self.input_weight.dtype), self.input_weight)
            below_TX = torch.zeros_like(projected_TX) if state_TX is None else state_TX
            own_TX = self.recurrence(projected_TX, below_TX)
            return Scored(F.linear(own_TX, self.weight)[:, None], own_TX)
