"""product_key_topk by torch alone, by chunks of tokens whose sub-scores stay in the cache: the backend "torch", of any device.

Owns: that path, and the selection from scores that are there. Does not own: checks and autocast (the public function).
Called by: kernels/product_key_topk and its tests.

Letters: T tokens, H heads, Z = 2 halves, J sub-keys of a half, C width of half a query, K picks, I the best of a half, Q candidates,
N rows of scores; P is H or 1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.sum_copies import RowCopies

CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # of sub-scores; 2**20: docs/log.md


def choose(queries_TPZC: Tensor, keys_HZJC: Tensor, *, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """scores_THK, first_THK, second_THK of contiguous queries and keys: see the public function."""
    return _Choose.apply(queries_TPZC, keys_HZJC, top_k)


def staircase(num_picks: int, num_keys: int) -> tuple[list[int], list[int]]:
    """Ranks (from 0) in the sorted halves of every pair that may be among the `num_picks` best.

    The pair of ranks (r, s) is no better than the (r + 1)(s + 1) - 1 other pairs of ranks up to r and up to s, so it is a candidate
    only if (r + 1)(s + 1) <= num_picks: 50 pairs instead of 256 for 16 picks.
    """
    depth = min(num_picks, num_keys)
    pairs = [(r, s) for r in range(depth) for s in range(min(depth, num_picks // (r + 1)))]
    first, second = zip(*pairs, strict=True)
    return list(first), list(second)


def best(scores: Tensor, ids: Tensor | None = None, *, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of the last dimension, descending, and their ids; among equal ones the lowest id comes first.

    ids: of the scores, in any order; by default their places. torch.topk promises neither which of equal scores it takes nor their
    order, so rows in which a chosen score is there twice are done again by a stable sort.
    """
    values, places = scores.topk(count, dim=-1)
    no_worse = torch.ge(
        scores, values[..., -1:], out=torch.empty_like(scores)
    )  # sums of floats are vectorised, those of bools are not
    tied = (no_worse.sum(-1) > count) | (values[..., 1:] == values[..., :-1]).any(-1)
    found = places if ids is None else ids.gather(-1, places)
    if tied.any():
        rows, of_rows = scores[tied], None if ids is None else ids[tied]
        if of_rows is not None:
            by_id = of_rows.argsort(-1)
            rows, of_rows = rows.gather(-1, by_id), of_rows.gather(-1, by_id)
        order = rows.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        values[tied] = rows.gather(-1, order)
        found[tied] = order if of_rows is None else of_rows.gather(-1, order)
    return values, found


def _sub_scores(queries_tPZC: Tensor, keys_HZJC: Tensor) -> Tensor:
    """(Z, t, H, J). Each case is one product per half, or per half and head, of matrices as they lie."""
    (num_tokens, query_heads, _, width), (key_heads, _, num_keys, _) = queries_tPZC.shape, keys_HZJC.shape
    if key_heads == 1:
        rows_ZNC = queries_tPZC.permute(2, 0, 1, 3).reshape(2, num_tokens * query_heads, width)
        return (rows_ZNC @ keys_HZJC[0].mT).view(2, num_tokens, query_heads, num_keys)
    if query_heads == 1:
        keys_ZGC = keys_HZJC.transpose(0, 1).reshape(2, key_heads * num_keys, width)
        return (queries_tPZC[:, 0].transpose(0, 1) @ keys_ZGC.mT).view(2, num_tokens, key_heads, num_keys)
    return (queries_tPZC.permute(1, 2, 0, 3) @ keys_HZJC.mT).permute(1, 2, 0, 3)


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries_TPZC: Tensor, keys_HZJC: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens, num_heads = len(queries_TPZC), max(queries_TPZC.shape[1], len(keys_HZJC))
        num_keys = keys_HZJC.shape[2]
        scores_THK = queries_TPZC.new_empty(num_tokens, num_heads, top_k)
        ids_THK = torch.empty_like(scores_THK, dtype=torch.int64)
        first_Q, second_Q = (torch.tensor(ranks, device=ids_THK.device) for ranks in staircase(top_k, num_keys))
        step = max(1, CHUNK_ELEMENTS.get(queries_TPZC.device.type, 2**26) // (2 * num_heads * num_keys))
        for start in range(0, num_tokens, step):
            part = slice(start, start + step)
            values_ZtHI, places_ZtHI = best(_sub_scores(queries_TPZC[part], keys_HZJC), count=min(top_k, num_keys))
            sums_tHQ = values_ZtHI[0].index_select(2, first_Q) + values_ZtHI[1].index_select(2, second_Q)
            ids_tHQ = places_ZtHI[0].index_select(2, first_Q) * num_keys + places_ZtHI[1].index_select(2, second_Q)
            scores_THK[part], ids_THK[part] = best(sums_tHQ, ids_tHQ, count=top_k)
        first_THK = torch.div(ids_THK, num_keys, rounding_mode="floor")
        second_THK = ids_THK - first_THK * num_keys
        ctx.save_for_backward(queries_TPZC, keys_HZJC, first_THK, second_THK)
        ctx.mark_non_differentiable(first_THK, second_THK)
        ctx.set_materialize_grads(False)
        return scores_THK, first_THK, second_THK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_THK: Tensor, *_: None) -> tuple[Tensor | None, Tensor | None, None]:
        queries_TPZC, keys_HZJC, first_THK, second_THK = ctx.saved_tensors
        (num_tokens, num_heads, top_k), (k_heads, _, num_keys, width) = first_THK.shape, keys_HZJC.shape
        device = first_THK.device
        set_HZ = torch.arange(2 * num_heads, device=device).view(num_heads, 2) % (2 * k_heads)
        rows_THZK = torch.stack([first_THK, second_THK], dim=2) + set_HZ[:, :, None] * num_keys
        weights_THZK = gradient_THK[:, :, None].expand(-1, -1, 2, -1)
        of_queries_TPZC = of_keys_HZJC = None
        if ctx.needs_input_grad[0]:
            starts_N = torch.arange(0, rows_THZK.numel(), top_k, device=device)
            sums_NC = _sums(keys_HZJC.view(-1, width), rows_THZK.flatten(), weights_THZK.flatten(), starts_N)
            of_queries_TPZC = sums_NC.view(num_tokens, num_heads, 2, width)
            if queries_TPZC.shape[1] < num_heads:
                of_queries_TPZC = of_queries_TPZC.sum(1, keepdim=True)
        if ctx.needs_input_grad[1]:
            copies = RowCopies.of(rows_THZK.flatten(), num_rows=k_heads * 2 * num_keys)
            order_C = copies.order_C.long()
            starts_N = F.pad(copies.ends_P[:-1], (1, 0))
            pair_C = order_C // top_k  # of (token, head, half)
            if queries_TPZC.shape[1] < num_heads:
                pair_C = pair_C // (2 * num_heads) * 2 + pair_C % 2
            sums_NC = _sums(queries_TPZC.view(-1, width), pair_C, weights_THZK.flatten()[order_C], starts_N)
            of_keys_HZJC = sums_NC.view(keys_HZJC.shape)
        return of_queries_TPZC, of_keys_HZJC, None


def _sums(rows_RC: Tensor, row_M: Tensor, weights_M: Tensor, starts_N: Tensor) -> Tensor:
    """(N, C): for each n the sum of weight * row over the copies from starts[n] on, in their order; zero of none."""
    return F.embedding_bag(row_M, rows_RC, starts_N.to(row_M.dtype), mode="sum", per_sample_weights=weights_M)
