"""product_key_topk on a GPU: the Triton kernels and the functions that launch them.

Owns: the kernels, their tiles, the launches of the forward and of the backward pass. Does not own: autograd (op.py), checks (the public
function), the bytes (traffic.py).
Called by: kernels/product_key_topk/op.py and forms.py.

Forward: a program has a block of tokens of one head. It streams the sub-keys of a half through a product, a block at a time, and keeps
the best K of each token in registers; then the sums of both halves' best stream through the same selection. No sub-score is written: at
8 heads and 1,024 sub-keys they would be 64 KiB per token. Backward: `queries_kernel` adds the chosen sub-keys of each (token, head);
`keys_kernel` adds, for each sub-key, the queries that chose it, in the order of a stable sort. Every result has one owner. A sub-key
that is chosen very often is not shared out: of PEER's published size and 8,192 tokens a program has 1,024 copies in the mean, 16 steps of
64, but where all tokens are equal one may have all 131,072 of a head, 2,048 steps one after the other, and of all heads where they share a
query. The passes of kernels/tables, which split such runs, are made for few copies of wide rows: 128 places one by one, which here
would be eight times the steps of every other sub-key.

Selection is done on 64-bit numbers that no two candidates share: the score's bits, so turned that whole numbers compare as scores do, above
2**31 - 1 - id. The largest of them is the best score with the lowest id. A block is merged into the best so far by as many exchanges
of a largest against a least as its tokens need: K for the first block, few once the best are good. Of 1,024 random scores in blocks of
128, K 16, a token needs 55 in the mean and a program of 16 tokens 84, of 128 that could be. Slots that hold nothing lie below every
score, each by another number.

Letters, here only: T tokens, H heads, K picks, J sub-keys of a half, C width of half a query. Q_HEADS and K_HEADS: heads that queries
and keys have, H or 1. Tensors are contiguous.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false
# A launch passes numbers where a kernel declares tl.constexpr, and options of the compiler that it does not declare.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.grouped_matmul.tiles import precision
from kernels.sum_copies import RowCopies
from kernels.tuning import fastest, rounded

LEAST = tl.constexpr(-(2**63))
LOW = tl.constexpr(2**31 - 1)  # the bits of an id


@dataclass(frozen=True)
class Tiles:
    """Tokens by sub-keys of one product, `depth` of a query's width at a time."""

    tokens: int
    keys: int
    depth: int
    num_warps: int


TILES = [Tiles(16, 128, 16, 4), Tiles(32, 64, 16, 4), Tiles(32, 64, 32, 4)]


@triton.jit
def _pack(scores, ids):
    """Numbers that compare as (score, lower id first). -0.0, which a product may underflow to, is 0.0; NaN without sign is largest."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (ids.to(tl.int64) ^ LOW)


@triton.jit
def _score(packed):
    ordered = (packed >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _id(packed):
    return ((packed ^ LOW) & LOW).to(tl.int32)


@triton.jit
def _nothing(BLOCK_T: tl.constexpr, K_POWER: tl.constexpr):
    """Slots without a candidate, each another number, so that one of them at a time is replaced."""
    return tl.zeros((BLOCK_T, K_POWER), tl.int64) + LEAST + tl.arange(0, K_POWER)[None, :]


@triton.jit
def _merge(best, block, K_POWER: tl.constexpr):
    """The best K_POWER of both, in no order."""
    newcomers = tl.sum((block > tl.min(best, 1)[:, None]).to(tl.int32), 1)
    for _ in range(tl.minimum(tl.max(newcomers, 0), K_POWER)):
        largest = tl.max(block, 1)[:, None]
        least = tl.min(best, 1)[:, None]
        best = tl.where((best == least) & (largest > least), largest, best)
        block = tl.where(block == largest, LEAST, block)
    return best


@triton.jit
def _descending(best, K_POWER: tl.constexpr):
    slot = tl.arange(0, K_POWER)[None, :]
    found = best
    for place in range(K_POWER):
        largest = tl.max(best, 1)[:, None]
        found = tl.where(slot == place, largest, found)
        best = tl.where(best == largest, LEAST, best)
    return found


@triton.jit
def _best_of_half(
    queries, keys, t, inside, stride,
    J: tl.constexpr, C: tl.constexpr, K_POWER: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The best sub-keys of each token, packed, in no order. queries, keys: where this half of them begins."""
    c = tl.arange(0, BLOCK_C)
    best = _nothing(BLOCK_T, K_POWER)
    for first_j in range(0, J, BLOCK_J):
        j = first_j + tl.arange(0, BLOCK_J)
        scores = tl.zeros((BLOCK_T, BLOCK_J), tl.float32)
        for first_c in range(0, C, BLOCK_C):
            more = first_c + c < C
            at_q = t[:, None] * stride + (first_c + c)[None, :]
            q = tl.load(queries + at_q, mask=inside[:, None] & more[None, :], other=0.0)
            k = tl.load(
                keys + (j[None, :] * C + (first_c + c)[:, None]), mask=more[:, None] & (j < J)[None, :], other=0.0
            )
            scores = tl.dot(q, k, scores, input_precision=PRECISION)
        packed = tl.where((j < J)[None, :], _pack(scores, j[None, :]), LEAST)
        best = _merge(best, packed, K_POWER)
    return best


