"""Product keys: n + n sub-keys that score n^2 values, and the choice of the best of them.

Owns the query, the sub-keys and the gates that PKM and PEER share. Does not own the exact selection without scoring all values
(kernels/product_key_topk), the values (model/lookup.py has what is done with chosen ones), nor the layers (pkm.py, peer.py). Called by
those.

The score of value (a, b) is first_a + second_b. Its expert id, which decides between equal scores, is a n + b (arXiv 2407.04153).

Shape letters: T tokens, D model width, H heads, P = H queries or 1 that all heads have, Z = 2 halves, J sub-keys of a half (the papers'
n), C width of half a query, K picks, X what a query is normalised over.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.product_key_topk import PairChoice, product_key_topk
from model.batch_norm import BatchNorm
from model.layer import LayerNorm, Linear
from model.parameters import DeclaringModule, Initializer, uniform


class Queries(NamedTuple):
    """Queries (T, P, 2, C), float32; and what their norm adds to its states, by name in the layer (LayerOutput)."""

    queries_TPZC: Tensor
    updates: Mapping[str, Tensor]


def gates_of(scores_THK: Tensor, *, kind: str) -> Tensor:
    """softmax over the picks of one head; sigmoid or relu of each score by itself."""
    if kind == "softmax":
        return scores_THK.softmax(-1)
    return scores_THK.sigmoid() if kind == "sigmoid" else scores_THK.relu()


class ProductKeys(DeclaringModule):
    """From hidden states to queries, and from those to the best values or to all scores, in float32 in every mode: a layer's `router`.

    query_h = norm(W_h x), or norm(x) for all heads alike without a projection; its two halves meet the two sets of sub-keys, which
    each head has for itself or all heads share. `norm`: "batch" over the rows of all ranks, per feature; "layer" over a head's
    query; "none". Sub-keys, like all routers, never decay. draw_keys: by default uniform in +-1 / sqrt(half the query's width). backend:
    of kernels/product_key_topk.
    """

    keys: Tensor

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        num_keys: int,
        key_dim: int | None,
        shared_keys: bool,
        norm: str,
        bias: bool = False,
        draw_keys: Initializer | None = None,
    ) -> None:
        super().__init__()
        self.backend = "torch"
        self.num_heads = num_heads
        self.key_dim = d_model if key_dim is None else key_dim
        self.query: nn.Module | None = None
        self.batch_norm: BatchNorm | None = None
        self.layer_norm: LayerNorm | None = None
        width = self.key_dim
        if key_dim is not None:
            width = num_heads * key_dim
            xavier = uniform(math.sqrt(6 / (d_model + width)))
            self.query = Linear(d_model, width, draw=xavier, bias=bias)
        if norm == "batch":
            self.batch_norm = BatchNorm(width)
        elif norm == "layer":
            self.layer_norm = LayerNorm(self.key_dim)
        half = self.key_dim // 2
        draw_keys = draw_keys or uniform(1 / math.sqrt(half))
        self.declare("keys", (1 if shared_keys else num_heads, 2, num_keys, half), draw_keys, decays=False)

    def forward(self, x_TD: Tensor) -> Queries:
        updates: dict[str, Tensor] = {}
        with torch.autocast(x_TD.device.type, enabled=False):
            query_TX = x_TD.to(self.keys.dtype)
            if self.query is not None:
                query_TX = self.query(query_TX)
            if self.batch_norm is not None:
                query_TX, changes = self.batch_norm(query_TX)
                updates = {f"router.batch_norm.{name}": change for name, change in changes.items()}
            query_TPX = query_TX.unflatten(1, (-1, self.key_dim))
            if self.layer_norm is not None:
                query_TPX = self.layer_norm(query_TPX)
            return Queries(query_TPX.unflatten(2, (2, -1)), updates)

    def choose(self, queries_TPZC: Tensor, *, top_k: int) -> PairChoice:
        """The K best values of each head."""
        if len(self.keys) == 1:
            queries_TPZC = queries_TPZC.expand(-1, self.num_heads, -1, -1)
        return product_key_topk(queries_TPZC, self.keys, top_k=top_k, backend=self.backend)

    def scores(self, queries_TPZC: Tensor) -> Tensor:
        """Scores (T, H, 2, J) of all sub-keys."""
        with torch.autocast(queries_TPZC.device.type, enabled=False):
            queries_THZC = queries_TPZC.expand(-1, self.num_heads, -1, -1)
            return torch.einsum("thzc,hzjc->thzj", queries_THZC, self.keys.expand(self.num_heads, -1, -1, -1))
