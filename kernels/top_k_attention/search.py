"""The search of top_k_attention: for each query the score of its top_k-th key, without a list of keys.

Owns: `threshold_kernel`. Does not own: tiles of scores (tiles.py), its launch and the letters (kernel.py). Called by: kernel.py.

A tile of M x N scores goes along the keys, and for each of its places the `held` largest scores
that were ever there stay in registers: that is 2 `held` - 1 minima and maxima per score, where merging into sorted lists takes some 70.
The top_k-th largest of all held ones is the answer, unless one place has seen more than `held` of the best ones; as a bound from below
it is never wrong. Where it is not the answer, a second sweep counts the scores above the bound and holds the lowest of them in
the same way, and knows how many of these to leave out. Each sweep raises the bound. Places that hold 2 top_k scores in all end with
the second sweep (2.0 sweeps, 2.2 at most, for random scores, 2,048 and 16,384 keys, top_k 32 to 256; places for top_k scores take 12
to 16). Keys that are best at one place only, every 64th, cost a sweep for each `held` of them.
"""

# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# It reads a kernel as a Python function of tl.constexpr objects.

import triton
import triton.language as tl

from kernels.top_k_attention.tiles import RUNTIME, block_of, key_range, keys_seen, load_rows, score_tile

LOWEST_ORDER = tl.constexpr(-2139095041)  # of -inf, see `_largest`


@triton.jit
def _insert(held, x):
    """The largest len(held) of what came to each place so far, descending, with x among them."""
    found = ()
    for i in tl.static_range(len(held)):
        found += (tl.maximum(held[i], x),)
        x = tl.minimum(held[i], x)
    return found


@triton.jit
def _count(held, bound, STRICT: tl.constexpr):
    """(M,): how many of all that is held in a row are above the bound (M,), or at it."""
    count = ((held[0] > bound[:, None]) if STRICT else (held[0] >= bound[:, None])).to(tl.int32)
    for i in tl.static_range(1, len(held)):
        count += ((held[i] > bound[:, None]) if STRICT else (held[i] >= bound[:, None])).to(tl.int32)
    return tl.sum(count, 1)


@triton.jit
def _largest(held, rank):
    """(M,): the rank-th largest (from 1) of all that is held in a row; -inf where there are fewer.

    A bound is made, bit after bit, of int32 that are ordered as the float32 are, until just `rank` numbers of each row reach it: of the 32
    steps some 20, where there are no ties. (-0 and 0 are two of the int32 and one number: either will do.)
    """
    order = tl.full(rank.shape, -2147483648, tl.int32)
    is_found = tl.full(rank.shape, 0, tl.int32)
    bit, missing = 31, 1
    while (bit >= 0) & (missing > 0):
        tried = order ^ (tl.full([], 1, tl.int32) << bit)
        number = tl.where(tried < 0, tried ^ 0x7FFFFFFF, tried).to(tl.float32, bitcast=True)
        count = _count(held, number, STRICT=False)
        order = tl.where(count >= rank, tried, order)
        is_found = tl.where(count == rank, 1, is_found)
        missing = tl.max(1 - is_found, 0)
        bit -= 1
    number = tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)
    least = tl.where(held[0] >= number[:, None], held[0], float("inf"))
    for i in tl.static_range(1, len(held)):
        least = tl.minimum(least, tl.where(held[i] >= number[:, None], held[i], float("inf")))
    return tl.where(order <= LOWEST_ORDER, float("-inf"), tl.min(least, 1))


