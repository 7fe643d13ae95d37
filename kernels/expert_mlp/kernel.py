"""expert_mlp on a GPU: the Triton kernels and the functions that launch them.

Owns: the kernels, their tiles, the launches of the forward and of the backward pass. Does not own: the weights' gradients and which
tile comes when (kernels/grouped_matmul), autograd (op.py), checks (the public function), the bytes that decided the design (traffic.py).
Called by: kernels/expert_mlp/op.py and forms.py.

A tile of BLOCK_M copies never spans two groups. Forward: a program reads the rows of its tile through the route index, holds the
hidden activations (BLOCK_M, F) on chip and multiplies them by blocks of W2; it writes one result per copy. kernels/sum_copies sums
those of each output row in a fixed order. Backward: a program makes the hidden activations again, their gradient and with it the
gate's, and multiplies it by blocks of W1: one result per copy, summed per row likewise. Nothing is added atomically. Where F is too
wide to be held (or fp32, whose products need the registers), the hidden activations pass through memory and `_project_kernel` does the
second product.

A program has one tile. Programs that walk over several, as in grouped_matmul, were compiled: what does not change from tile to tile
then stays in registers. On sm_90, for D 412 in bf16, the forward kernel went from 122 registers to 234 (180 with disable_licm), the
backward one from 120 to 242 (180), `_project_kernel` from 104 to 134: above 128, one program of 8 warps fits a multiprocessor instead of
two. In fp32 with F 64 the forward kernel spilled 64 bytes.

Letters, here only: M copies of a tile, K the dimension a product sums over, N its columns; D, F as everywhere. Tensors are contiguous;
D, F and the strides that follow are constants of a compilation, so that D 412 is loaded 8 bytes at a time and not 2.
"""

# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false
# It reads a kernel as a Python function of tl.constexpr objects, whose launch takes no num_warps.

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.grouped_matmul.schedule import order_bits
from kernels.grouped_matmul.tiles import INTERPRETED, indexed, precision, tile_of
from kernels.tuning import fastest, rounded


@dataclass(frozen=True)
class Tiles:
    """M copies by F of the hidden activations, summed over K at a time; D columns of the result at a time."""

    m: int
    f: int
    d: int
    k: int
    num_warps: int
    num_stages: int


