"""grouped_matmul in Triton: rows read through an index, one expert per tile, gate and activation on the accumulator.

`multiply` is a grouped matmul with one of three endings: the forward pass; the gradient of its rows (the same matmul with
the weights transposed, and the gates' gradient as a dot product with the rows); for a relu, the gradient of what went into
it, from the forward product made again. `weight_gradient` owns a tile of one group's gradient and walks through the
group's copies in order. Sums over copies of a row are kernels/sum_copies. Nothing depends on timing.

Letters: C copies, R rows, P output rows, G groups, K the summed width, N the width of the result (for weights G x K x N);
in weight_gradient M x N is the group's matrix and C is summed.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false
# A launch passes numbers where a kernel declares tl.constexpr, and options of the compiler that it does not declare.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from kernels.sum_copies import RowCopies
from kernels.sum_copies.kernel import add
from kernels.tuning import fastest, rounded

INTERPRETED = tl.constexpr(knobs.runtime.interpret)  # there a dot of bfloat16 is silently wrong
FORWARD, ROW_GRADIENT, RELU_GRADIENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@dataclass(frozen=True)
class Tiles:
    """rows x columns of the result in one program, `depth` of the summed width at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# 64 rows: an expert of a fine-grained layer has a few hundred, and half a tile is wasted per group.
TILES = (Tiles(64, 128, 64, 4, 3), Tiles(128, 128, 64, 8, 3), Tiles(128, 64, 64, 4, 3), Tiles(64, 64, 64, 4, 4))
# 8 warps for 64 x 64: with 4 the gradient of gated weights spills 320 bytes per thread.
TILES_FP32 = (Tiles(64, 64, 32, 8, 3), Tiles(64, 128, 32, 8, 3), Tiles(128, 64, 32, 8, 3), Tiles(32, 64, 32, 4, 3))


def tiles_for(dtype: torch.dtype) -> tuple[Tiles, ...]:
    return TILES_FP32 if dtype == torch.float32 else TILES


@triton.jit
def tile_of(program, offsets_ptr, G, BLOCK: tl.constexpr, G_POWER: tl.constexpr):
    """group, first copy and end of the group for the program-th tile; first >= end beyond the last tile."""
    groups = tl.arange(0, G_POWER)
    ends = tl.load(offsets_ptr + groups, mask=groups < G, other=0)
    starts = tl.load(offsets_ptr + groups - 1, mask=(groups > 0) & (groups < G), other=0)
    tiles = tl.where(groups < G, tl.cdiv(ends - starts, BLOCK), 0)
    group = tl.sum((tl.cumsum(tiles, axis=0) <= program).to(tl.int32), axis=0)
    earlier_tiles = tl.sum(tl.where(groups < group, tiles, 0), axis=0)
    start = tl.sum(tl.where(groups == group, starts, 0), axis=0)
    end = tl.sum(tl.where(groups == group, ends, 0), axis=0)
    return group, start + (program - earlier_tiles) * BLOCK, end


@triton.jit
def indexed(index_ptr, c, inside):
    """The row that each copy reads, as 64-bit numbers: rows times width may exceed 2**31."""
    row = c
    if index_ptr is not None:
        row = tl.load(index_ptr + c, mask=inside, other=0)
    return row.to(tl.int64)


