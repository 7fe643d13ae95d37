"""Passes over the copies of one row after the other, in Triton: row . table[entry] for each copy, and weighted sums of table rows.

Owns: the two kernels, their tiles, their launches. Does not own: the pass over the copies of one entry after the other (by_entry.py),
autograd (the op.py of each operation), checks (the public functions), bytes (traffic.py).
Called by: kernels/peer_experts, kernels/embedding_bag and op.py beside it.

A program owns one row and walks over its copies, several at a time, so that as many rows of the table are on their way. The copies of a
row are one range, because copies come in the order of their rows. Both passes of PEER are made of these two: forward z = x . up, then
the sum of gate * act(z) * down; backward c = dy . down, then the sum of dz * up. z, c and the weights between them pass through memory,
4 bytes each beside the 2 D of a row, and the received rows need not be the output rows.

Tiles are shaped so that nothing crosses a warp inside a loop. A thread loads 16 bytes at a time. In `products_kernel` warps lie along the
copies, and a tile has fewer columns than threads, so that Triton has each of them load its own part of the row; in `sums_kernel` warps
lie along the columns.

Letters: C copies, L rows of the table, D columns; BLOCK_C copies and BLOCK_D columns in a tile.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false
# A launch passes numbers where a kernel declares tl.constexpr, and options of the compiler that it does not declare.

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tables.routes import LARGE_TABLE
from kernels.tuning import fastest, rounded

LANE_BYTES, LANES = 16, 32  # what a thread loads at once, and the threads of a warp
MAX_COLUMNS = 1024  # of a tile of sums_kernel: a wider row has several programs
LOADS = 8  # of each thread for a tile of products_kernel, all of them under way at once


@dataclass(frozen=True)
class Tiles:
    """copies x columns of a tile, and the warps of a program."""

    copies: int
    columns: int
    warps: int


def products_tiles(table_LD: Tensor, copies_per_row: int) -> list[Tiles]:
    """What is tried, what is likely best first: the copies of a row at once, up to 128 in 16 bits; columns half as many as threads.

    More columns read longer pieces of a row, 256 bytes in the first of them, which memory likes; fewer make smaller programs.
    """
    width, at_once = _power(table_LD.shape[1]), LOADS * LANE_BYTES // table_LD.itemsize
    # rows that do not start at 16 bytes are loaded number by number: a whole tile at once spilled 336 bytes in bf16, D 1,001
    least = 1 if table_LD.shape[1] * table_LD.itemsize % LANE_BYTES == 0 else 2
    found = []
    for columns, warps, loads in ((128, 8, 1), (128, 8, 2), (64, 4, 1), (256, 16, 2)):
        columns = min(columns, width)
        copies = min(LANES * warps * at_once // (columns * max(loads, least)), _power(copies_per_row))
        found.append(Tiles(copies, columns, warps))
    return list(dict.fromkeys(found))


def sums_tiles(table_LD: Tensor) -> list[Tiles]:
    """What is tried, what is likely best first."""
    columns = min(MAX_COLUMNS, _power(table_LD.shape[1]))
    warps = max(1, columns * table_LD.itemsize // (LANES * LANE_BYTES))
    return [Tiles(copies, columns, warps) for copies in (8, 4, 16)]


def _power(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


@triton.jit
def _activated(z, RELU: tl.constexpr):
    """The activation of z and its slope; gelu is the exact one."""
    if RELU:
        return tl.where(z < 0, 0.0, z), tl.where(z > 0, 1.0, 0.0)
    half = 0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476))
    return z * half, half + z * tl.exp(-0.5 * z * z) * 0.3989422804014327


@triton.jit
def products_kernel(
    rows, table, entry, ends, gates, hidden, products, gated, hidden_gradient,
    D: tl.constexpr, RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """found = row . table[entry] of each copy of a row.

    Without gates: products = found. With gates, forward: products = found = z, gated = gate * act(z). With gates and hidden = z,
    backward: found is the gradient of gate * act(z), products = act(z) * found is the gate's, hidden_gradient = gate * act'(z) * found is
    z's, and gated = gate * act(z) is made again.
    """
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(ends + row - 1, mask=row > 0, other=0)
    end = tl.load(ends + row)
    for first in range(start, end, BLOCK_C):
        copies = first + tl.arange(0, BLOCK_C)
        inside = copies < end
        read = tl.load(entry + copies, mask=inside, other=0).to(tl.int64)  # L * D may exceed 2**31
        found = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        for first_d in range(0, D, BLOCK_D):
            d = first_d + tl.arange(0, BLOCK_D)
            x = tl.load(rows + row * D + d, mask=d < D, other=0.0).to(tl.float32)
            of_table = table + read[:, None] * D + d[None, :]
            values = tl.load(of_table, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            found += values * x[None, :]
        found = tl.sum(found, 1)
        if gates is None:
            tl.store(products + copies, found, mask=inside)
        else:
            gate = tl.load(gates + copies, mask=inside, other=0.0)
            z = found
            if hidden is not None:
                z = tl.load(hidden + copies, mask=inside, other=0.0)
            active, slope = _activated(z, RELU)
            tl.store(gated + copies, gate * active, mask=inside)
            if hidden is None:
                tl.store(products + copies, z, mask=inside)
            else:
                tl.store(products + copies, active * found, mask=inside)
                tl.store(hidden_gradient + copies, gate * slope * found, mask=inside)


@triton.jit
def sums_kernel(
    table, weights, entry, ends, sums, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """sums[row] = the sum over the copies of a row of weight * table[entry]; zeros for a row without copies."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(ends + row - 1, mask=row > 0, other=0)
    end = tl.load(ends + row)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(start, end, BLOCK_C):
        copies = first + tl.arange(0, BLOCK_C)
        inside = copies < end
        weight = tl.load(weights + copies, mask=inside, other=0.0)
        read = tl.load(entry + copies, mask=inside, other=0).to(tl.int64)
        of_table = table + read[:, None] * D + d[None, :]
        values = tl.load(of_table, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(weight[:, None] * values, 0)
    tl.store(sums + row * D + d, total.to(sums.dtype.element_ty), mask=d < D)


@dataclass(frozen=True)
class Activation:
    """gates_C float32; relu, else gelu; hidden_C: z, in the backward pass."""

    gates_C: Tensor
    relu: bool
    hidden_C: Tensor | None = None


@dataclass(frozen=True)
class Products:
    """products_C: row . table[entry], or in a backward pass the gates' gradient. gated_C: gate * act(z). hidden_C: z's gradient."""

    products_C: Tensor
    gated_C: Tensor | None = None
    hidden_C: Tensor | None = None


def products(
    rows_RD: Tensor, table_LD: Tensor, entry_C: Tensor, ends_R: Tensor, activation: Activation | None = None, *,
    tiles: Tiles | None = None,
) -> Products:  # fmt: skip
    """Of each copy, float32; see products_kernel. ends_R: the end of each row's range of copies. All tensors contiguous."""
    num_rows, width = rows_RD.shape
    gates_C = hidden_C = None
    if activation is not None:
        gates_C, hidden_C = activation.gates_C, activation.hidden_C
    found = Products(
        _numbers(entry_C),
        gated_C=None if gates_C is None else _numbers(entry_C),
        hidden_C=None if hidden_C is None else _numbers(entry_C),
    )

    def launch(tiles: Tiles) -> None:
        products_kernel[(num_rows,)](
            rows_RD, table_LD, entry_C, ends_R, gates_C, hidden_C, found.products_C, found.gated_C, found.hidden_C, width,
            activation is not None and activation.relu, tiles.copies, tiles.columns, num_warps=tiles.warps,
        )  # fmt: skip

    if num_rows and len(entry_C):
        configs = products_tiles(table_LD, -(-len(entry_C) // num_rows))
        launch(tiles or _fastest("products", configs, launch, table_LD, entry_C, rows_RD.dtype, num_rows))
    return found


def weighted_sums(
    table_LD: Tensor, weights_C: Tensor, entry_C: Tensor, ends_R: Tensor, *, dtype: torch.dtype, tiles: Tiles | None = None
) -> Tensor:  # fmt: skip
    """sums_RD in `dtype`: of each row the sum of weight * table[entry] over its copies, in float32, rounded once."""
    num_rows, width = len(ends_R), table_LD.shape[1]
    sums_RD = table_LD.new_empty(num_rows, width, dtype=dtype)

    def launch(tiles: Tiles) -> None:
        sums_kernel[num_rows, triton.cdiv(width, tiles.columns)](
            table_LD, weights_C, entry_C, ends_R, sums_RD, width, tiles.copies, tiles.columns, num_warps=tiles.warps
        )

    if num_rows:
        launch(tiles or _fastest("sums", sums_tiles(table_LD), launch, table_LD, entry_C, dtype, num_rows))
    return sums_RD


def _numbers(entry_C: Tensor) -> Tensor:
    return torch.empty(entry_C.shape, dtype=torch.float32, device=entry_C.device)


def _fastest(
    name: str, tiles: list[Tiles], launch: Callable[[Tiles], object], table_LD: Tensor, entry_C: Tensor, dtype: torch.dtype,
    num_rows: int,
) -> Tiles:  # fmt: skip
    of_table = (min(len(table_LD), LARGE_TABLE), table_LD.shape[1])
    key = (f"table {name}", rounded(len(entry_C)), rounded(num_rows), of_table, table_LD.dtype, dtype)
    return fastest(tiles, launch, key=key, device=table_LD.device)
