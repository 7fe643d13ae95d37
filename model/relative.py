"""Relative positions of Transformer-XL: a score for the distance between query and key, beside the one for their contents.

Owns the table of projected distances and the learned biases and scale of the dense form. Does not own the softmax (attend.py, which
calls this). Source: Dai et al., arXiv 1901.02860, section 3.3; the two forms as in the code of arXiv 2312.07987 (specs, section 5).
Shape letters: B rows, H heads, S queries, M keys, C head width, D model width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cache import KeyValueCache
from model.parameters import DeclaringModule, Initializer, zeros


class RelativeCache(KeyValueCache):
    """Keys and values, and the table of distances, which is one for all rows and therefore not part of `num_floats`."""

    table_HMC: Tensor | None = None


class Queries(NamedTuple):
    """What meets the keys and what meets the distances, (B, H, S, C) each, both with the scale of the scores in them."""

    content: Tensor
    position: Tensor


class RelativePositions(DeclaringModule):
    """scores[i, j] = scale * ((q_i + u) . k_j + (q_i + v) . r[i - j]), with r[d] = W_pos times the sinusoid of the distance d.

    learned: u and v, one vector per head each, begin at 0 and the scale at 1 / sqrt(C), as in the papers' dense baseline. Its code has
    one more number per layer that nothing uses; it is left out here, so counts are one per layer below the published formula.
    Otherwise u = v = 0 and the scale stays, as in SwitchHead. `draw` initialises W_pos, (H * C, D).
    """

    weight: Tensor
    content_bias: Tensor
    position_bias: Tensor
    scale: Tensor

    def __init__(self, *, d_model: int, num_heads: int, head_dim: int, draw: Initializer, learned: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.learned = num_heads, head_dim, learned
        self.declare("weight", (num_heads * head_dim, d_model), draw)
        if learned:
            # flat, because what has one dimension is no matrix and does not decay (train/optimizer.py)
            self.declare("content_bias", (num_heads * head_dim,), zeros)
            self.declare("position_bias", (num_heads * head_dim,), zeros)
            self.declare("scale", (1,), lambda shape, _: torch.full(shape, 1 / math.sqrt(head_dim)))

    def queries(self, q_BHSC: Tensor) -> Queries:
        """The two forms of the queries, in the dtype of q."""
        if not self.learned:
            scaled_BHSC = q_BHSC / math.sqrt(self.head_dim)
            return Queries(scaled_BHSC, scaled_BHSC)
        biases_H1C = (bias.view(self.num_heads, 1, self.head_dim) for bias in (self.content_bias, self.position_bias))
        return Queries(*(((q_BHSC + bias_H1C) * self.scale).to(q_BHSC.dtype) for bias_H1C in biases_H1C))

    def table(self, num_keys: int, cache: KeyValueCache | None) -> Tensor:
        """r (H, M, C) for M = num_keys distances, the farthest first: row p is that of distance M - 1 - p."""
        if cache is None:
            return self._project(num_keys)
        assert isinstance(cache, RelativeCache)
        known = 0 if cache.table_HMC is None else cache.table_HMC.shape[1]
        if cache.table_HMC is None or known < num_keys:
            cache.table_HMC = self._project(max(num_keys, 2 * known))  # doubling: a token costs no D x M product
        return cache.table_HMC[:, -num_keys:]

    def _project(self, num_distances: int) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        distances_M = torch.arange(num_distances - 1, -1, -1, device=self.weight.device, dtype=dtype)
        r_MX = F.linear(sinusoids(distances_M, self.weight.shape[1]), self.weight)
        return r_MX.unflatten(1, (self.num_heads, self.head_dim)).transpose(0, 1)


def sinusoids(distances_M: Tensor, dim: int) -> Tensor:
    """(M, dim): channel 2 c is sin(distance / 10000^(2 c / dim)), channel 2 c + 1 the cosine (arXiv 1706.03762, section 3.5)."""
    channels_D = torch.arange(dim, device=distances_M.device)
    exponents_D = (channels_D - channels_D % 2).to(distances_M.dtype) / dim
    angles_MD = distances_M[:, None] * 10_000.0**-exponents_D
    return torch.where(channels_D % 2 == 0, angles_MD.sin(), angles_MD.cos())


def shift(by_distance_BHSM: Tensor) -> Tensor:
    """From products with the table, (i, p) for distance M - 1 - p, to scores (i, j) for the distance i + M - S - j.

    Row i moves S - 1 - i places to the left. Where j lies after its query there is no distance: what stands there comes from the
    next row and must be masked.
    """
    num_queries, num_keys = by_distance_BHSM.shape[-2:]
    padded_BHX = F.pad(by_distance_BHSM, (1, 0)).flatten(-2)
    return padded_BHX[..., num_queries:].unflatten(-1, (num_queries, num_keys))
