"""What a mixer and a feed-forward have in common: their signature, and the small dense modules that all of them use."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from model.parameters import DeclaringModule, Initializer, ones, zeros
from model.router import RouterReport, Spread


class LayerOutput(NamedTuple):
    """Result of a mixer or feed-forward; everything after y_BSD is for those that have it.

    auxiliary_losses: 0-dim, weights included. spreads: entropy regularisers, by router; losses only once the repeats of a layer are
    together. reports: by router. updates: by the name of a state in the layer, what is to be added to it after a training
    micro-step (of repeated layers the mean); a forward pass changes no state itself, because recompute runs it twice. carry_TX: what
    the next layer's feed-forward is handed (the state of a router that recurs over the depth).
    """

    y_BSD: Tensor
    auxiliary_losses: tuple[Tensor, ...] = ()
    spreads: Mapping[str, Spread] = MappingProxyType({})
    reports: Mapping[str, RouterReport] = MappingProxyType({})
    updates: Mapping[str, Tensor] = MappingProxyType({})
    carry_TX: Tensor | None = None


class Linear(DeclaringModule):
    """x W^T (+ b), with W (out_dim, in_dim) drawn by `draw` and b zero."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, in_dim: int, out_dim: int, *, draw: Initializer, bias: bool = False) -> None:
        super().__init__()
        self.declare("weight", (out_dim, in_dim), draw)
        if bias:
            self.declare("bias", (out_dim,), zeros)
        else:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LayerNorm(DeclaringModule):
    """Layer normalisation over the last dimension with gain 1 and bias 0 at the start."""

    weight: Tensor
    bias: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.declare("weight", (dim,), ones)
        self.declare("bias", (dim,), zeros)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,), self.weight, self.bias)
