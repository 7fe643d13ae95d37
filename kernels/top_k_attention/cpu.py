"""top_k_attention with torch alone, in chunks of queries, with memory linear in the length; on any device, in fp32 and wider.

Owns: the chunks and their gradients. Does not own: the selection (selection.py), checks (the public function), which probabilities are
dropped (`Drop`).
Called by: kernels/top_k_attention.

Unlike the paper's code (arXiv 2106.06899): ceil(S / chunk) chunks, no mask is kept for backward, and dropout is a function of
coordinates, so that it is the same in forward, backward and recompute whatever the chunks. Only the scores are products of whole
matrices: what follows the selection touches the kept pairs alone, as sums of bags. For 64 of 4,096 keys such a sum takes 0.4 ms where
a product with the zeros between takes 8 (1,024 queries of width 64, one core).

Shape letters: B rows, H heads, G heads of keys and values, S queries, M keys, C and D widths of q and v, R queries of one chunk, Q the
queries of a chunk in all heads that share keys, P keys that they can reach, K kept keys, X any width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.top_k_attention.selection import select_top_k


class Drop(Protocol):
    """Dropout of probabilities by their coordinates: x or 0, scaled; also what takes gradients back.

    Offsets in the row, int64; key like x or (K,).
    """

    def apply(self, x_BHRK: Tensor, *, query_R: Tensor, key: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Setting:
    """What was asked, beside the tensors; top_k >= 1. first_BS: the lowest key that each query sees; None: 0."""

    num_queries: int
    num_keys: int
    first_BS: Tensor | None
    top_k: int
    chunk: int
    scale: float
    drop: Drop | None

    def chunks(self) -> Iterator["_Chunk"]:
        for first in range(0, self.num_queries, self.chunk):
            last = min(first + self.chunk, self.num_queries)
            reach = self.num_keys - self.num_queries + last
            yield _Chunk(self, first, last, reach, selects=self.top_k < reach)


def attend_in_chunks(
    q_BHSC: Tensor, k_BGMC: Tensor, v_BGMD: Tensor, relative: tuple[Tensor, Tensor] | None, setting: Setting
) -> Tensor:
    """See `top_k_attention`: (B, H, S, D) in the dtype of v, differentiable in q, k, v and `relative`, once."""
    return _Attend.apply(q_BHSC, k_BGMC, v_BGMD, *(relative or (None, None)), setting)  # type: ignore[return-value]


class _Inputs(NamedTuple):
    """The operands in the dtype of the work, contiguous."""

    q_BHSC: Tensor
    k_BGMC: Tensor
    v_BGMD: Tensor
    q_position_BHSC: Tensor | None
    r_HMC: Tensor | None


@dataclass(frozen=True)
class _Chunk:
    """Queries first..last-1 and the keys 0..reach-1: later keys are in the future of all of them."""

    setting: Setting
    first: int
    last: int
    reach: int
    selects: bool

    def queries(self, x_BHSX: Tensor) -> Tensor:
        return x_BHSX[:, :, self.first : self.last]

    def keys(self, x_BGMX: Tensor) -> Tensor:
        return x_BGMX[:, :, : self.reach]

    def table(self, r_HMC: Tensor) -> Tensor:
        """(H, P, C): the rows of r for the distances that occur, the farthest (of the last query to key 0) first."""
        return r_HMC[:, self.setting.num_queries - self.last :]

    def column(self, key: Tensor) -> Tensor:
        """Where in `table` the distance of each query to a key stands: int64, like key (..., R or 1, K). P and above: the future."""
        return torch.arange(self.last - self.first - 1, -1, -1, device=key.device)[:, None] + key

    def scores(self, x: _Inputs) -> Tensor:
        """(B, H, R, P) before the scale, -inf where masked."""
        scores = _times(self.queries(x.q_BHSC), self.keys(x.k_BGMC).mT)
        if x.q_position_BHSC is not None and x.r_HMC is not None:
            by_column = self.queries(x.q_position_BHSC) @ self.table(x.r_HMC).mT
            column_RP = self.column(torch.arange(self.reach, device=scores.device)).clamp(max=self.reach - 1)
            scores += by_column.gather(-1, column_RP.expand_as(scores))
        size = self.last - self.first  # only the last R keys are in anyone's future
        future = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu_(1)
        scores[..., self.reach - size :].masked_fill_(future, -torch.inf)
        if self.setting.first_BS is not None:
            first_B1R1 = self.setting.first_BS[:, None, self.first : self.last, None]
            scores.masked_fill_(torch.arange(self.reach, device=scores.device) < first_B1R1, -torch.inf)
        return scores

    def probabilities(self, scores: Tensor) -> Tensor:
        """Softmax of the scaled scores, exactly 0 at masked keys even where all of a row is masked. Changes `scores`."""
        return scores.mul_(self.setting.scale).softmax(-1).masked_fill_(scores.isneginf(), 0.0)

    def score_gradient(self, d_weights: Tensor, probabilities: Tensor) -> Tensor:
        """Back through softmax and scale."""
        mean = (d_weights * probabilities).sum(-1, keepdim=True)
        return (d_weights - mean).mul_(probabilities).mul_(self.setting.scale)

    def dropped(self, x: Tensor, kept_keys: Tensor | None) -> Tensor:
        """x of (B, H, R, K or P), probabilities or their gradients, through the dropout. Offsets count from the row's first position."""
        drop = self.setting.drop
        if drop is None:
            return x
        query_R = torch.arange(self.first, self.last, device=x.device)
        key = torch.arange(self.reach, device=x.device) if kept_keys is None else kept_keys
        return drop.apply(x, query_R=query_R, key=key - (self.setting.num_keys - self.setting.num_queries))


