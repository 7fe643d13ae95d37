"""Attention in chunks of queries, over all visible keys or over the k best of each query, with memory linear in the length.

Owns: `top_k_attend`, its gradient, the selection and the dropout of the kept probabilities. Does not own: projections, positions,
who sees whom (model/mask.py), the caches of decoding. Called by the mixers in place of a dense softmax attention.

Source: Gupta, Dar, Goodman, Ciprut, Berant, "Memory-efficient Transformers via Top-k Attention", arXiv 2106.06899. Unlike the authors'
code: ceil(S / chunk) chunks, no mask is kept for backward, and dropout is a function of coordinates, so that it is the same in
forward, backward and recompute whatever the chunks.

Shape letters: B rows, H heads, S queries, M keys, C head width, R queries of one chunk, P keys that they can reach, K kept keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.context import BatchContext, keep_at
from model.mask import KeyMask


@dataclass(frozen=True)
class AttentionDropout:
    """Dropout of attention probabilities in training, with its place in the network; 0 <= probability < 1."""

    context: BatchContext
    probability: float
    site: str = "attention"

    def apply(self, x_BHRK: Tensor, *, query_R: Tensor, key: Tensor) -> Tensor:
        """x, or 0 in its place, over 1 - probability; also what takes gradients back. Offsets in the row, int64; key like x or (K,)."""
        heads = torch.arange(x_BHRK.shape[1], device=x_BHRK.device)
        coordinates = (heads[None, :, None, None], query_R[:, None], key)
        keep = keep_at(self.context, *coordinates, probability=self.probability, site=self.site)
        return (x_BHRK * keep).div_(1 - self.probability)


class Kept(NamedTuple):
    """The chosen scores of each query and their keys, (..., K); the keys are int32."""

    scores: Tensor
    keys: Tensor


def top_k_attend(
    q_BHSC: Tensor,
    k_BHMC: Tensor,
    v_BHMC: Tensor,
    *,
    mask: KeyMask,
    top_k: int | None,
    chunk: int,
    scale: float,
    relative: tuple[Tensor, Tensor] | None = None,
    drop: AttentionDropout | None = None,
) -> Tensor:
    """softmax over the top_k best visible keys of each query, times v: (B, H, S, C), in v's dtype; v may have a C of its own.

    top_k: None or 0 keeps all keys (plain query chunking, exact); so does a number above the keys that a chunk sees. Equal scores:
    the lowest key wins. A query that sees fewer than top_k keys uses those; one that sees none gives zeros and gets no gradient.
    chunk: the most queries that are worked on at once; the peak holds a few buffers of B x H x chunk x M numbers. Backward keeps q, k, v
    and, with top_k, 8 bytes per kept key (probability in float32, index in int32).
    scale: the scores' factor inside the softmax, > 0, so it leaves the selection alone. A learned one: multiply q by it.
    relative: (q_position_BHSC, r_HMC) adds the Transformer-XL term q_position . r[M - 1 - d] to the score of the key d places before the
    query (arXiv 1901.02860, section 3.3, the terms b and d): row p of r holds distance M - 1 - p, the farthest first, 0 last.
    Products, selection and softmax run in float32 at least, also under autocast. k and v have as many heads as q: for grouped queries
    expand them before (`repeat_interleave`, or a view made by `expand`). No second derivative.
    """
    _check(q_BHSC, k_BHMC, v_BHMC, mask=mask, top_k=top_k, chunk=chunk, scale=scale, relative=relative)
    q_position_BHSC, r_HMC = relative or (None, None)
    setting = _Setting(mask=mask, top_k=top_k or mask.num_keys, chunk=chunk, scale=scale, drop=drop)
    return _TopKAttend.apply(q_BHSC, k_BHMC, v_BHMC, q_position_BHSC, r_HMC, setting)  # type: ignore[return-value]


def select_top_k(scores: Tensor, top_k: int) -> Kept:
    """The top_k largest of the last axis, which must be longer; of equal scores the first. The order inside the result is unspecified.

    torch.topk promises nothing about ties, so it is asked for one more: only where the last two agree did it have a choice, and only
    those rows are done again, by counting. Forward over 4,096 positions, top_k 64, 4 heads on one CPU core: 0.48 s, 0.65 s where every
    key comes 16 times, 1.95 s with a stable sort instead.
    """
    values, keys = scores.topk(top_k + 1, dim=-1)
    border = values[..., top_k]
    tied = (values[..., top_k - 1] == border) & (border > -torch.inf)  # -inf: a masked key, which has no weight
    values, keys = values[..., :top_k].contiguous(), keys[..., :top_k].int()
    if tied.any():
        tied_scores, border = scores[tied], border[tied][:, None]
        above, equal = ~(tied_scores <= border), tied_scores == border  # topk puts NaN above all, so does this
        room = top_k - above.sum(-1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
        tied_keys = chosen.nonzero()[:, -1].view(-1, top_k)
        keys[tied] = tied_keys.int()
        values[tied] = tied_scores.gather(-1, tied_keys)
    return Kept(values, keys)


@dataclass(frozen=True)
class _Setting:
    """What `top_k_attend` was asked, beside the tensors; top_k >= 1."""

    mask: KeyMask
    top_k: int
    chunk: int
    scale: float
    drop: AttentionDropout | None

    def chunks(self) -> Iterator["_Chunk"]:
        for first in range(0, self.mask.num_queries, self.chunk):
            last = min(first + self.chunk, self.mask.num_queries)
            reach = self.mask.num_keys - self.mask.num_queries + last
            yield _Chunk(self, first, last, reach, selects=self.top_k < reach)


class _Inputs(NamedTuple):
    """The operands in the dtype of the work."""

    q_BHSC: Tensor
    k_BHMC: Tensor
    v_BHMC: Tensor
    q_position_BHSC: Tensor | None
    r_HMC: Tensor | None


@dataclass(frozen=True)
class _Chunk:
    """Queries first..last-1 and the keys 0..reach-1: later keys are in the future of all of them."""

    setting: _Setting
    first: int
    last: int
    reach: int
    selects: bool

    def queries(self, x_BHSC: Tensor) -> Tensor:
        return x_BHSC[:, :, self.first : self.last]

    def keys(self, x_BHMC: Tensor) -> Tensor:
        return x_BHMC[:, :, : self.reach]

    def table(self, r_HMC: Tensor) -> Tensor:
        """(H, P, C): the rows of r for the distances that occur, the farthest (of the last query to key 0) first."""
        return r_HMC[:, self.setting.mask.num_queries - self.last :]

    def column(self, key: Tensor) -> Tensor:
        """Where in `table` the distance of each query to a key stands: int64, like key (..., R or 1, K). P and above: the future."""
        return torch.arange(self.last - self.first - 1, -1, -1, device=key.device)[:, None] + key

    def scores(self, x: _Inputs) -> Tensor:
        """(B, H, R, P) before the scale, -inf where masked."""
        scores = self.queries(x.q_BHSC) @ self.keys(x.k_BHMC).mT
        if x.q_position_BHSC is not None and x.r_HMC is not None:
            by_column = self.queries(x.q_position_BHSC) @ self.table(x.r_HMC).mT
            column_RP = self.column(torch.arange(self.reach, device=scores.device)).clamp(max=self.reach - 1)
            scores += by_column.gather(-1, column_RP.expand_as(scores))
        visible = self.setting.mask.rows(self.first, self.last)[..., : self.reach]
        return scores.masked_fill_(~visible, -torch.inf)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Softmax of the scaled scores, exactly 0 at masked keys even where all of a row is masked. Changes `scores`."""
        return scores.mul_(self.setting.scale).softmax(-1).masked_fill_(scores.isneginf(), 0.0)

    def dropped(self, x: Tensor, kept_keys: Tensor | None) -> Tensor:
        """x of (B, H, R, K or P), probabilities or their gradients, through the dropout. Offsets count from the row's first position."""
        drop, mask = self.setting.drop, self.setting.mask
        if drop is None:
            return x
        query_R = torch.arange(self.first, self.last, device=x.device)
        key = torch.arange(self.reach, device=x.device) if kept_keys is None else kept_keys
        return drop.apply(x, query_R=query_R, key=key - (mask.num_keys - mask.num_queries))