@triton.jit
def multiply(
    rows_ptr, weights_ptr, offsets_ptr, index_ptr, gates_ptr, other_ptr, other_index_ptr, out_ptr, dots_ptr,
    C, G, K, N,
    stride_row, stride_row_k, stride_group, stride_k, stride_n, stride_other, stride_other_n,
    ENDING: tl.constexpr, RELU: tl.constexpr, GATE_FIRST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, G_POWER: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(N, BLOCK_N)
    column_tile = tl.program_id(0) % column_tiles  # the fastest: tiles that read the same rows run side by side
    group, start, end = tile_of(tl.program_id(0) // column_tiles, offsets_ptr, G, BLOCK_M, G_POWER)
    if start >= end:
        return
    c = start + tl.arange(0, BLOCK_M)
    inside = c < end
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = rows_ptr + indexed(index_ptr, c, inside)[:, None] * stride_row + k[None, :] * stride_row_k
    weights = weights_ptr + group.to(tl.int64) * stride_group + k[:, None] * stride_k + n[None, :] * stride_n
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        a = tl.load(rows, mask=inside[:, None] & (first + k < K)[None, :], other=0.0)
        b = tl.load(weights, mask=(first + k < K)[:, None] & (n < N)[None, :], other=0.0)
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        rows += BLOCK_K * stride_row_k
        weights += BLOCK_K * stride_k

    stored = inside[:, None] & (n < N)[None, :]
    gate = tl.full([BLOCK_M], 1.0, tl.float32)
    if gates_ptr is not None:
        gate = tl.load(gates_ptr + c, mask=inside, other=0.0)
    if other_ptr is not None:
        other_row = indexed(other_index_ptr, c, inside)
        other = tl.load(
            other_ptr + other_row[:, None] * stride_other + n[None, :] * stride_other_n, mask=stored, other=0.0
        )
        other = other.to(tl.float32)
    if ENDING == FORWARD:
        result = total
        if GATE_FIRST:
            result *= gate[:, None]
        if RELU:
            result = tl.where(result < 0, 0.0, result)  # keeps NaN, as torch does
        if not GATE_FIRST:
            result *= gate[:, None]
    elif ENDING == ROW_GRADIENT:
        result = total * gate[:, None]
        if other_ptr is not None:
            dots = tl.sum(tl.where(stored, total * other, 0.0), axis=1)
            tl.store(dots_ptr + column_tile.to(tl.int64) * C + c, dots, mask=inside)
    else:
        before_relu = total * gate[:, None] if GATE_FIRST else total
        passed = tl.where(before_relu > 0, other, 0.0)
        result = passed * gate[:, None]
        if dots_ptr is not None:
            dots = tl.sum(tl.where(stored, passed * total, 0.0), axis=1)
            tl.store(dots_ptr + column_tile.to(tl.int64) * C + c, dots, mask=inside)
    place = c.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def weight_gradient(
    rows_ptr, gradient_ptr, offsets_ptr, index_ptr, gradient_index_ptr, gates_ptr, out_ptr,
    M, N, stride_row, stride_row_m, stride_gradient, stride_gradient_n,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row_tiles, column_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    column_tile = program % column_tiles
    row_tile = (program // column_tiles) % row_tiles
    group = program // (column_tiles * row_tiles)
    m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(offsets_ptr + group - 1, mask=group > 0, other=0)
    end = tl.load(offsets_ptr + group)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(start, end, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = c < end
        row = indexed(index_ptr, c, inside)
        gradient_row = indexed(gradient_index_ptr, c, inside)
        x = tl.load(
            rows_ptr + row[:, None] * stride_row + m[None, :] * stride_row_m,
            mask=inside[:, None] & (m < M)[None, :],
            other=0.0,
        )
        gradient = tl.load(
            gradient_ptr + gradient_row[:, None] * stride_gradient + n[None, :] * stride_gradient_n,
            mask=inside[:, None] & (n < N)[None, :],
            other=0.0,
        )
        if gates_ptr is not None:
            gate = tl.load(gates_ptr + c, mask=inside, other=0.0)
            gradient = (gradient.to(tl.float32) * gate[:, None]).to(gradient.dtype)
        if INTERPRETED:
            x, gradient = x.to(tl.float32), gradient.to(tl.float32)
        total = tl.dot(tl.trans(x), gradient, total, input_precision=PRECISION)
    place = group.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@dataclass(frozen=True)
class Rows:
    """Rows that copies read: copy c reads row index[c], or row c without an index."""

    values: Tensor
    index_C: Tensor | None

    @property
    def num_copies(self) -> int:
        return len(self.values) if self.index_C is None else len(self.index_C)


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

    def launch(tiles: Tiles) -> int:
        column_tiles = triton.cdiv(N, tiles.columns)
        # Groups end anywhere: each may have one more tile than its share. Programs beyond the last tile return at once.
        multiply[(column_tiles * (triton.cdiv(C, tiles.rows) + min(G, C)),)](
            rows.values, weights_GKN, offsets_G, rows.index_C, gates_C,
            other.values if other else None, other.index_C if other else None, out_CN, dots_XC,
            C, G, K, N,
            *rows.values.stride(), *weights_GKN.stride(), *(other.values.stride() if other else (0, 0)),
            ENDING=ending, RELU=relu, GATE_FIRST=gate_first, PRECISION=precision(),
            BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth, G_POWER=triton.next_power_of_2(G),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return column_tiles

    key = ("multiply", ending.value, other is None, rounded(C), G, K, N, out_CN.dtype)
    chosen = tiles or fastest(tiles_for(out_CN.dtype), launch, key=key, device=out_CN.device)
    column_tiles = launch(chosen)
    return out_CN, None if dots_XC is None else dots_XC[:column_tiles].sum(0)


def launch_weight_gradient(
    rows: Rows, gradient: Rows, offsets_G: Tensor, gates_C: Tensor | None, *, tiles: Tiles | None = None
) -> Tensor:
    """out_GMN; exact zeros for a group without copies."""
    G, M, N = len(offsets_G), rows.values.shape[1], gradient.values.shape[1]
    out_GMN = rows.values.new_empty(G, M, N)

    def launch(tiles: Tiles) -> None:
        weight_gradient[(G * triton.cdiv(M, tiles.rows) * triton.cdiv(N, tiles.columns),)](
            rows.values, gradient.values, offsets_G, rows.index_C, gradient.index_C, gates_C, out_GMN,
            M, N, *rows.values.stride(), *gradient.values.stride(),
            PRECISION=precision(), BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_C=tiles.depth,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    key = ("weight_gradient", rounded(rows.num_copies), G, M, N, out_GMN.dtype)
    launch(tiles or fastest(tiles_for(out_GMN.dtype), launch, key=key, device=out_GMN.device))
    return out_GMN


def precision() -> str:
    """What a dot of float32 may do: TF32 only where torch's own switch allows it."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


@torch.library.custom_op("switchyard::grouped_matmul", mutates_args=())
def forward(
    rows_RM: Tensor,
    weights_GMN: Tensor,
    gates_C: Tensor | None,
    offsets_G: Tensor,
    row_index_C: Tensor | None,
    output_index_C: Tensor | None,
    num_outputs: int,
    relu: bool,
    gate_first: bool,
) -> Tensor:
    """(C, N), or (num_outputs, N) with an output index: see kernels/grouped_matmul/__init__.py."""
    rows = Rows(rows_RM, row_index_C)
    out_CN, _ = launch_multiply(rows, weights_GMN, offsets_G, gates_C, relu=relu, gate_first=gate_first)
    return out_CN if output_index_C is None else _sum(out_CN, output_index_C, num_outputs)


@forward.register_fake
def _(rows_RM, weights_GMN, gates_C, offsets_G, row_index_C, output_index_C, num_outputs, relu, gate_first):
    copies = rows_RM.shape[0] if row_index_C is None else row_index_C.shape[0]
    return rows_RM.new_empty(copies if output_index_C is None else num_outputs, weights_GMN.shape[2])


@torch.library.custom_op("switchyard::grouped_matmul_backward", mutates_args=())
def backward(
    gradient: Tensor,
    rows_RM: Tensor,
    weights_GMN: Tensor,
    gates_C: Tensor | None,
    offsets_G: Tensor,
    row_index_C: Tensor | None,
    output_index_C: Tensor | None,
    relu: bool,
    gate_first: bool,
    needs_rows: bool,
    needs_weights: bool,
    needs_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, weights and gates; an empty tensor for one that is not needed."""
    rows, gradients = Rows(rows_RM, row_index_C), Rows(gradient, output_index_C)
    rows_gradient, weights_gradient = rows_RM.new_empty(0), rows_RM.new_empty(0)
    gates_gradient_C = None
    if relu:
        before_CN, gates_gradient_C = launch_multiply(
            rows, weights_GMN, offsets_G, gates_C, ending=RELU_GRADIENT, other=gradients, gate_first=gate_first
        )
        gradients, gates_C = Rows(before_CN, None), None
    if needs_rows or (needs_gates and not relu):
        copies_CM, found_C = launch_multiply(
            gradients,
            weights_GMN.mT,
            offsets_G,
            gates_C,
            ending=ROW_GRADIENT,
            other=rows if gates_C is not None else None,
        )
        gates_gradient_C = gates_gradient_C if relu else found_C
        if needs_rows:
            rows_gradient = copies_CM if row_index_C is None else _sum(copies_CM, row_index_C, len(rows_RM))
    if needs_weights:
        weights_gradient = launch_weight_gradient(rows, gradients, offsets_G, gates_C)
    if gates_gradient_C is None:
        gates_gradient_C = rows_RM.new_empty(0, dtype=torch.float32)
    return rows_gradient, weights_gradient, gates_gradient_C


@backward.register_fake
def _(
    gradient, rows_RM, weights_GMN, gates_C, offsets_G, row_index_C, output_index_C, relu, gate_first,
    needs_rows, needs_weights, needs_gates,
):  # fmt: skip
    return (
        rows_RM.new_empty(rows_RM.shape if needs_rows else (0,)),
        rows_RM.new_empty(weights_GMN.shape if needs_weights else (0,)),
        rows_RM.new_empty(gates_C.shape if needs_gates else (0,), dtype=torch.float32),
    )


def _sum(copies_CN: Tensor, index_C: Tensor, num_rows: int) -> Tensor:
    copies = RowCopies.of(index_C, num_rows=num_rows)
    return add(copies_CN, copies.order_C, copies.ends_P)


def _setup(ctx, inputs, output) -> None:
    rows_RM, weights_GMN, gates_C, offsets_G, row_index_C, output_index_C, _, relu, gate_first = inputs
    ctx.save_for_backward(rows_RM, weights_GMN, gates_C, offsets_G, row_index_C, output_index_C)
    ctx.options = (relu, gate_first)


def _gradients(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    found = backward(gradient, *ctx.saved_tensors, *ctx.options, *needs)
    return (*(each if needed else None for each, needed in zip(found, needs, strict=True)), *([None] * 6))


forward.register_autograd(_gradients, setup_context=_setup)
