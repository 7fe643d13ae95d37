"""What the grouped kernels share in Triton: which tile comes when, which row a copy reads, how exact a product is.

Owns: that. Does not own: how many programs and which order (schedule.py), the kernels.
Called by: kernels/grouped_matmul/{kernel,weight_gradient}.py, kernels/expert_mlp/kernel.py.

A tile never spans two groups. A launch has a few programs for each multiprocessor, and each walks over its tiles,
`for tile in range(program, count_tiles(...), num_programs)`. How many there are is counted on the device.

Order: a group's copies ascend by row, so tile j of the t tiles of a group stands at (j + 1/2) / t of the way through the rows. With
bits = b the tiles come by that place, in 2**b steps, and by group within a step: with equal groups tile j of every group, then
tile j + 1. Rows that several groups read are then read at about one time, also where groups are unequal; there "tile j of
every group" would let the small groups run ahead. kernels/expert_mlp/traffic.py has the bytes. With b = 0 one group follows the other.
"""

# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# It reads a kernel as a Python function of tl.constexpr objects.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)  # there a dot of bfloat16 is silently wrong


@dataclass(frozen=True)
class Tiles:
    """rows x columns of the result in one tile, `depth` of the summed width at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Rows:
    """Rows that copies read: copy c reads row index[c], or row c without an index."""

    values: Tensor
    index_C: Tensor | None

    @property
    def num_copies(self) -> int:
        return len(self.values) if self.index_C is None else len(self.index_C)


def dense_rows(values: Tensor) -> Tensor:
    """The same, copied if the numbers of a row do not lie side by side: vectors of them are loaded."""
    return values if values.stride(1) == 1 or values.shape[1] == 1 else values.contiguous()


def row_stride(values: Tensor) -> int:
    """Numbers from one row to the next. torch gives any number for a single row; a constant of a compilation should not vary so."""
    return values.stride(0) if len(values) > 1 else values.shape[1]


def precision() -> str:
    """What a dot of float32 may do: TF32 only where torch's own switch allows it."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


@triton.jit
def _groups(offsets_ptr, G, BLOCK, G_POWER: tl.constexpr):
    """Start, end and number of tiles of each group; 0 tiles for those from G on."""
    groups = tl.arange(0, G_POWER)
    ends = tl.load(offsets_ptr + groups, mask=groups < G, other=0)
    starts = tl.load(offsets_ptr + groups - 1, mask=(groups > 0) & (groups < G), other=0)
    return starts, ends, tl.where(groups < G, tl.cdiv(ends - starts, BLOCK), 0)


@triton.jit
def count_tiles(offsets_ptr, G, BLOCK, G_POWER: tl.constexpr):
    _, _, tiles = _groups(offsets_ptr, G, BLOCK, G_POWER)
    return tl.sum(tiles, axis=0)


@triton.jit
def _tiles_before(tiles, step, bits):
    """Of each group: floor(step * tiles / 2**bits + 1/2)."""
    half = (tl.full([], 1, tl.int64) << bits) >> 1
    return ((tiles.to(tl.int64) * step + half) >> bits).to(tl.int32)


@triton.jit
def tile_of(tile, offsets_ptr, G, BLOCK, G_POWER: tl.constexpr, bits=0):
    """group, first copy and end of the group for the tile-th tile in the order of `bits`; first >= end beyond the last tile."""
    starts, ends, tiles = _groups(offsets_ptr, G, BLOCK, G_POWER)
    step = tile * 0
    for bit in range(bits):  # the last step with at most `tile` tiles before it, from its highest bit down
        later = step + (tl.full([], 1, tl.int32) << (bits - 1 - bit))
        step = tl.where(tl.sum(_tiles_before(tiles, later, bits), axis=0) <= tile, later, step)
    earlier_steps = _tiles_before(tiles, step, bits)
    in_step = _tiles_before(tiles, step + 1, bits) - earlier_steps
    place = tile - tl.sum(earlier_steps, axis=0)
    group = tl.sum((tl.cumsum(in_step, axis=0) <= place).to(tl.int32), axis=0)
    groups = tl.arange(0, G_POWER)
    place += tl.sum(tl.where(groups == group, earlier_steps, 0) - tl.where(groups < group, in_step, 0), axis=0)
    start = tl.sum(tl.where(groups == group, starts, 0), axis=0)
    end = tl.sum(tl.where(groups == group, ends, 0), axis=0)
    return group, start + place * BLOCK, end


@triton.jit
def indexed(index_ptr, c, inside):
    """The row that each copy reads, as 64-bit numbers: rows times width may exceed 2**31."""
    row = c
    if index_ptr is not None:
        row = tl.load(index_ptr + c, mask=inside, other=0)
    return row.to(tl.int64)
