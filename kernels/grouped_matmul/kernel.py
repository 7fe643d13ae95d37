"""grouped_matmul in Triton: rows read through an index, one expert per tile, gate and activation on the accumulator.

`multiply` is a grouped matmul with one of three endings: the forward pass; the gradient of its rows (the same matmul with
the weights transposed, and the gates' gradient as a dot product with the rows); for a relu, the gradient of what went into
it, from the forward product made again. The gradient of the weights is weight_gradient.py, sums over copies of a row are
kernels/sum_copies. Nothing depends on timing.

Owns: `multiply`, its tiles and its launch. Does not own: which tile comes when (tiles.py), autograd (op.py).
Called by: kernels/grouped_matmul/op.py, and kernels/expert_mlp and kernels/switchhead_project for what the others share.

Letters: C copies, G groups, K the summed width, N the width of the result (for weights G x K x N).
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false, reportGeneralTypeIssues=false
# A launch passes numbers where a kernel declares tl.constexpr, and options of the compiler that it does not declare.

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.grouped_matmul.schedule import num_programs, order_bits
from kernels.grouped_matmul.tiles import (
    INTERPRETED,
    Rows,
    Tiles,
    count_tiles,
    dense_rows,
    indexed,
    precision,
    row_stride,
    tile_of,
)
from kernels.grouped_matmul.weight_gradient import launch_weight_gradient
from kernels.tuning import fastest, rounded

__all__ = ["Rows", "Tiles", "indexed", "launch_multiply", "launch_weight_gradient", "multiply", "precision", "tile_of"]

FORWARD, ROW_GRADIENT, RELU_GRADIENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# 64 rows: an expert of a fine-grained layer has a few hundred, and half a tile is wasted per group. The others are cut so that sm_90 needs
# no more than 128 registers: 128 x 128 by 64 needs 152, 128 x 64 with 4 warps 202. (64 x 128 needs 146 for K 412; shared memory holds
# three of its programs all the same.)
TILES = (Tiles(64, 128, 64, 4, 3), Tiles(128, 128, 32, 8, 4), Tiles(128, 64, 64, 8, 3), Tiles(64, 64, 64, 4, 4))
TILES_FP32 = (Tiles(64, 64, 32, 8, 3), Tiles(64, 128, 32, 8, 3), Tiles(128, 64, 32, 8, 3), Tiles(32, 64, 32, 4, 3))


def tiles_for(dtype: torch.dtype) -> tuple[Tiles, ...]:
    return TILES_FP32 if dtype == torch.float32 else TILES


@triton.jit
def _product(
    rows_ptr, row, inside, weights_ptr, n, K: tl.constexpr, N: tl.constexpr,
    STRIDE_ROW: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """rows[row] (M, K) @ weights[:, n] in float32. Rows not `inside` and columns from N on count as 0."""
    total = tl.zeros([row.shape[0], n.shape[0]], tl.float32)
    for first in tl.range(0, K, BLOCK_K, disable_licm=True):
        k = first + tl.arange(0, BLOCK_K)
        a = tl.load(
            rows_ptr + row[:, None] * STRIDE_ROW + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0
        )
        place = k[:, None] * STRIDE_K + n[None, :] * STRIDE_N
        b = tl.load(weights_ptr + place, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["C", "G", "bits"])
def multiply(
    rows_ptr, weights_ptr, offsets_ptr, index_ptr, gates_ptr, other_ptr, other_index_ptr, out_ptr, dots_ptr, C, G, bits,
    K: tl.constexpr, N: tl.constexpr, STRIDE_ROW: tl.constexpr, STRIDE_GROUP: tl.constexpr, STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr, STRIDE_OTHER: tl.constexpr,
    ENDING: tl.constexpr, RELU: tl.constexpr, GATE_FIRST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, G_POWER: tl.constexpr,
):  # fmt: skip
    """See the top of the file. disable_licm: what does not change from tile to tile would stay in registers, 180 instead of 128 of them
    for a forward tile of 64 x 128 on sm_90 (and 96 in a program of one tile).
    """
    column_tiles: tl.constexpr = tl.cdiv(N, BLOCK_N)
    tiles = count_tiles(offsets_ptr, G, BLOCK_M, G_POWER) * column_tiles
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        column_tile = tile % column_tiles  # the fastest: tiles that read the same rows run side by side
        group, start, end = tile_of(tile // column_tiles, offsets_ptr, G, BLOCK_M, G_POWER, bits)
        c = start + tl.arange(0, BLOCK_M)
        inside = c < end
        n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        total = _product(
            rows_ptr, indexed(index_ptr, c, inside), inside, weights_ptr + group.to(tl.int64) * STRIDE_GROUP, n,
            K, N, STRIDE_ROW, STRIDE_K, STRIDE_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        stored = inside[:, None] & (n < N)[None, :]
        gate = tl.full([BLOCK_M], 1.0, tl.float32)
        if gates_ptr is not None:
            gate = tl.load(gates_ptr + c, mask=inside, other=0.0)
        if ENDING == FORWARD:
            result = total
            if GATE_FIRST:
                result *= gate[:, None]
            if RELU:
                result = tl.where(result < 0, 0.0, result)  # keeps NaN, as torch does
            if not GATE_FIRST:
                result *= gate[:, None]
        else:
            result = total * gate[:, None]
            if other_ptr is not None:
                place = indexed(other_index_ptr, c, inside)[:, None] * STRIDE_OTHER + n[None, :]
                other = tl.load(other_ptr + place, mask=stored, other=0.0).to(tl.float32)
            if ENDING == RELU_GRADIENT:
                other = tl.where((result if GATE_FIRST else total) > 0, other, 0.0)
                result = other * gate[:, None]
            if dots_ptr is not None:
                dots = tl.sum(tl.where(stored, total * other, 0.0), axis=1)
                tl.store(dots_ptr + tl.cast(column_tile, tl.int64) * C + c, dots, mask=inside)
        place = c.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=stored)


def launch_multiply(
    rows: Rows,
    weights_GKN: Tensor,
    offsets_G: Tensor,
    gates_C: Tensor | None,
    *,
    ending: tl.constexpr = FORWARD,
    other: Rows | None = None,
    relu: bool = False,
    gate_first: bool = False,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out_CN, and for the gradients with gates their gradient in C numbers (see `multiply`)."""
    (G, K, N), C = weights_GKN.shape, rows.num_copies
    out_CN = rows.values.new_empty(C, N)
    with_dots = ending != FORWARD and gates_C is not None
    if C == 0:
        return out_CN, gates_C.new_empty(0) if with_dots and gates_C is not None else None
    smallest = min(each.columns for each in ([tiles] if tiles else tiles_for(out_CN.dtype)))
    dots_XC = out_CN.new_empty(triton.cdiv(N, smallest), C, dtype=torch.float32) if with_dots else None
    read, others = dense_rows(rows.values), None if other is None else dense_rows(other.values)

    def launch(tiles: Tiles) -> int:
        column_tiles = triton.cdiv(N, tiles.columns)
        # Groups end anywhere: each may have one more tile than its share.
        most = column_tiles * (triton.cdiv(C, tiles.rows) + min(G, C))
        bits = _bits(rows, other, weights_GKN, block=tiles.rows)
        shared = (tiles.rows + tiles.columns) * tiles.depth * tiles.stages * out_CN.itemsize
        wide = ending != FORWARD and out_CN.dtype != torch.float32
        multiply[(num_programs(most, warps=tiles.warps, shared=shared, wide=wide, device=out_CN.device),)](
            read, weights_GKN, offsets_G, rows.index_C, gates_C, others, other.index_C if other else None, out_CN, dots_XC,
            C, G, bits,
            K, N, row_stride(read), *weights_GKN.stride(), 0 if others is None else row_stride(others),
            ENDING=ending, RELU=relu, GATE_FIRST=gate_first, PRECISION=precision(),
            BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth, G_POWER=triton.next_power_of_2(G),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return column_tiles

    key = ("multiply", ending.value, other is None, rounded(C), G, K, N, out_CN.dtype)
    chosen = tiles or fastest(tiles_for(out_CN.dtype), launch, key=key, device=out_CN.device)
    column_tiles = launch(chosen)
    return out_CN, None if dots_XC is None else dots_XC[:column_tiles].sum(0)


def _bits(rows: Rows, other: Rows | None, weights_GKN: Tensor, *, block: int) -> int:
    """The order of tiles. Rows without an index are read by one group each, so nothing is gained by going through groups together."""
    if rows.index_C is None and (other is None or other.index_C is None):
        return 0
    return order_bits(
        copies=rows.num_copies,
        groups=len(weights_GKN),
        block=block,
        weight_bytes=weights_GKN.numel() * weights_GKN.itemsize,
        device=weights_GKN.device,
    )
