"""The gradient of the weights of every group, in Triton: for each group the sum over its copies of one row times another.

Owns: the kernels, their tiles, their launch. Does not own: into how many parts a sum is cut (schedule.py).
Called by: the backward passes of kernels/grouped_matmul, kernels/expert_mlp and kernels/switchhead_project.

A program owns a tile of the gradient and walks through a group's copies in order. Where groups and tiles are too few to fill a GPU, a
group's copies are cut into parts of equal length: a program owns the tile of a part, writes its sum in float32, and a second kernel
adds the parts of a group in order. Nothing is added atomically, so nothing depends on timing.

Letters: C copies, summed; M x N a group's matrix; G groups; L copies of a part.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false, reportAttributeAccessIssue=false
# A launch passes numbers where a kernel declares tl.constexpr, and options of the compiler that it does not declare.

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.grouped_matmul.schedule import part_length
from kernels.grouped_matmul.tiles import (
    INTERPRETED,
    Rows,
    Tiles,
    dense_rows,
    indexed,
    precision,
    row_stride,
    tile_of,
)
from kernels.tuning import fastest, rounded

TILES = (Tiles(128, 128, 64, 8, 3), Tiles(64, 128, 64, 4, 3), Tiles(128, 64, 64, 4, 3))
TILES_FP32 = (Tiles(64, 64, 32, 8, 3), Tiles(64, 128, 32, 8, 3))
BLOCK = 1024  # numbers that a program of sum_parts adds


def weight_tiles_for(dtype: torch.dtype) -> tuple[Tiles, ...]:
    return TILES_FP32 if dtype == torch.float32 else TILES


@triton.jit(do_not_specialize=["G", "L"])
def weight_gradient(
    rows_ptr, gradient_ptr, offsets_ptr, index_ptr, gradient_index_ptr, gates_ptr, out_ptr, G, L,
    M: tl.constexpr, N: tl.constexpr, STRIDE_ROW: tl.constexpr, STRIDE_GRADIENT: tl.constexpr, IN_PARTS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, G_POWER: tl.constexpr,
):  # fmt: skip
    """out[g] = sum over the copies of rows (M,) times gradient (N,), gated; IN_PARTS: out[s] for part s, of L copies or less."""
    row_tiles: tl.constexpr = tl.cdiv(M, BLOCK_M)
    column_tiles: tl.constexpr = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    column_tile = program % column_tiles
    row_tile = (program // column_tiles) % row_tiles
    owned = program // (column_tiles * row_tiles)  # a group, or a part of one
    if IN_PARTS:
        _, start, group_end = tile_of(owned, offsets_ptr, G, L, G_POWER)
        end = tl.minimum(start + L, group_end)
        if start >= end:
            return
    else:
        start = tl.load(offsets_ptr + owned - 1, mask=owned > 0, other=0)
        end = tl.load(offsets_ptr + owned)
    m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(start, end, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = c < end
        row = indexed(index_ptr, c, inside)
        gradient_row = indexed(gradient_index_ptr, c, inside)
        x = tl.load(
            rows_ptr + row[None, :] * STRIDE_ROW + m[:, None], mask=inside[None, :] & (m < M)[:, None], other=0.0
        )
        gradient = tl.load(
            gradient_ptr + gradient_row[:, None] * STRIDE_GRADIENT + n[None, :],
            mask=inside[:, None] & (n < N)[None, :],
            other=0.0,
        )
        if gates_ptr is not None:
            gate = tl.load(gates_ptr + c, mask=inside, other=0.0)
            gradient = (gradient.to(tl.float32) * gate[:, None]).to(gradient.dtype)
        if INTERPRETED:
            x, gradient = x.to(tl.float32), gradient.to(tl.float32)
        total = tl.dot(x, gradient, total, input_precision=PRECISION)
    place = owned.to(tl.int64) * (M * N) + m[:, None] * N + n[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["G", "L"])
def sum_parts(
    parts_ptr, offsets_ptr, out_ptr, G, L, SIZE: tl.constexpr, BLOCK: tl.constexpr, G_POWER: tl.constexpr
):  # fmt: skip
    """out[g] (SIZE numbers) = the parts of group g added in order; zeros for a group without."""
    blocks: tl.constexpr = tl.cdiv(SIZE, BLOCK)
    group = tl.program_id(0) // blocks
    groups = tl.arange(0, G_POWER)
    ends = tl.load(offsets_ptr + groups, mask=groups <= group, other=0)
    starts = tl.load(offsets_ptr + groups - 1, mask=(groups > 0) & (groups <= group), other=0)
    parts = tl.cdiv(ends - starts, L)
    first = tl.sum(tl.where(groups < group, parts, 0), axis=0)
    n = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(first, first + tl.sum(tl.where(groups == group, parts, 0), axis=0)):
        total += tl.load(parts_ptr + tl.cast(part, tl.int64) * SIZE + n, mask=n < SIZE, other=0.0)
    tl.store(out_ptr + group.to(tl.int64) * SIZE + n, total.to(out_ptr.dtype.element_ty), mask=n < SIZE)


def launch_weight_gradient(
    rows: Rows, gradient: Rows, offsets_G: Tensor, gates_C: Tensor | None, *, tiles: Tiles | None = None
) -> Tensor:
    """out_GMN in the dtype of the rows; exact zeros for a group without copies. gates_C multiply the gradient."""
    G, M, N, C = len(offsets_G), rows.values.shape[1], gradient.values.shape[1], rows.num_copies
    out_GMN = rows.values.new_empty(G, M, N)
    left, right = dense_rows(rows.values), dense_rows(gradient.values)
    power = triton.next_power_of_2(G)

    def launch(tiles: Tiles) -> None:
        of_group = triton.cdiv(M, tiles.rows) * triton.cdiv(N, tiles.columns)
        length = part_length(copies=C, groups=G, tiles=of_group, block=tiles.depth)
        owned = G if length is None else triton.cdiv(C, length) + G  # each group may have one more than its share
        sums = out_GMN if length is None else out_GMN.new_empty(owned, M, N, dtype=torch.float32)
        weight_gradient[(owned * of_group,)](
            left, right, offsets_G, rows.index_C, gradient.index_C, gates_C, sums, G, length or 0,
            M, N, row_stride(left), row_stride(right), length is not None, precision(),
            tiles.rows, tiles.columns, tiles.depth, power, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        if length is not None:
            sum_parts[(G * triton.cdiv(M * N, BLOCK),)](sums, offsets_G, out_GMN, G, length, M * N, BLOCK, power)

    configs = tuple(
        dict.fromkeys(_fitted(each, M, N) for each in ([tiles] if tiles else weight_tiles_for(out_GMN.dtype)))
    )
    key = ("weight_gradient", rounded(C), G, M, N, gates_C is None, out_GMN.dtype)
    launch(fastest(configs, launch, key=key, device=out_GMN.device))
    return out_GMN


def _fitted(tiles: Tiles, M: int, N: int) -> Tiles:
    """No larger than a narrow matrix: a tile of 128 for a width of 64 would multiply as many zeros as numbers."""
    rows, columns = (max(16, triton.next_power_of_2(width)) for width in (M, N))
    return replace(tiles, rows=min(tiles.rows, rows), columns=min(tiles.columns, columns))
