"""sort_routes in Triton: a stable counting sort in two launches.

count: each program counts the groups in its own run of ids. scatter: each program adds up the counts of all programs
(G starts, and what earlier programs hold of each group), then places its ids in order: place = start of the group +
copies in earlier programs + copies earlier in this run. Only integers are added, so nothing depends on timing.

Letters: C ids, G groups, P programs, B ids per step.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false
# A launch passes numbers where a kernel declares tl.constexpr, and options of the compiler that it does not declare.

import torch
import triton
import triton.language as tl
from torch import Tensor

B = 128  # ids per step: their ranks come from B x B comparisons
MAX_PROGRAMS = 128  # every program of scatter reads the counts of all
TILE = 8192  # counts read at once


@triton.jit
def count(ids_ptr, counts_ptr, C, G, steps, B: tl.constexpr, G_POWER: tl.constexpr):
    program = tl.program_id(0)
    groups = tl.arange(0, G_POWER)
    found = tl.zeros([G_POWER], tl.int32)
    for step in range(steps):
        c = (program * steps + step) * B + tl.arange(0, B)
        ids = tl.load(ids_ptr + c, mask=c < C, other=0).to(tl.int32)
        found += tl.histogram(ids, G_POWER, mask=c < C)
    tl.store(counts_ptr + program.to(tl.int64) * G + groups, found, mask=groups < G)


@triton.jit
def scatter(
    ids_ptr, counts_ptr, order_ptr, offsets_ptr, inverse_ptr, C, G, steps, programs,
    B: tl.constexpr, G_POWER: tl.constexpr, P_TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    groups = tl.arange(0, G_POWER)
    total = tl.zeros([G_POWER], tl.int32)
    earlier = tl.zeros([G_POWER], tl.int32)
    for first in range(0, programs, P_TILE):
        p = first + tl.arange(0, P_TILE)[:, None]
        inside = (p < programs) & (groups[None, :] < G)
        counts = tl.load(counts_ptr + p.to(tl.int64) * G + groups[None, :], mask=inside, other=0)
        total += tl.sum(counts, axis=0)
        earlier += tl.sum(tl.where(p < program, counts, 0), axis=0)
    ends = tl.cumsum(total, axis=0)
    tl.store(offsets_ptr + groups, ends, mask=(groups < G) & (program == 0))
    free = ends - total + earlier  # the next free place of each group

    b = tl.arange(0, B)
    for step in range(steps):
        c = (program * steps + step) * B + b
        ids = tl.load(ids_ptr + c, mask=c < C, other=0).to(tl.int32)
        same_and_earlier = (ids[:, None] == ids[None, :]) & (b[None, :] < b[:, None])
        rank = tl.sum(same_and_earlier.to(tl.int32), axis=1)
        place = tl.gather(free, ids, axis=0) + rank
        tl.store(order_ptr + place, c, mask=c < C)
        tl.store(inverse_ptr + c, place, mask=c < C)
        free += tl.histogram(ids, G_POWER, mask=c < C)


@torch.library.custom_op("switchyard::sort_routes", mutates_args=())
def sort(ids_C: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """int32 order_C, offsets_G, inverse_C of contiguous ids in [0, num_groups)."""
    order_C, offsets_G, inverse_C = _empty(ids_C, num_groups)
    C, G = len(ids_C), num_groups
    if C == 0:
        return order_C, offsets_G.zero_(), inverse_C
    steps = triton.cdiv(triton.cdiv(C, B), MAX_PROGRAMS)
    programs = triton.cdiv(C, steps * B)
    power = triton.next_power_of_2(G)
    counts_PG = ids_C.new_empty((programs, G), dtype=torch.int32)
    count[(programs,)](ids_C, counts_PG, C, G, steps, B=B, G_POWER=power)
    tile = min(triton.next_power_of_2(programs), max(1, TILE // power))
    scatter[(programs,)](
        ids_C, counts_PG, order_C, offsets_G, inverse_C, C, G, steps, programs, B=B, G_POWER=power, P_TILE=tile
    )
    return order_C, offsets_G, inverse_C


@sort.register_fake
def _empty(ids_C: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        ids_C.new_empty(len(ids_C), dtype=torch.int32),
        ids_C.new_empty(num_groups, dtype=torch.int32),
        ids_C.new_empty(len(ids_C), dtype=torch.int32),
    )