class _TopKAttend(torch.autograd.Function):
    """Saves q, k, v (references) and, of the chunks that select, the kept probabilities and keys.

    Probabilities, not only keys to recompute scores at: 4 bytes for each of B H S K save backward a fifth product over all keys beside
    its four (with `relative` two beside six), the mask and the softmax. A chunk without selection saves nothing and recomputes.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, q_position: Tensor | None, r: Tensor | None, setting: _Setting
    ):
        kept: list[Tensor] = []
        y_BHSC = v.new_empty(*q.shape[:3], v.shape[-1])
        with torch.autocast(q.device.type, enabled=False):
            x = _widen(q, k, v, q_position, r)
            for chunk in setting.chunks():
                weights = chunk.scores(x)
                if chunk.selects:
                    best = select_top_k(weights, setting.top_k)
                    probabilities, keys = chunk.probabilities(best.scores), best.keys.long()
                    weights.zero_().scatter_(-1, keys, chunk.dropped(probabilities, keys))
                    kept += [probabilities, best.keys]
                else:
                    weights = chunk.dropped(chunk.probabilities(weights), None)
                chunk.queries(y_BHSC).copy_(weights @ chunk.keys(x.v_BHMC))
        ctx.save_for_backward(q, k, v, q_position, r, *kept)
        ctx.setting = setting
        return y_BHSC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor):
        saved = ctx.saved_tensors  # read once: under recompute a second reading is an error
        inputs, kept = saved[:5], iter(saved[5:])
        with torch.autocast(inputs[0].device.type, enabled=False):
            x = _widen(*inputs)
            dy_BHSC = gradients[0].to(x.v_BHMC.dtype)
            dx = _Inputs(*(None if part is None else torch.zeros_like(part) for part in x))  # type: ignore[arg-type]
            for chunk in ctx.setting.chunks():
                probabilities, keys = (next(kept), next(kept).long()) if chunk.selects else (None, None)
                _add_gradients(dx, x, chunk.queries(dy_BHSC), chunk, probabilities=probabilities, keys=keys)
        return *dx, None  # autograd casts each to its operand's dtype


def _add_gradients(
    dx: _Inputs, x: _Inputs, dy_BHRC: Tensor, chunk: _Chunk, *, probabilities: Tensor | None, keys: Tensor | None
) -> None:
    """Adds one chunk's part to dx. probabilities and keys: (B, H, R, K) as kept in forward, None where all visible keys are used."""
    if probabilities is None:
        probabilities = chunk.probabilities(chunk.scores(x))
    buffer = dy_BHRC @ chunk.keys(x.v_BHMC).mT  # (B, H, R, P): first the gradient of the weights
    d_weights = chunk.dropped(buffer if keys is None else buffer.gather(-1, keys), keys)
    weights = chunk.dropped(probabilities, keys)
    mean = (d_weights * probabilities).sum(-1, keepdim=True)
    d_scores = (d_weights - mean).mul_(probabilities).mul_(chunk.setting.scale)

    spread = weights if keys is None else buffer.zero_().scatter_(-1, keys, weights)
    chunk.keys(dx.v_BHMC).add_(spread.mT @ dy_BHRC)
    spread = d_scores if keys is None else buffer.zero_().scatter_(-1, keys, d_scores)
    chunk.queries(dx.q_BHSC).copy_(spread @ chunk.keys(x.k_BHMC))
    chunk.keys(dx.k_BHMC).add_(spread.mT @ chunk.queries(x.q_BHSC))

    if x.q_position_BHSC is None or x.r_HMC is None or dx.q_position_BHSC is None or dx.r_HMC is None:
        return
    # Each key of a query has a column of its own, so no two gradients meet in one place; columns from P on are future keys, all zero.
    column = chunk.column(torch.arange(chunk.reach, device=buffer.device) if keys is None else keys).expand_as(d_scores)
    wide = chunk.reach + dy_BHRC.shape[2] - 1
    by_column = d_scores.new_zeros(*d_scores.shape[:3], wide).scatter_(-1, column, d_scores)[..., : chunk.reach]
    chunk.queries(dx.q_position_BHSC).copy_(by_column @ chunk.table(x.r_HMC))
    chunk.table(dx.r_HMC).add_((by_column.mT @ chunk.queries(x.q_position_BHSC)).sum(0))


