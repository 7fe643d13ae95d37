"""Top-k attention on a GPU: the Triton kernels and the functions that launch them.

Owns: the kernels of the attention, the tiles of all, the launches of the forward and of the backward pass. Does not own: the search
(search.py), autograd (op.py), checks (the public function), the bytes (traffic.py).
Called by: kernels/top_k_attention/op.py and forms.py.

`threshold_kernel` finds for each query the score of its top_k-th key; the others are flash attention (arXiv 2205.14135, 2307.08691)
over the scores that reach it. Nothing of size S x M is written: what is kept of the selection are two numbers per query, `lowest`, the
lowest score that is kept, and `last`, the highest key that is kept among those with just this score.

All kernels make the scores of a tile by the same product of the same tile (M queries by N keys, all channels at once), and rely on a score
being the same number, bit for bit, wherever it is compared. In the interpreter it is. On an H100 the compiler may cut the tile into other
instructions in each kernel (m64n32 and m64n64 were seen): each adds a number's products 16 channels at a time in the same order, so
the bits should be the same, but no manual says so; tests/gpu compares the keys that each pass keeps. If a score differed by a bit, only
keys within that bit of `lowest` could be taken otherwise: a pass would leave one out, or take one more, with its true score; none is
met twice. In the forward pass that is another choice between two almost equal keys. In the backward pass, which has the sum of the
forward pass, the gradient would lack the weight of that key, the query's least. Rounding scores before they are compared would
move such borders and not remove them, and keeping the choice itself costs a bit for each pair, or 4 bytes for each kept key.

Letters, here only: M queries and N keys of a tile; C width of q and k, D of v. Rows are (batch, head): row r of the queries reads row
r // SHARING of keys and values. Tensors are contiguous. `low` and `high`: the lowest and the highest key that a query sees.
"""

# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# It reads a kernel as a Python function of tl.constexpr objects, whose launch takes no num_warps.

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.availability import interpreted
from kernels.top_k_attention.search import threshold_kernel
from kernels.top_k_attention.tiles import (
    RUNTIME,
    block_of,
    dot,
    key_range,
    keys_seen,
    load_rows,
    score_tile,
    store_rows,
)
from kernels.tuning import fastest, rounded

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tiles:
    """m queries by n keys. held: scores of a place in the tile that the search holds at once."""

    m: int
    n: int
    num_warps: int
    num_stages: int
    held: int = 2


@triton.jit
def _chosen(scores, n0, lowest, last, BLOCK_N: tl.constexpr):
    """The scores, -inf where a query does not keep the key. NaN stays: it has to be seen in the output."""
    scores = tl.where(scores < lowest[:, None], float("-inf"), scores)
    if n0 + BLOCK_N - 1 > tl.min(last, 0):  # only where equal scores had to be told apart
        n = (n0 + tl.arange(0, BLOCK_N))[None, :]
        scores = tl.where((scores == lowest[:, None]) & (n > last[:, None]), float("-inf"), scores)
    return scores


@triton.jit
def _per_query(values, row, m0, num_queries, OTHER: tl.constexpr, BLOCK_M: tl.constexpr):
    m = m0 + tl.arange(0, BLOCK_M)
    return tl.load(values + row.to(tl.int64) * num_queries + m, mask=m < num_queries, other=OTHER)