class _Attend(torch.autograd.Function):
    """Saves q, k, v (references) and, of the chunks that select, the kept probabilities and keys: 8 bytes for each of B H S K.

    A chunk without selection saves nothing and computes its probabilities again.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, q_position: Tensor | None, r: Tensor | None, setting: Setting
    ):
        kept: list[Tensor] = []
        y_BHSD = v.new_empty(*q.shape[:3], v.shape[-1])
        with torch.autocast(q.device.type, enabled=False):
            x = _widen(q, k, v, q_position, r)
            for chunk in setting.chunks():
                weights = chunk.scores(x)
                if chunk.selects:
                    best = select_top_k(weights, setting.top_k)
                    del weights
                    probabilities = chunk.probabilities(best.scores)
                    y = _weighted_sums(best.keys, chunk.dropped(probabilities, best.keys), x.v_BGMD)
                    kept += [probabilities, best.keys]
                else:
                    y = _times(chunk.dropped(chunk.probabilities(weights), None), chunk.keys(x.v_BGMD))
                chunk.queries(y_BHSD).copy_(y)
        ctx.save_for_backward(q, k, v, q_position, r, *kept)
        ctx.setting = setting
        return y_BHSD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor):
        saved = ctx.saved_tensors  # read once: under recompute a second reading is an error
        inputs, kept = saved[:5], iter(saved[5:])
        with torch.autocast(inputs[0].device.type, enabled=False):
            x = _widen(*inputs)
            dy_BHSD = gradients[0].to(x.v_BGMD.dtype)
            dx = _Inputs(*(None if part is None else torch.zeros_like(part) for part in x))  # type: ignore[arg-type]
            for chunk in ctx.setting.chunks():
                dy_BHRD = chunk.queries(dy_BHSD)
                if chunk.selects:
                    _add_selected(dx, x, dy_BHRD, chunk, probabilities=next(kept), keys=next(kept))
                else:
                    _add_whole(dx, x, dy_BHRD, chunk)
        return *dx, None  # autograd casts each to its operand's dtype


def _add_whole(dx: _Inputs, x: _Inputs, dy_BHRD: Tensor, chunk: _Chunk) -> None:
    """Adds to dx the part of a chunk whose queries use all visible keys."""
    probabilities = chunk.probabilities(chunk.scores(x))
    weights = chunk.dropped(probabilities, None)
    G = x.k_BGMC.shape[1]
    chunk.keys(dx.v_BGMD).add_(_by_keys(weights, G).mT @ _by_keys(dy_BHRD, G))
    d_scores = chunk.score_gradient(chunk.dropped(_times(dy_BHRD, chunk.keys(x.v_BGMD).mT), None), probabilities)
    chunk.queries(dx.q_BHSC).copy_(_times(d_scores, chunk.keys(x.k_BGMC)))
    chunk.keys(dx.k_BGMC).add_(_by_keys(d_scores, G).mT @ _by_keys(chunk.queries(x.q_BHSC), G))
    if x.q_position_BHSC is None or x.r_HMC is None or dx.q_position_BHSC is None or dx.r_HMC is None:
        return
    # Each key of a query has a column of its own, so no two gradients meet in one place; columns from P on are future keys, all zero.
    column = chunk.column(torch.arange(chunk.reach, device=d_scores.device)).expand_as(d_scores)
    wide = chunk.reach + dy_BHRD.shape[2] - 1
    by_column = d_scores.new_zeros(*d_scores.shape[:3], wide).scatter_(-1, column, d_scores)[..., : chunk.reach]
    chunk.queries(dx.q_position_BHSC).copy_(by_column @ chunk.table(x.r_HMC))
    chunk.table(dx.r_HMC).add_((by_column.mT @ chunk.queries(x.q_position_BHSC)).sum(0))


def _add_selected(
    dx: _Inputs, x: _Inputs, dy_BHRD: Tensor, chunk: _Chunk, *, probabilities: Tensor, keys: Tensor
) -> None:
    """Adds to dx the part of a chunk whose queries use the keys (B, H, R, K) with these probabilities."""
    weights = chunk.dropped(probabilities, keys)
    products = _products(keys, dy_BHRD, x.v_BGMD)
    d_scores = chunk.score_gradient(chunk.dropped(products, keys), probabilities)
    chunk.queries(dx.q_BHSC).copy_(_weighted_sums(keys, d_scores, x.k_BGMC))
    B, G = dx.k_BGMC.shape[:2]
    of_keys = _Readers(_by_keys(keys, G), tables=B * G, length=chunk.reach)
    chunk.keys(dx.v_BGMD).add_(of_keys.weighted_sums(weights, dy_BHRD).view_as(chunk.keys(dx.v_BGMD)))
    chunk.keys(dx.k_BGMC).add_(of_keys.weighted_sums(d_scores, chunk.queries(x.q_BHSC)).view_as(chunk.keys(dx.k_BGMC)))
    if x.q_position_BHSC is None or x.r_HMC is None or dx.q_position_BHSC is None or dx.r_HMC is None:
        return
    column = chunk.column(keys).clamp(max=chunk.reach - 1)  # only masked keys, whose gradient is 0, are beyond
    table = chunk.table(x.r_HMC)[None].expand(len(keys), -1, -1, -1).contiguous()
    chunk.queries(dx.q_position_BHSC).copy_(_weighted_sums(column, d_scores, table))
    of_rows = _Readers(column, tables=len(x.r_HMC), length=chunk.reach)
    d_table = of_rows.weighted_sums(d_scores, chunk.queries(x.q_position_BHSC))
    chunk.table(dx.r_HMC).add_(d_table.view_as(chunk.table(dx.r_HMC)))


def _by_keys(x_BHRX: Tensor, num_heads: int) -> Tensor:
    """(B, G, Q, X): the queries of the heads that share keys below each other, so that a product with the keys needs no copy of them."""
    B, H, R, X = x_BHRX.shape
    return x_BHRX if num_heads == H else x_BHRX.reshape(B, num_heads, H // num_heads * R, X)


def _times(x_BHRY: Tensor, table_BGYX: Tensor) -> Tensor:
    """(B, H, R, X): each head's matrix times the one that it shares."""
    product_BGQX = _by_keys(x_BHRY, table_BGYX.shape[1]) @ table_BGYX
    return product_BGQX.view(*x_BHRY.shape[:3], table_BGYX.shape[3])