@triton.jit
def _search(
    q, keys, low, high, start, end, num_keys, top_k,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, HELD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(M,): the top_k-th largest score of each query, -inf if it sees fewer; and how many are at or above it, if it is not -inf."""
    empty = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    wanted = tl.zeros((BLOCK_M,), tl.int32) + top_k
    held = (empty,) * HELD
    for n0 in range(start, end, BLOCK_N):
        scores, _ = score_tile(q, keys, n0, low, high, num_keys, C, BLOCK_N, BLOCK_C, PRECISION)
        held = _insert(held, scores)
    bound = _largest(held, wanted)
    at_least = _count(held, bound, STRICT=False)
    # What was let go is at most the least that its place holds: below the bound it does not matter. Nor where a query keeps all.
    open_rows = tl.max(((tl.max(held[HELD - 1], 1) >= bound) & (high - low >= top_k)).to(tl.int32), 0)
    while open_rows > 0:
        above, at_least = tl.zeros((BLOCK_M,), tl.int32), tl.zeros((BLOCK_M,), tl.int32)
        held = (empty,) * HELD  # the lowest ones above the bound, with the other sign
        for n0 in range(start, end, BLOCK_N):
            scores, _ = score_tile(q, keys, n0, low, high, num_keys, C, BLOCK_N, BLOCK_C, PRECISION)
            is_above = scores > bound[:, None]
            above += tl.sum(is_above.to(tl.int32), 1)
            at_least += tl.sum((scores >= bound[:, None]).to(tl.int32), 1)
            held = _insert(held, tl.where(is_above, -scores, float("-inf")))
        # The score is the `surplus`-th of those above. All below the complete bound are held, and so are fewer than `surplus` of them if
        # the score is not among them: then it is that bound or above.
        surplus = above - top_k + 1
        complete = -tl.max(held[HELD - 1], 1)
        found = -_largest(held, tl.maximum(surplus, 1))
        at_least = tl.where(surplus < 1, at_least, above - _count(held, -found, STRICT=True))
        bound = tl.where(surplus < 1, bound, tl.minimum(found, complete))
        open_rows = tl.max(((surplus >= 1) & (found > complete)).to(tl.int32), 0)
    return bound, at_least


@triton.jit
def _last_of_equals(
    q, keys, low, high, start, end, num_keys, lowest, dropped,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(M,): the highest key with the score `lowest` after the `dropped` highest ones are left out. From the last tile to the first."""
    last, seen = tl.full((BLOCK_M,), -1, tl.int32), tl.zeros((BLOCK_M,), tl.int32)
    for back in range(0, end - start, BLOCK_N):
        n0 = start + (end - start - 1) // BLOCK_N * BLOCK_N - back
        scores, _ = score_tile(q, keys, n0, low, high, num_keys, C, BLOCK_N, BLOCK_C, PRECISION)
        equal = (scores == lowest[:, None]).to(tl.int32)
        total = tl.sum(equal, 1)
        after = (seen + total)[:, None] - tl.cumsum(equal, 1)  # equal ones at higher keys
        n = (n0 + tl.arange(0, BLOCK_N))[None, :]
        last = tl.maximum(last, tl.max(tl.where((equal > 0) & (after == dropped[:, None]), n, -1), 1))
        seen += total
    return last


@triton.jit(do_not_specialize=RUNTIME)
def threshold_kernel(
    q, k, first, lowest, last, num_queries, num_keys, num_heads, top_k,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, HELD: tl.constexpr, SHARING: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """lowest and last of each query: -inf and num_keys where it keeps all that it sees."""
    row, m0 = block_of(tl.program_id(0), num_queries, BLOCK_M)
    low, high = keys_seen(first, row, m0, num_queries, num_keys, num_heads, BLOCK_M)
    start, end = key_range(m0, low, num_queries, num_keys, BLOCK_M, BLOCK_N)
    bound = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    end_of_equals = tl.zeros((BLOCK_M,), tl.int32) + num_keys
    if tl.max(high - low, 0) >= top_k:
        queries, keys = q + row.to(tl.int64) * num_queries * C, k + (row // SHARING).to(tl.int64) * num_keys * C
        q_MC = load_rows(queries, m0, num_queries, C, BLOCK_M, BLOCK_C)
        bound, at_least = _search(
            q_MC, keys, low, high, start, end, num_keys, top_k, C, BLOCK_M, BLOCK_N, BLOCK_C, HELD, PRECISION
        )  # fmt: skip
        dropped = tl.where(bound > float("-inf"), tl.maximum(at_least - top_k, 0), 0)
        if tl.max(dropped, 0) > 0:
            of_equals = _last_of_equals(
                q_MC, keys, low, high, start, end, num_keys, bound, dropped, C, BLOCK_M, BLOCK_N, BLOCK_C, PRECISION
            )  # fmt: skip
            end_of_equals = tl.where(dropped > 0, of_equals, end_of_equals)
    m = m0 + tl.arange(0, BLOCK_M)
    place = row.to(tl.int64) * num_queries + m
    tl.store(lowest + place, bound, mask=m < num_queries)
    tl.store(last + place, end_of_equals, mask=m < num_queries)
