"""What a mixer and a feed-forward have in common: their signature, and the small dense modules that all of them use."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from model.parameters import DeclaringModule, Initializer, ones, zeros
from model.router import RouterReport


class LayerOutput(NamedTuple):
    """Result of a mixer or feed-forward: y_BSD; auxiliary losses (0-dim, weights included); reports by router name."""

    y_BSD: Tensor
    auxiliary_losses: tuple[Tensor, ...] = ()
    reports: Mapping[str, RouterReport] = MappingProxyType({})


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