def _rows(index_BHRK: Tensor, *, tables: int, length: int) -> Tensor:
    """(B*H*R, K): the same as rows of `tables` tables of `length` rows below each other: one for each of (B, H), or of H."""
    B, H, _, K = index_BHRK.shape
    table = torch.arange(B * H, device=index_BHRK.device) % tables
    return (index_BHRK + (table * length).view(B, H, 1, 1)).view(-1, K)


def _weighted_sums(index_BHRK: Tensor, weights_BHRK: Tensor, table_BGMX: Tensor) -> Tensor:
    """(B, H, R, X): the sum over k of weight * table[index], from the table that the head shares."""
    B, G, M, X = table_BGMX.shape
    rows_NK = _rows(_by_keys(index_BHRK, G), tables=B * G, length=M)
    sums = F.embedding_bag(
        rows_NK, table_BGMX.view(-1, X), per_sample_weights=weights_BHRK.view_as(rows_NK), mode="sum"
    )
    return sums.view(*index_BHRK.shape[:3], X)


def _products(index_BHRK: Tensor, x_BHRX: Tensor, table_BGMX: Tensor) -> Tensor:
    """(B, H, R, K): x . table[index], which is how `_weighted_sums` depends on its weights. A gather first would write K X numbers."""
    with torch.enable_grad():
        weights = torch.zeros(index_BHRK.shape, dtype=x_BHRX.dtype, device=x_BHRX.device, requires_grad=True)
        sums = _weighted_sums(index_BHRK, weights, table_BGMX)
    return torch.autograd.grad(sums, weights, x_BHRX.contiguous())[0]


class _Readers:
    """By row of each table the pairs (query, place) that read it, in the order of the queries."""

    def __init__(self, index_BHRK: Tensor, *, tables: int, length: int) -> None:
        rows_N, self._order_N = _rows(index_BHRK, tables=tables, length=length).view(-1).sort(stable=True)
        self._queries_N = self._order_N // index_BHRK.shape[-1]
        self._starts = torch.searchsorted(rows_N, torch.arange(tables * length, device=rows_N.device))

    def weighted_sums(self, weights_BHRK: Tensor, x_BHRX: Tensor) -> Tensor:
        """(tables * length, X): for each row of a table the sum over its readers of weight * x."""
        x_NX, weights_N = x_BHRX.reshape(-1, x_BHRX.shape[-1]), weights_BHRK.reshape(-1)[self._order_N]
        return F.embedding_bag(self._queries_N, x_NX, self._starts, per_sample_weights=weights_N, mode="sum")


def _widen(q: Tensor, k: Tensor, v: Tensor, q_position: Tensor | None, r: Tensor | None) -> _Inputs:
    """In float32, or float64 where q is: scores of bfloat16 have 8 bits, too few to choose by."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return _Inputs(*(None if x is None else x.to(dtype).contiguous() for x in (q, k, v, q_position, r)))  # type: ignore[arg-type]
