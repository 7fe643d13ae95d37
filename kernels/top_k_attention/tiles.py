"""What the kernels of top_k_attention share: tiles of rows, which keys a query sees, and the one way to make a tile of scores.

Owns: that. Does not own: the search (search.py), the attention (kernel.py, which has the letters). Called by: both.
"""

# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# It reads a kernel as a Python function of tl.constexpr objects.

import triton
import triton.language as tl

from kernels.grouped_matmul.tiles import INTERPRETED

RUNTIME = ["num_queries", "num_keys", "num_heads", "top_k"]  # a length is not worth a compilation


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    if INTERPRETED:  # its product of bf16 is wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_rows(rows, start, length, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Rows start .. start + BLOCK - 1 of (length, WIDTH), all columns, 0 outside. 64 bits: rows times width may exceed 2**31."""
    i, c = tl.arange(0, BLOCK), tl.arange(0, BLOCK_WIDTH)
    place = rows + tl.cast(start, tl.int64) * WIDTH + i[:, None] * WIDTH + c[None, :]
    return tl.load(place, mask=(start + i < length)[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(rows, start, length, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    i, c = tl.arange(0, BLOCK), tl.arange(0, BLOCK_WIDTH)
    place = rows + tl.cast(start, tl.int64) * WIDTH + i[:, None] * WIDTH + c[None, :]
    tl.store(place, value.to(rows.dtype.element_ty), mask=(start + i < length)[:, None] & (c < WIDTH)[None, :])


@triton.jit
def keys_seen(first, row, m0, num_queries, num_keys, num_heads, BLOCK_M: tl.constexpr):
    """The keys that queries m0 .. see: low and high (M,), low > high where none. Queries beyond the last one see none."""
    m = m0 + tl.arange(0, BLOCK_M)
    high = tl.where(m < num_queries, m + num_keys - num_queries, -1)
    low = tl.zeros((BLOCK_M,), tl.int32)
    if first is not None:
        low = tl.load(first + row // num_heads * num_queries + m, mask=m < num_queries, other=num_keys)
    return low, high


@triton.jit
def score_tile(
    q,
    keys,
    n0,
    low,
    high,
    num_keys,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q @ k^T (M, N) before the scale, -inf at keys that a query does not see; and the keys."""
    k = load_rows(keys, n0, num_keys, C, BLOCK_N, BLOCK_C)
    scores = dot(q, tl.trans(k), PRECISION)
    if (n0 < tl.max(low, 0)) | (n0 + BLOCK_N - 1 > tl.min(high, 0)):  # most tiles need no mask
        n = (n0 + tl.arange(0, BLOCK_N))[None, :]
        scores = tl.where((n >= low[:, None]) & (n <= high[:, None]), scores, float("-inf"))
    return scores, k


@triton.jit
def block_of(program, num_queries, BLOCK_M: tl.constexpr):
    """The row and the first query of a program: the queries that see the most keys come first."""
    blocks = tl.cdiv(num_queries, BLOCK_M)
    return program // blocks, (blocks - 1 - program % blocks) * BLOCK_M


@triton.jit
def key_range(m0, low, num_queries, num_keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key of the first tile, and the end of the keys, that a block of queries has to look at."""
    end = num_keys - num_queries + tl.minimum(m0 + BLOCK_M, num_queries)
    return tl.minimum(tl.min(low, 0), end) // BLOCK_N * BLOCK_N, end