@triton.jit(do_not_specialize=["T"])
def choose_kernel(
    queries, keys, scores, firsts, seconds, T,
    H: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, K: tl.constexpr, J: tl.constexpr, C: tl.constexpr,
    K_POWER: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores (float32), firsts and seconds (int64) of (T, H, K), K descending by score."""
    head = tl.program_id(0) % H
    base = (tl.program_id(0) // H).to(tl.int64) * BLOCK_T
    t = tl.arange(0, BLOCK_T)
    inside = t < T - base
    slot = tl.arange(0, K_POWER)
    queries += (base * Q_HEADS + head % Q_HEADS) * (2 * C)
    keys += (head % K_HEADS).to(tl.int64) * (2 * J * C)
    stride: tl.constexpr = Q_HEADS * 2 * C
    first = _best_of_half(queries, keys, t, inside, stride, J, C, K_POWER, BLOCK_T, BLOCK_J, BLOCK_C, PRECISION)
    second = _best_of_half(
        queries + C, keys + J * C, t, inside, stride, J, C, K_POWER, BLOCK_T, BLOCK_J, BLOCK_C, PRECISION
    )
    second = _descending(second, K_POWER)
    score_of_second, b = _score(second), _id(second)
    depth: tl.constexpr = min(K, J)
    best = _nothing(BLOCK_T, K_POWER)
    for rank in range(depth):
        largest = tl.max(first, 1)[:, None]
        first = tl.where(first == largest, LEAST, first)
        # (rank + 1) (slot + 1) - 1 other pairs are no worse, so only so many slots can be among the K best
        possible = (slot < depth) & ((rank + 1) * (slot + 1) <= K)
        packed = _pack(_score(largest) + score_of_second, _id(largest) * J + b)
        best = _merge(best, tl.where(possible[None, :], packed, LEAST), K_POWER)
    best = _descending(best, K_POWER)
    place = (base * H + head) * K + (t[:, None] * (H * K) + slot[None, :])
    stored = inside[:, None] & (slot < K)[None, :]
    ids = _id(best)
    tl.store(scores + place, _score(best), mask=stored)
    tl.store(firsts + place, (ids // J).to(tl.int64), mask=stored)
    tl.store(seconds + place, (ids % J).to(tl.int64), mask=stored)


@triton.jit(do_not_specialize=["N"])
def queries_kernel(
    gradients, keys, firsts, seconds, of_queries, N,
    K_HEADS: tl.constexpr, K: tl.constexpr, J: tl.constexpr, C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """of_queries[n, z] = sum_k gradient[n, k] * key[z, id[n, k]] for N = T H (token, head) pairs."""
    column_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = (tl.program_id(0) % column_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    z = tl.program_id(0) // column_blocks % 2
    n = (tl.program_id(0) // (column_blocks * 2)).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    head = n % K_HEADS
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for k in range(K):
        ids = tl.load(firsts + n * K + k, mask=inside & (z == 0), other=0)
        ids += tl.load(seconds + n * K + k, mask=inside & (z == 1), other=0)
        row = (head * 2 + z) * J + ids
        key = tl.load(keys + row[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        total += tl.load(gradients + n * K + k, mask=inside, other=0.0)[:, None] * key
    place = (n * 2 + z)[:, None] * C + c[None, :]
    tl.store(of_queries + place, total, mask=inside[:, None] & (c < C)[None, :])


@triton.jit
def keys_kernel(
    gradients, queries, order, ends, of_keys,
    H: tl.constexpr, Q_HEADS: tl.constexpr, K: tl.constexpr, J: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """of_keys[row] = sum over the copies (t, h, k, z) of that sub-key of gradient[t, h, k] * query[t, h, z]."""
    column_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = (tl.program_id(0) % column_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(0) // column_blocks
    z = row // J % 2
    start = tl.load(ends + row - 1, mask=row > 0, other=0)
    end = tl.load(ends + row)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(start, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        copy = tl.load(order + m, mask=m < end, other=0).to(tl.int64)
        gradient = tl.load(gradients + copy // 2, mask=m < end, other=0.0)
        pair = copy // (2 * K)
        at = (pair // H * Q_HEADS + pair % Q_HEADS) * 2 + z
        query = tl.load(queries + at[:, None] * C + c[None, :], mask=(m < end)[:, None] & (c < C)[None, :], other=0.0)
        total += tl.sum(gradient[:, None] * query, 0)
    tl.store(of_keys + row.to(tl.int64) * C + c, total, mask=c < C)


def launch_choose(
    queries_TPZC: Tensor, keys_HZJC: Tensor, *, top_k: int, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """scores_THK float32, first_THK and second_THK int64."""
    (T, q_heads, _, C), (k_heads, _, J, _) = queries_TPZC.shape, keys_HZJC.shape
    H = max(q_heads, k_heads)
    scores_THK = queries_TPZC.new_empty(T, H, top_k)
    first_THK, second_THK = (torch.empty_like(scores_THK, dtype=torch.int64) for _ in range(2))

    def launch(tiles: Tiles) -> None:
        choose_kernel[(triton.cdiv(T, tiles.tokens) * H,)](
            queries_TPZC, keys_HZJC, scores_THK, first_THK, second_THK, T, H=H, Q_HEADS=q_heads, K_HEADS=k_heads, K=top_k,
            J=J, C=C, K_POWER=triton.next_power_of_2(top_k), BLOCK_T=tiles.tokens, BLOCK_J=tiles.keys, BLOCK_C=tiles.depth,
            PRECISION=precision(), num_warps=tiles.num_warps,
        )  # fmt: skip

    if T:
        key = ("product_key_topk", rounded(T), tuple(keys_HZJC.shape), q_heads, top_k)
        launch(tiles or fastest(TILES, launch, key=key, device=queries_TPZC.device))
    return scores_THK, first_THK, second_THK


def launch_of_queries(gradient_THK: Tensor, keys_HZJC: Tensor, first_THK: Tensor, second_THK: Tensor) -> Tensor:
    """(T, H, Z, C): the gradient of every head's query."""
    (T, H, K), (k_heads, _, J, C) = gradient_THK.shape, keys_HZJC.shape
    of_queries_THZC = keys_HZJC.new_empty(T, H, 2, C)
    block_n, block_c = 32, 64
    if T:
        queries_kernel[(triton.cdiv(T * H, block_n) * 2 * triton.cdiv(C, block_c),)](
            gradient_THK, keys_HZJC, first_THK, second_THK, of_queries_THZC, T * H, K_HEADS=k_heads, K=K, J=J, C=C,
            BLOCK_N=block_n, BLOCK_C=block_c,
        )  # fmt: skip
    return of_queries_THZC


def launch_of_keys(gradient_THK: Tensor, queries_TPZC: Tensor, copies: RowCopies, *, shape: tuple[int, ...]) -> Tensor:
    """The gradient of the sub-keys, in their shape (H or 1, Z, J, C). copies: of (t, h, k, z), by sub-key."""
    (_, H, K), (k_heads, _, J, C) = gradient_THK.shape, shape
    of_keys_HZJC = queries_TPZC.new_empty(shape)
    block_m, block_c = 64, 64
    keys_kernel[(k_heads * 2 * J * triton.cdiv(C, block_c),)](
        gradient_THK, queries_TPZC, copies.order_C, copies.ends_P, of_keys_HZJC, H=H, Q_HEADS=queries_TPZC.shape[1], K=K,
        J=J, C=C, BLOCK_M=block_m, BLOCK_C=block_c,
    )  # fmt: skip
    return of_keys_HZJC