@triton.jit
def _place(tile, offsets, num_groups, bits, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr):
    """The group of a tile, its copies, and which of them exist: none beyond the last tile."""
    group, first, end = tile_of(tile, offsets, num_groups, BLOCK_M, BLOCK_L, bits)
    copies = first + tl.arange(0, BLOCK_M)
    return group.to(tl.int64), copies.to(tl.int64), copies < end, first < end


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # its product of bf16 is wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _product(
    rows, index, inside, weights, columns, K: tl.constexpr, N: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """rows[index] (M, K) @ weights[:, columns] in fp32. Rows not `inside` and columns from N on count as 0."""
    acc = tl.zeros((index.shape[0], columns.shape[0]), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a = tl.load(rows + index[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
        place = k[:, None] * STRIDE_K + columns[None, :] * STRIDE_N
        b = tl.load(weights + place, mask=(k < K)[:, None] & (columns < N)[None, :], other=0.0)
        acc = _dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def _spread(
    held, weights, partials, copies, inside, D: tl.constexpr, F: tl.constexpr, STRIDE_F: tl.constexpr, STRIDE_D: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partials[copies] = held (M, F) @ weights (F, D), one block of columns after the other."""
    f = tl.arange(0, BLOCK_F)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        place = f[:, None] * STRIDE_F + d[None, :] * STRIDE_D
        b = tl.load(weights + place, mask=(f < F)[:, None] & (d < D)[None, :], other=0.0)
        acc = _dot(held, b, tl.zeros((held.shape[0], BLOCK_D), tl.float32), PRECISION)
        result = acc.to(partials.dtype.element_ty)
        tl.store(partials + copies[:, None] * D + d[None, :], result, mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _scales(gates, factors, copies, kept, inside, stored):
    """What the hidden activations are multiplied by: the gate (M,), and the factors (M, F) or 1."""
    gate = tl.load(gates + copies, mask=inside, other=0.0)
    return gate, 1.0 if factors is None else tl.load(factors + kept, mask=stored, other=0.0)


@triton.jit(do_not_specialize=["num_groups", "bits"])
def _forward_kernel(
    rows, up, down, gates, factors, row_index, offsets, partials, gated, hidden, num_groups, bits,
    D: tl.constexpr, F: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u = gate * relu(x @ W1) [* factors]; then u @ W2 into partials, or u into gated. relu(x @ W1) into hidden, to be kept."""
    group, copies, inside, exists = _place(tl.program_id(0), offsets, num_groups, bits, BLOCK_M, BLOCK_L)
    if not exists:
        return
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    h = _product(
        rows, indexed(row_index, copies, inside), inside, up + group * D * F, f, D, F, F, 1, BLOCK_K, PRECISION
    )
    h = tl.where(h < 0, 0.0, h)  # and not a maximum: NaN stays NaN
    kept = copies[:, None] * F + f[None, :]
    stored = inside[:, None] & (f < F)[None, :]
    if hidden is not None:
        tl.store(hidden + kept, h.to(hidden.dtype.element_ty), mask=stored)
    gate, factor = _scales(gates, factors, copies, kept, inside, stored)
    u = (h * gate[:, None] * factor).to(rows.dtype.element_ty)
    if gated is not None:
        tl.store(gated + kept, u, mask=stored)
    else:
        _spread(u, down + group * D * F, partials, copies, inside, D, F, D, 1, BLOCK_F, BLOCK_D, PRECISION)


@triton.jit(do_not_specialize=["num_groups", "num_copies", "bits"])
def _backward_kernel(
    gradient, rows, up, down, gates, factors, row_index, output_index, offsets, hidden, gated, hidden_gradient, gate_gradient,
    partials, num_groups, num_copies, bits,
    D: tl.constexpr, F: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With v = dy @ W2^T: gate_gradient = sum of v * h [* factors] over F; hidden_gradient = v * gate [* factors] where h > 0.

    Writes both, and u again for W2's gradient; hidden_gradient @ W1^T into partials if the tile holds all of F.
    """
    group, copies, inside, exists = _place(tl.program_id(0), offsets, num_groups, bits, BLOCK_M, BLOCK_L)
    if not exists:
        return
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    kept = copies[:, None] * F + f[None, :]
    stored = inside[:, None] & (f < F)[None, :]
    v = _product(
        gradient, indexed(output_index, copies, inside), inside, down + group * D * F, f, D, F, 1, D, BLOCK_K, PRECISION
    )  # fmt: skip
    if hidden is not None:
        h = tl.load(hidden + kept, mask=stored, other=0.0).to(tl.float32)
    else:
        h = _product(
            rows, indexed(row_index, copies, inside), inside, up + group * D * F, f, D, F, F, 1, BLOCK_K, PRECISION
        )
        h = tl.where(h < 0, 0.0, h)
    gate, factor = _scales(gates, factors, copies, kept, inside, stored)
    v = v * factor
    of_block = gate_gradient + tl.program_id(1).to(tl.int64) * num_copies
    tl.store(of_block + copies, tl.sum(v * h, 1), mask=inside)
    tl.store(gated + kept, (h * gate[:, None] * factor).to(gated.dtype.element_ty), mask=stored)
    v = tl.where(h <= 0, 0.0, v * gate[:, None]).to(rows.dtype.element_ty)
    tl.store(hidden_gradient + kept, v, mask=stored)
    if partials is not None:
        _spread(v, up + group * D * F, partials, copies, inside, D, F, 1, F, BLOCK_F, BLOCK_D, PRECISION)


@triton.jit(do_not_specialize=["num_groups"])
def _project_kernel(
    held, weights, offsets, partials, num_groups, D: tl.constexpr, F: tl.constexpr, STRIDE_F: tl.constexpr, STRIDE_D: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partials = held (C, F) @ weights[group] (F, D), for an F that a tile cannot hold. Each of its rows is read by one group only."""
    group, copies, inside, exists = _place(tl.program_id(0), offsets, num_groups, 0, BLOCK_M, BLOCK_L)
    if not exists:
        return
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = _product(held, copies, inside, weights + group * D * F, d, F, D, STRIDE_F, STRIDE_D, BLOCK_K, PRECISION)
    stored = inside[:, None] & (d < D)[None, :]
    tl.store(partials + copies[:, None] * D + d[None, :], acc.to(partials.dtype.element_ty), mask=stored)


def forward(
    rows_RD: Tensor, up_LDF: Tensor, down_LFD: Tensor, gates_C: Tensor, *, row_index_C: Tensor, offsets_L: Tensor,
    factors_CF: Tensor | None, keep_hidden: bool, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The result of each copy (C, D) and, if it is to be kept, relu(x @ W1) (C, F); both in the dtype of the rows."""
    num_groups, d_model, expert_dim = up_LDF.shape
    num_copies = len(row_index_C)
    partials_CD = rows_RD.new_empty(num_copies, d_model)
    hidden_CF = rows_RD.new_empty(num_copies, expert_dim) if keep_hidden else None

    def launch(tiles: Tiles) -> None:
        gated_CF = None if tiles.f >= expert_dim else rows_RD.new_empty(num_copies, expert_dim)
        _forward_kernel[_num_tiles(num_copies, num_groups, tiles), triton.cdiv(expert_dim, tiles.f)](
            rows_RD, up_LDF, down_LFD, gates_C, factors_CF, row_index_C, offsets_L, partials_CD, gated_CF, hidden_CF, num_groups,
            _bits(num_copies, up_LDF, tiles, matrices=1 if gated_CF is not None else 2),
            d_model, expert_dim, **_blocks(tiles, num_groups), BLOCK_F=tiles.f, PRECISION=precision(),
        )  # fmt: skip
        if gated_CF is not None:
            _project(gated_CF, down_LFD, offsets_L, partials_CD, (d_model, 1), tiles)

    if num_copies:
        launch(tiles or _fastest("forward", launch, rows_RD, num_copies, up_LDF))
    return partials_CD, hidden_CF


@dataclass(frozen=True)
class CopyGradients:
    """Of each copy: gated_CF, what W2 multiplied; hidden_CF, the gradient of x @ W1; gates_C (float32); rows_CD if asked."""

    gated_CF: Tensor
    hidden_CF: Tensor
    gates_C: Tensor
    rows_CD: Tensor | None


def backward(
    gradient_PD: Tensor, rows_RD: Tensor, up_LDF: Tensor, down_LFD: Tensor, gates_C: Tensor, *, row_index_C: Tensor,
    output_index_C: Tensor, offsets_L: Tensor, factors_CF: Tensor | None, hidden_CF: Tensor | None, of_rows: bool,
    tiles: Tiles | None = None,
) -> CopyGradients:  # fmt: skip
    """Everything of the backward pass that belongs to one copy. hidden_CF: what the forward pass kept, None to make it again."""
    num_groups, d_model, expert_dim = up_LDF.shape
    num_copies = len(row_index_C)
    gated_CF, found_CF = (rows_RD.new_empty(num_copies, expert_dim) for _ in range(2))
    rows_CD = rows_RD.new_empty(num_copies, d_model) if of_rows else None

    def launch(tiles: Tiles) -> Tensor:
        blocks = triton.cdiv(expert_dim, tiles.f)
        gate_BC = gates_C.new_empty(blocks, num_copies)
        _backward_kernel[_num_tiles(num_copies, num_groups, tiles), blocks](
            gradient_PD, rows_RD, up_LDF, down_LFD, gates_C, factors_CF, row_index_C, output_index_C, offsets_L, hidden_CF,
            gated_CF, found_CF, gate_BC, rows_CD if tiles.f >= expert_dim else None, num_groups, num_copies,
            _bits(num_copies, up_LDF, tiles, matrices=2 if hidden_CF is None or blocks == 1 else 1),
            d_model, expert_dim, **_blocks(tiles, num_groups), BLOCK_F=tiles.f, PRECISION=precision(),
        )  # fmt: skip
        if rows_CD is not None and tiles.f < expert_dim:
            _project(found_CF, up_LDF, offsets_L, rows_CD, (1, expert_dim), tiles)
        return gate_BC[0] if len(gate_BC) == 1 else gate_BC.sum(0)

    if num_copies == 0:
        return CopyGradients(gated_CF, found_CF, torch.zeros_like(gates_C), rows_CD)
    gate_C = launch(tiles or _fastest("backward", launch, rows_RD, num_copies, up_LDF))
    return CopyGradients(gated_CF, found_CF, gate_C, rows_CD)


def _project(
    held_CF: Tensor, weights: Tensor, offsets_L: Tensor, partials_CD: Tensor, strides: tuple[int, int], tiles: Tiles
) -> None:  # fmt: skip
    """partials = held @ weights; strides: of the weights in F and in D."""
    (num_copies, expert_dim), d_model, num_groups = held_CF.shape, partials_CD.shape[1], len(offsets_L)
    _project_kernel[_num_tiles(num_copies, num_groups, tiles), triton.cdiv(d_model, tiles.d)](
        held_CF, weights, offsets_L, partials_CD, num_groups, d_model, expert_dim, *strides,
        **_blocks(tiles, num_groups), PRECISION=precision(),
    )  # fmt: skip


def _num_tiles(num_copies: int, num_groups: int, tiles: Tiles) -> int:
    """An upper bound of the tiles, known without reading the offsets from the device: each group may have a part-filled one."""
    return triton.cdiv(num_copies, tiles.m) + min(num_groups, num_copies)


def _bits(num_copies: int, up_LDF: Tensor, tiles: Tiles, *, matrices: int) -> int:
    """The order of tiles for a launch that reads up, or down, or both."""
    return order_bits(
        copies=num_copies,
        groups=len(up_LDF),
        block=tiles.m,
        weight_bytes=matrices * up_LDF.numel() * up_LDF.itemsize,
        device=up_LDF.device,
    )


def _blocks(tiles: Tiles, num_groups: int) -> dict[str, int]:
    return {
        "BLOCK_L": triton.next_power_of_2(num_groups),
        "BLOCK_M": tiles.m,
        "BLOCK_D": tiles.d,
        "BLOCK_K": tiles.k,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def tiles_for(name: str, *, dtype: torch.dtype, expert_dim: int) -> list[Tiles]:
    """What is tried in the "forward" and the "backward" pass, what is likely best first.

    A tile holds all of F up to 256, in fp32 up to 64. The backward pass holds two of them: 128 copies would spill 400 to 700
    bytes per thread on an H100.
    """
    if dtype == torch.float32:
        return [Tiles(m=32, f=64, d=64, k=32, num_warps=4, num_stages=2)]
    f = max(16, triton.next_power_of_2(expert_dim))
    if f > 256:
        return [Tiles(m=128 if name == "forward" else 64, f=128, d=128, k=64, num_warps=8, num_stages=3)]
    width = 64 if f <= 128 else 32
    low = Tiles(m=64, f=f, d=width, k=width, num_warps=4 if f <= 64 else 8, num_stages=3)
    if name == "backward":
        return [low]
    high = Tiles(m=128, f=f, d=width, k=width, num_warps=8, num_stages=3)
    return [high, low] if f <= 128 else [low, high]


def _fastest(name: str, launch: Callable[[Tiles], object], rows_RD: Tensor, num_copies: int, up_LDF: Tensor) -> Tiles:
    key = (f"expert_mlp {name}", rounded(num_copies), tuple(up_LDF.shape), rows_RD.dtype)
    return fastest(
        tiles_for(name, dtype=rows_RD.dtype, expert_dim=up_LDF.shape[2]), launch, key=key, device=rows_RD.device
    )
