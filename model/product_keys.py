"""Product keys: n + n sub-keys that score n^2 values, and the exact choice of the best of them without scoring all.

Owns the query, the sub-keys and the selection that PKM and PEER share. Does not own the values (model/lookup.py has what is done with
chosen ones) nor the layers (pkm.py, peer.py). Called by those.

The score of value (a, b) is first_a + second_b. Its expert id, which decides between equal scores, is a n + b (arXiv 2407.04153).

Shape letters: T tokens, D model width, H heads, Z = 2 halves, J sub-keys of a half (the papers' n), C width of half a query, K picks,
Q candidates, X what a query is normalised over.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.batch_norm import BatchNorm
from model.layer import LayerNorm, Linear
from model.parameters import DeclaringModule, Initializer, uniform


class PairChoice(NamedTuple):
    """The K best values of each (token, head), K descending by score: their scores, differentiable, and their sub-keys a and b."""

    scores_THK: Tensor
    first_THK: Tensor
    second_THK: Tensor


class SubScores(NamedTuple):
    """Scores (T, H, 2, J) of all sub-keys, float32; and what the query's norm adds to its states, by name in the layer (LayerOutput)."""

    scores_THZJ: Tensor
    updates: Mapping[str, Tensor]


def candidates(num_picks: int, num_keys: int) -> tuple[list[int], list[int]]:
    """Ranks (from 0) in the sorted halves of every pair that may be among the `num_picks` best.

    The pair of ranks (r, s) is no better than the (r + 1)(s + 1) - 1 other pairs of ranks up to r and up to s, so it is a candidate
    only if (r + 1)(s + 1) <= num_picks: 50 pairs instead of 256 for 16 picks (specs of arXiv 2407.04153, section 4.2).
    """
    depth = min(num_picks, num_keys)
    pairs = [(r, s) for r in range(depth) for s in range(min(depth, num_picks // (r + 1)))]
    first, second = zip(*pairs, strict=True)
    return list(first), list(second)


def choose_pairs(scores_THZJ: Tensor, *, top_k: int) -> PairChoice:
    """The K best of the J^2 sums of a first and a second sub-score, exactly; among equal ones the lowest id a J + b wins.

    Only a tie that rounding makes (sums of unequal parts that come out equal) may be decided otherwise than by id: a pair that
    is no candidate can be in it. top_k: at most J^2.
    """
    num_keys = scores_THZJ.shape[-1]
    fixed_THZJ = scores_THZJ.detach()
    best_THZI = _best(fixed_THZJ, count=min(top_k, num_keys))
    first_Q, second_Q = (torch.tensor(r, device=scores_THZJ.device) for r in candidates(top_k, num_keys))
    a_THQ, b_THQ = best_THZI[..., 0, first_Q], best_THZI[..., 1, second_Q]
    by_id_THQ = (a_THQ * num_keys + b_THQ).argsort(dim=-1)
    sums_THQ = fixed_THZJ[..., 0, :].gather(-1, a_THQ) + fixed_THZJ[..., 1, :].gather(-1, b_THQ)
    best_THK = sums_THQ.gather(-1, by_id_THQ).sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    picked_THK = by_id_THQ.gather(-1, best_THK)
    a_THK, b_THK = a_THQ.gather(-1, picked_THK), b_THQ.gather(-1, picked_THK)
    return PairChoice(scores_THZJ[..., 0, :].gather(-1, a_THK) + scores_THZJ[..., 1, :].gather(-1, b_THK), a_THK, b_THK)


def _best(scores: Tensor, *, count: int) -> Tensor:
    """Indices of the `count` largest in the last dimension, descending, the lowest index first among equal ones.

    torch.topk promises neither which of equal scores it takes nor their order. Both are made good here, the choice only where equal
    scores do not all fit: with that, 6 times faster than a stable sort of 1024 sub-keys (1 CPU thread, 16 picks).
    """
    values, ids = scores.topk(count, dim=-1)
    tied = (scores >= values[..., -1:]).sum(-1) > count
    if tied.any():
        ids[tied] = scores[tied].sort(dim=-1, descending=True, stable=True).indices[..., :count]
    ids = ids.sort(dim=-1).values
    return ids.gather(-1, scores.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices)


def gates_of(scores_THK: Tensor, *, kind: str) -> Tensor:
    """softmax over the picks of one head; sigmoid or relu of each score by itself."""
    if kind == "softmax":
        return scores_THK.softmax(-1)
    return scores_THK.sigmoid() if kind == "sigmoid" else scores_THK.relu()


class ProductKeys(DeclaringModule):
    """From hidden states to the scores of all sub-keys, in float32 in every mode: the `router` of a layer.

    query_h = norm(W_h x), or norm(x) for all heads alike without a projection; its two halves meet the two sets of sub-keys, which
    each head has for itself or all heads share. `norm`: "batch" over the rows of all ranks, per feature; "layer" over a head's
    query; "none". Sub-keys, like all routers, never decay. draw_keys: by default uniform in +-1 / sqrt(half the query's width).
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

    def forward(self, x_TD: Tensor) -> SubScores:
        updates: dict[str, Tensor] = {}
        with torch.autocast(x_TD.device.type, enabled=False):
            query_TX = x_TD.to(self.keys.dtype)
            if self.query is not None:
                query_TX = self.query(query_TX)
            if self.batch_norm is not None:
                query_TX, changes = self.batch_norm(query_TX)
                updates = {f"router.batch_norm.{name}": change for name, change in changes.items()}
            query_THX = query_TX.unflatten(1, (-1, self.key_dim))
            if self.layer_norm is not None:
                query_THX = self.layer_norm(query_THX)
            query_THZC = query_THX.unflatten(2, (2, -1)).expand(-1, self.num_heads, -1, -1)
            keys_HZJC = self.keys.expand(self.num_heads, -1, -1, -1)
            return SubScores(torch.einsum("thzc,hzjc->thzj", query_THZC, keys_HZJC), updates)