def _widen(q: Tensor, k: Tensor, v: Tensor, q_position: Tensor | None, r: Tensor | None) -> _Inputs:
    """In float32, or float64 where q is: scores of bfloat16 have 8 bits, too few to choose by."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return _Inputs(*(None if x is None else x.to(dtype) for x in (q, k, v, q_position, r)))  # type: ignore[arg-type]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: KeyMask,
    top_k: int | None,
    chunk: int,
    scale: float,
    relative: tuple[Tensor, Tensor] | None,
) -> None:
    """One sentence about the first thing that does not fit."""
    rows, heads, length, width = q.shape
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 query, not {chunk}: 1024 is a good size on a GPU")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k must be a number of kept keys >= 1, or None or 0 for all keys, not {top_k}")
    if not scale > 0:
        raise ValueError(f"scale must be above 0, not {scale}: the selection is made before it, so fold a sign into q")
    if k.shape != (rows, heads, mask.num_keys, width) or v.shape[:3] != k.shape[:3] or length != mask.num_queries:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be (B, H, S, C), (B, H, M, C) and (B, H, M, C) with the "
            f"mask's S = {mask.num_queries} and M = {mask.num_keys}; expand k and v to the heads of q before"
        )
    if relative is not None and (relative[0].shape != q.shape or relative[1].shape != (heads, mask.num_keys, width)):
        raise ValueError(
            f"relative must be (q_position, r) of {tuple(q.shape)}, like q, and {(heads, mask.num_keys, width)}, one row per distance, "
            f"but they are {tuple(relative[0].shape)} and {tuple(relative[1].shape)}"
        )