@triton.jit(do_not_specialize=RUNTIME)
def _forward_kernel(
    q, k, v, first, lowest, last, output, log_sum, num_queries, num_keys, num_heads, scale_2,
    C: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    SHARING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The output, and the logarithm to base 2 of the sum of powers, 0 for a query that sees nothing."""
    row, m0 = block_of(tl.program_id(0), num_queries, BLOCK_M)
    low, high = keys_seen(first, row, m0, num_queries, num_keys, num_heads, BLOCK_M)
    start, end = key_range(m0, low, num_queries, num_keys, BLOCK_M, BLOCK_N)
    base, shared = row.to(tl.int64), (row // SHARING).to(tl.int64)
    queries, keys, values = q + base * num_queries * C, k + shared * num_keys * C, v + shared * num_keys * D
    q_MC = load_rows(queries, m0, num_queries, C, BLOCK_M, BLOCK_C)
    if lowest is not None:
        bound = _per_query(lowest, row, m0, num_queries, 0.0, BLOCK_M)
        end_of_equals = _per_query(last, row, m0, num_queries, 2147483647, BLOCK_M)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for n0 in range(start, end, BLOCK_N):
        scores, _ = score_tile(q_MC, keys, n0, low, high, num_keys, C, BLOCK_N, BLOCK_C, PRECISION)
        if lowest is not None:
            scores = _chosen(scores, n0, bound, end_of_equals, BLOCK_N)
        higher = tl.maximum(top, tl.max(scores, 1) * scale_2)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        powers = tl.exp2(scores * scale_2 - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(powers, 1)
        v_ND = load_rows(values, n0, num_keys, D, BLOCK_N, BLOCK_D)
        acc = acc * fade[:, None] + dot(powers.to(v_ND.dtype), v_ND, PRECISION)
        top = higher
    sees = total != 0.0
    acc = acc / tl.where(sees, total, 1.0)[:, None]
    store_rows(output + base * num_queries * D, m0, num_queries, acc, D, BLOCK_M, BLOCK_D)
    m = m0 + tl.arange(0, BLOCK_M)
    of_row = tl.where(sees, top + tl.log2(tl.where(sees, total, 1.0)), 0.0)
    tl.store(log_sum + base * num_queries + m, of_row, mask=m < num_queries)


@triton.jit(do_not_specialize=RUNTIME)
def _query_gradient_kernel(
    q, k, v, first, lowest, last, output, gradient, log_sum, mean, q_gradient, num_queries, num_keys, num_heads, scale, scale_2,
    C: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    SHARING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of q, and mean = the sum of gradient * output of each query, for the other kernel."""
    row, m0 = block_of(tl.program_id(0), num_queries, BLOCK_M)
    low, high = keys_seen(first, row, m0, num_queries, num_keys, num_heads, BLOCK_M)
    start, end = key_range(m0, low, num_queries, num_keys, BLOCK_M, BLOCK_N)
    base, shared = row.to(tl.int64), (row // SHARING).to(tl.int64)
    queries, keys, values = q + base * num_queries * C, k + shared * num_keys * C, v + shared * num_keys * D
    q_MC = load_rows(queries, m0, num_queries, C, BLOCK_M, BLOCK_C)
    dy_MD = load_rows(gradient + base * num_queries * D, m0, num_queries, D, BLOCK_M, BLOCK_D)
    y_MD = load_rows(output + base * num_queries * D, m0, num_queries, D, BLOCK_M, BLOCK_D)
    of_row = tl.sum(dy_MD.to(tl.float32) * y_MD.to(tl.float32), 1)
    m = m0 + tl.arange(0, BLOCK_M)
    tl.store(mean + base * num_queries + m, of_row, mask=m < num_queries)
    if lowest is not None:
        bound = _per_query(lowest, row, m0, num_queries, 0.0, BLOCK_M)
        end_of_equals = _per_query(last, row, m0, num_queries, 2147483647, BLOCK_M)
    log_of_sum = _per_query(log_sum, row, m0, num_queries, 0.0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for n0 in range(start, end, BLOCK_N):
        scores, k_NC = score_tile(q_MC, keys, n0, low, high, num_keys, C, BLOCK_N, BLOCK_C, PRECISION)
        if lowest is not None:
            scores = _chosen(scores, n0, bound, end_of_equals, BLOCK_N)
        weights = tl.exp2(scores * scale_2 - log_of_sum[:, None])
        v_ND = load_rows(values, n0, num_keys, D, BLOCK_N, BLOCK_D)
        d_scores = weights * (dot(dy_MD, tl.trans(v_ND), PRECISION) - of_row[:, None])
        acc += dot(d_scores.to(k_NC.dtype), k_NC, PRECISION)
    store_rows(q_gradient + base * num_queries * C, m0, num_queries, acc * scale, C, BLOCK_M, BLOCK_C)


@triton.jit(do_not_specialize=RUNTIME)
def _key_gradient_kernel(
    q, k, v, first, until, lowest, last, gradient, log_sum, mean, k_gradient, v_gradient, num_queries, num_keys, num_heads, scale, scale_2,
    C: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    SHARING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of k and v, over the heads that share them. until: of each key the end of the queries that see it."""
    blocks = tl.cdiv(num_keys, BLOCK_N)
    shared, n0 = (
        tl.program_id(0) // blocks,
        tl.program_id(0) % blocks * BLOCK_N,
    )  # the first keys are seen by the most queries
    base = shared.to(tl.int64)
    keys, values = k + base * num_keys * C, v + base * num_keys * D
    v_ND = load_rows(values, n0, num_keys, D, BLOCK_N, BLOCK_D)
    dk_NC = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    dv_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    end = num_queries
    if until is not None:
        end = tl.load(until + shared * SHARING // num_heads * num_keys + tl.minimum(n0 + BLOCK_N, num_keys) - 1)
    start = tl.maximum(n0 - (num_keys - num_queries), 0) // BLOCK_M * BLOCK_M
    for head in range(SHARING):
        row = shared * SHARING + head
        queries, gradients = q + row.to(tl.int64) * num_queries * C, gradient + row.to(tl.int64) * num_queries * D
        for m0 in range(start, end, BLOCK_M):
            low, high = keys_seen(first, row, m0, num_queries, num_keys, num_heads, BLOCK_M)
            q_MC = load_rows(queries, m0, num_queries, C, BLOCK_M, BLOCK_C)
            scores, _ = score_tile(q_MC, keys, n0, low, high, num_keys, C, BLOCK_N, BLOCK_C, PRECISION)
            if lowest is not None:
                bound = _per_query(lowest, row, m0, num_queries, 0.0, BLOCK_M)
                end_of_equals = _per_query(last, row, m0, num_queries, 2147483647, BLOCK_M)
                scores = _chosen(scores, n0, bound, end_of_equals, BLOCK_N)
            log_of_sum = _per_query(log_sum, row, m0, num_queries, 0.0, BLOCK_M)
            weights = tl.exp2(scores * scale_2 - log_of_sum[:, None])
            dy_MD = load_rows(gradients, m0, num_queries, D, BLOCK_M, BLOCK_D)
            dv_ND += dot(tl.trans(weights.to(dy_MD.dtype)), dy_MD, PRECISION)
            of_row = _per_query(mean, row, m0, num_queries, 0.0, BLOCK_M)
            d_scores = weights * (dot(dy_MD, tl.trans(v_ND), PRECISION) - of_row[:, None])
            dk_NC += dot(tl.trans(d_scores.to(q_MC.dtype)), q_MC, PRECISION)
    store_rows(k_gradient + base * num_keys * C, n0, num_keys, dk_NC * scale, C, BLOCK_N, BLOCK_C)
    store_rows(v_gradient + base * num_keys * D, n0, num_keys, dv_ND, D, BLOCK_N, BLOCK_D)


@dataclass(frozen=True)
class Chosen:
    """What the forward pass keeps of each query (B, H, S) for the backward pass. lowest and last: None where every key is kept.

    log_sum: to base 2, of the sum of powers; lowest: the lowest score that is kept, before the scale; last (int32): the highest key
    that is kept with just this score.
    """

    log_sum: Tensor
    lowest: Tensor | None
    last: Tensor | None


def forward(
    q_BHSC: Tensor, k_BGMC: Tensor, v_BGMD: Tensor, first_BS: Tensor | None, *, top_k: int, scale: float, precision: str
) -> tuple[Tensor, Chosen]:
    """The output (B, H, S, D) in the dtype of v. first: int32, the lowest key that a query sees. precision: of a dot, "ieee" or "tf32"."""
    B, H, S, _ = q_BHSC.shape
    M, D = v_BGMD.shape[2:]
    output = v_BGMD.new_empty(B, H, S, D)
    log_sum = q_BHSC.new_empty(B, H, S, dtype=torch.float32)
    lowest, last = None, None
    if output.numel() and top_k < M:
        lowest, last = thresholds(q_BHSC, k_BGMC, first_BS, top_k=top_k, precision=precision)

    def launch(tiles: Tiles) -> None:
        _forward_kernel[(triton.cdiv(S, tiles.m) * B * H,)](
            q_BHSC, k_BGMC, v_BGMD, first_BS, lowest, last, output, log_sum, S, M, H, scale * LOG2_E, **_blocks(q_BHSC, k_BGMC, D, tiles),
            PRECISION=precision,
        )  # fmt: skip

    if output.numel():
        launch(_fastest("forward", launch, q_BHSC, v_BGMD, top_k=0 if lowest is None else top_k))
    return output, Chosen(log_sum, lowest, last)


def thresholds(
    q_BHSC: Tensor, k_BGMC: Tensor, first_BS: Tensor | None, *, top_k: int, precision: str
) -> tuple[Tensor, Tensor]:
    """lowest and last of `Chosen`, for top_k < M."""
    B, H, S, _ = q_BHSC.shape
    lowest = q_BHSC.new_empty(B, H, S, dtype=torch.float32)
    last = q_BHSC.new_empty(B, H, S, dtype=torch.int32)

    def launch(tiles: Tiles) -> None:
        blocks = _blocks(q_BHSC, k_BGMC, 0, tiles)
        del blocks["D"], blocks["BLOCK_D"]
        threshold_kernel[(triton.cdiv(S, tiles.m) * B * H,)](
            q_BHSC, k_BGMC, first_BS, lowest, last, S, k_BGMC.shape[2], H, top_k, **blocks, HELD=tiles.held, PRECISION=precision
        )  # fmt: skip

    launch(_fastest("thresholds", launch, q_BHSC, k_BGMC, top_k=top_k))
    return lowest, last


def backward(
    gradient_BHSD: Tensor, q_BHSC: Tensor, k_BGMC: Tensor, v_BGMD: Tensor, output_BHSD: Tensor, chosen: Chosen, first_BS: Tensor | None,
    *, scale: float, precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    B, H, S, _ = q_BHSC.shape
    G, M, D = v_BGMD.shape[1:]
    dq_BHSC, dk_BGMC, dv_BGMD = (torch.empty_like(each) for each in (q_BHSC, k_BGMC, v_BGMD))
    mean = torch.empty_like(chosen.log_sum)
    until_BM = None
    if first_BS is not None:  # it does not decrease along the queries
        keys_BM = torch.arange(M, device=first_BS.device, dtype=first_BS.dtype).expand(B, M).contiguous()
        until_BM = torch.searchsorted(first_BS, keys_BM, right=True, out_int32=True)
    sizes = (S, M, H, scale, scale * LOG2_E)
    top_k = int(chosen.lowest is not None)  # for the choice of tiles only whether any is left out

    def launch_queries(tiles: Tiles) -> None:
        _query_gradient_kernel[(triton.cdiv(S, tiles.m) * B * H,)](
            q_BHSC, k_BGMC, v_BGMD, first_BS, chosen.lowest, chosen.last, output_BHSD, gradient_BHSD, chosen.log_sum, mean, dq_BHSC, *sizes,
            **_blocks(q_BHSC, k_BGMC, D, tiles), PRECISION=precision,
        )  # fmt: skip

    def launch_keys(tiles: Tiles) -> None:
        _key_gradient_kernel[(triton.cdiv(M, tiles.n) * B * G,)](
            q_BHSC, k_BGMC, v_BGMD, first_BS, until_BM, chosen.lowest, chosen.last, gradient_BHSD, chosen.log_sum, mean, dk_BGMC, dv_BGMD,
            *sizes, **_blocks(q_BHSC, k_BGMC, D, tiles), PRECISION=precision,
        )  # fmt: skip

    if mean.numel():
        launch_queries(_fastest("queries", launch_queries, q_BHSC, v_BGMD, top_k=top_k))
    if B * G * M:
        launch_keys(_fastest("keys", launch_keys, q_BHSC, v_BGMD, top_k=top_k))
    return dq_BHSC, dk_BGMC, dv_BGMD


def _blocks(q_BHSC: Tensor, k_BGMC: Tensor, value_width: int, tiles: Tiles) -> dict[str, int]:
    width = q_BHSC.shape[-1]
    return {
        "C": width,
        "D": value_width,
        "BLOCK_M": tiles.m,
        "BLOCK_N": tiles.n,
        "BLOCK_C": max(16, triton.next_power_of_2(width)),
        "BLOCK_D": max(16, triton.next_power_of_2(value_width)),
        "SHARING": q_BHSC.shape[1] // k_BGMC.shape[1],
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def tiles_for(name: str, *, dtype: torch.dtype, width: int, top_k: int, warp_size: int) -> list[Tiles]:
    """What is tried in "thresholds", "forward", "queries" and "keys", what is likely best first; m and n are the same in all of them.

    The places of the thresholds hold 2 top_k scores in all: two sweeps are enough then (search.py). They lie in the registers of 256
    threads: of 512, eight warps of an MI300, two would hold the same scores, and it spilled 80 bytes for top_k 256 and heads of 128.
    In float32 NVIDIA's compiler keeps more of a head at once without a second stage, and spills 184 to 1,600 bytes.
    """
    m, n = (16, 32) if dtype == torch.float32 else (64, 64)
    held = max(4, triton.next_power_of_2(triton.cdiv(2 * top_k, n)))
    if name == "thresholds":
        stages = (2,) if dtype == torch.float32 else (1, 2)
        return [Tiles(m, n, num_warps=256 // warp_size, num_stages=each, held=held) for each in stages]
    if dtype == torch.float32:
        return [Tiles(m, n, num_warps=4, num_stages=2)]
    return [
        Tiles(m, n, num_warps=warps, num_stages=2)
        for warps in ((4, 8) if width <= 64 and name == "forward" else (8, 4))
    ]


def _fastest(name: str, launch: Callable[[Tiles], object], q_BHSC: Tensor, other: Tensor, *, top_k: int) -> Tiles:
    """other: v, or k for the thresholds. top_k: 0 where every key is kept."""
    (B, H, S, C), (_, G, M, D) = q_BHSC.shape, other.shape
    key = (f"top_k_attention {name}", rounded(B * H), H // G, rounded(S), rounded(M), C, D, top_k, q_BHSC.dtype)
    configs = tiles_for(name, dtype=q_BHSC.dtype, width=max(C, D), top_k=top_k, warp_size=_warp_size())
    return fastest(configs, launch, key=key, device=q_BHSC.device)


def _warp_size() -> int:
    """Threads of a warp of the GPU for which a launch compiles: 32, or 64 of an MI300."""
    return 32 if interpreted() else triton.runtime.driver.active.get_current_target().warp_size
