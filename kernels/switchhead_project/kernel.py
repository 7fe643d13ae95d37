"""switchhead_project on a GPU: the two Triton kernels and the functions that launch them.

Owns: the kernels, their tiles, their launches. Does not own: autograd and the gradient of the weights (op.py), checks (the public
functions), the bytes that decided the design (traffic.py).
Called by: kernels/switchhead_project/op.py and forms.py.

`values_kernel` projects the model width to each head's (D -> C). A program owns a tile of tokens, a head and a tile of its columns,
multiplies by every expert of the head, and adds what a token chose. Programs of one tile of tokens run side by side, so that x comes
from the L2 cache after its first time. `outputs_kernel` projects the heads back (C -> D). A program owns a tile of tokens and of
columns; its one sum runs over heads, experts and C. The backward pass of each is the other one with transposed weights.
Nothing is written per copy, every result has one owner, and a token meets an expert that it did not choose with a gate of 0. In
`outputs_kernel` that 0 is multiplied: a weight that is not finite reaches every token, in O and in the gradient of V's x, and a row that
is not finite gives its own token NaN. `values_kernel` drops the product: there a weight reaches only those who chose it.

Letters, here only: T tokens, H heads, E experts of a head, K choices, C width of a head, D model width. Tensors are contiguous but
for the weights. All widths are constants of a compilation, so that D 412 is loaded 8 bytes at a time and not 2.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false
# A launch passes numbers where a kernel declares tl.constexpr, and options of the compiler that it does not declare.

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.grouped_matmul.kernel import precision
from kernels.tuning import fastest, rounded

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Tiles:
    """Tokens by columns of the result in one program, `depth` of the summed width at a time."""

    tokens: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


FP32_TILES = [Tiles(64, 64, 32, 8, 3), Tiles(32, 64, 32, 4, 3)]


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # its product of bf16 is wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _choices(t, inside, head, H: tl.constexpr, K: tl.constexpr, K_POWER: tl.constexpr):
    """Where a tile's tokens have their choices of a head (BLOCK_T, K_POWER), and which of them exist."""
    k = tl.arange(0, K_POWER)
    return (t[:, None] * H + head) * K + k[None, :], inside[:, None] & (k < K)[None, :]


@triton.jit(do_not_specialize=["T"])
def values_kernel(
    x, weights, gates, experts, other, values, dots, T,
    H: tl.constexpr, E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_C: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, K_POWER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """values[t,h] = sum_k gate * (x[t] @ W[expert]); dots[t,h,k] = (x[t] @ W[expert]) . other[t,h]. Either may be None."""
    column_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    column_tile = tl.program_id(0) % column_tiles
    head = (tl.program_id(0) // column_tiles) % H
    base = (tl.program_id(0) // (column_tiles * H)).to(tl.int64) * BLOCK_T
    t = tl.arange(0, BLOCK_T)
    inside = t < T - base
    c = column_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    stored = inside[:, None] & (c < C)[None, :]
    place = (t[:, None] * H + head) * C + c[None, :]
    d = tl.arange(0, BLOCK_D)
    x += base * D
    experts += base * (H * K)
    gates += base * (H * K)
    at_k, exists = _choices(t, inside, head, H, K, K_POWER)
    ids = tl.load(experts + at_k, mask=exists, other=-1).to(tl.int32)
    found = tl.zeros((BLOCK_T, K_POWER), tl.float32)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    # Two loops. With tl.range(flatten=True) the next expert's loads would start before this one's sum ends, but in the code that Triton
    # 3.7.1 makes of it for sm_90 `product` is reset by a select that waits for all but the last wgmma.
    for e in range(E):
        matrix = weights + tl.cast(head * E + e, tl.int64) * (D * C)
        product = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for first in range(0, D, BLOCK_D):
            more = (first + d) < D
            a = tl.load(x + first + (t[:, None] * D + d[None, :]), mask=inside[:, None] & more[None, :], other=0.0)
            at = d[:, None] * STRIDE_D + c[None, :] * STRIDE_C
            b = tl.load(matrix + first * STRIDE_D + at, mask=more[:, None] & (c < C)[None, :], other=0.0)
            product = _dot(a, b, product, PRECISION)
        if values is not None:
            gate_TK = tl.load(gates + at_k, mask=exists, other=0.0)
            gate = tl.sum(tl.where(ids == e, gate_TK, 0.0), 1)
            chosen = tl.max((ids == e).to(tl.int32), 1) > 0
            # not 0 * product: another expert's NaN is none of this token's
            total += tl.where(chosen[:, None], product * gate[:, None], 0.0)
        if dots is not None:
            against = tl.load(other + base * (H * C) + place, mask=stored, other=0.0).to(tl.float32)
            dot = tl.sum(tl.where(stored, product * against, 0.0), 1)
            found = tl.where(ids == e, dot[:, None], found)
    if values is not None:
        tl.store(values + base * (H * C) + place, total.to(values.dtype.element_ty), mask=stored)
    if dots is not None:
        dots += (column_tile.to(tl.int64) * T + base) * (H * K)
        tl.store(dots + at_k, found, mask=exists)


@triton.jit(do_not_specialize=["T"])
def outputs_kernel(
    y, weights, gates, experts, outputs, T,
    H: tl.constexpr, E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_C: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, K_POWER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """outputs[t] = sum_h,k round(gate * y[t,h]) @ W[expert]."""
    column_tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    d = (tl.program_id(0) % column_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    base = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_T
    t = tl.arange(0, BLOCK_T)
    inside = t < T - base
    block_c = tl.arange(0, BLOCK_C)
    y += base * (H * C)
    experts += base * (H * K)
    gates += base * (H * K)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    # One loop and not three: loads are started early, also across heads and experts. With y held over the experts of a head, a tile of
    # 128 x 128, 128 deep, spilled 96 bytes per thread on sm_90 and 1,536 on sm_80 (D 412, C 76).
    for step in range(H * E * blocks):
        head, e, first = step // (E * blocks), step % E, step // E % blocks * BLOCK_C
        c = first + block_c
        at = t[:, None] * (H * C) + block_c[None, :]
        row = tl.load(y + head * C + first + at, mask=inside[:, None] & (c < C)[None, :], other=0.0)
        matrix = weights + tl.cast(head * E + e, tl.int64) * (D * C) + first * STRIDE_C
        at_b = block_c[:, None] * STRIDE_C + d[None, :] * STRIDE_D
        b = tl.load(matrix + at_b, mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
        at_k, exists = _choices(t, inside, head, H, K, K_POWER)
        ids = tl.load(experts + at_k, mask=exists, other=-1).to(tl.int32)
        gate_TK = tl.load(gates + at_k, mask=exists, other=0.0)
        gate = tl.sum(tl.where(ids == e, gate_TK, 0.0), 1)
        gated = (row.to(tl.float32) * gate[:, None]).to(row.dtype)
        total = _dot(gated, b, total, PRECISION)
    stored = inside[:, None] & (d < D)[None, :]
    place = t[:, None] * D + d[None, :]
    tl.store(outputs + base * D + place, total.to(outputs.dtype.element_ty), mask=stored)


@dataclass(frozen=True)
class Projection:
    """Weights (G, D, C) of values or (G, C, D) of outputs, and what each (token, head) chose. All contiguous, G = H * E."""

    weights: Tensor
    gates_THK: Tensor
    experts_THK: Tensor
    to_heads: bool  # values: the weights are (G, D, C)

    @property
    def widths(self) -> tuple[int, int]:
        """D and C."""
        first, second = self.weights.shape[1:]
        return (first, second) if self.to_heads else (second, first)

    def constants(self) -> dict[str, int | str]:
        """What both kernels are compiled for."""
        (d_model, head_dim), (_, heads, choices) = self.widths, self.gates_THK.shape
        stride_d, stride_c = (head_dim, 1) if self.to_heads else (1, d_model)
        return {
            "H": heads, "E": len(self.weights) // heads, "K": choices, "D": d_model, "C": head_dim,
            "STRIDE_D": stride_d, "STRIDE_C": stride_c, "K_POWER": triton.next_power_of_2(choices), "PRECISION": precision(),
        }  # fmt: skip

    def fastest(self, name: str, tiles: list[Tiles], launch: Callable[[Tiles], object]) -> Tiles:
        sizes = (rounded(len(self.gates_THK)), *self.gates_THK.shape[1:], tuple(self.weights.shape), self.to_heads)
        key = (f"switchhead_project {name}", *sizes, self.weights.dtype)
        return fastest(tiles, launch, key=key, device=self.weights.device)


def launch_values(
    x_TD: Tensor, projection: Projection, *, values: bool = True, other_THC: Tensor | None = None, tiles: Tiles | None = None
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """From the model width to the heads'. Both results may be left out, not both at once.

    values: (T, H, C), sum_k gate[t,h,k] * (x[t] @ W[h,expert]), W transposed where the projection is one of outputs.
    dots, with other: (T, H, K) float32, (x[t] @ W[h,expert]) . other[t,h]: the gradient of a gate.
    """
    (T, H, K), C = projection.gates_THK.shape, projection.widths[1]
    values_THC = x_TD.new_empty(T, H, C) if values else None

    def launch(tiles: Tiles) -> Tensor | None:
        columns = triton.cdiv(C, tiles.columns)
        dots_XTHK = None if other_THC is None else projection.gates_THK.new_empty(columns, T, H, K)
        values_kernel[(triton.cdiv(T, tiles.tokens) * H * columns,)](
            x_TD, projection.weights, projection.gates_THK, projection.experts_THK, other_THC, values_THC, dots_XTHK, T,
            **projection.constants(), BLOCK_T=tiles.tokens, BLOCK_C=tiles.columns, BLOCK_D=tiles.depth,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
        if dots_XTHK is None:
            return None
        return dots_XTHK[0] if columns == 1 else dots_XTHK.sum(0)

    if T == 0:
        return values_THC, None if other_THC is None else torch.empty_like(projection.gates_THK)
    name = f"values {values} {other_THC is not None}"
    choices = values_tiles(x_TD.dtype, head_dim=C)
    return values_THC, launch(tiles or projection.fastest(name, choices, launch))


def launch_outputs(y_THC: Tensor, projection: Projection, *, tiles: Tiles | None = None) -> Tensor:
    """(T, D), from the heads to the model width: sum_h,k round(gate[t,h,k] * y[t,h]) @ W[h,expert], W transposed for values."""
    T, D = len(y_THC), projection.widths[0]
    outputs_TD = y_THC.new_empty(T, D)

    def launch(tiles: Tiles) -> None:
        outputs_kernel[(triton.cdiv(T, tiles.tokens) * triton.cdiv(D, tiles.columns),)](
            y_THC, projection.weights, projection.gates_THK, projection.experts_THK, outputs_TD, T,
            **projection.constants(), BLOCK_T=tiles.tokens, BLOCK_D=tiles.columns, BLOCK_C=tiles.depth,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip

    if T:
        launch(tiles or projection.fastest("outputs", outputs_tiles(y_THC.dtype), launch))
    return outputs_TD


def values_tiles(dtype: torch.dtype, *, head_dim: int) -> list[Tiles]:
    """What is tried for `values_kernel`, what is likely best first.

    Blocks of C: the widest that adds less than 70 % (C 76: 128), and the widest that adds least (C 76: 32, three times).
    """
    if dtype == torch.float32:
        return FP32_TILES
    widths = (128, 64, 32)
    padded = {width: -(-head_dim // width) * width for width in widths}
    wide = next((width for width in widths if padded[width] < 1.7 * head_dim), widths[-1])
    least = min(widths, key=lambda width: padded[width])
    found = dict.fromkeys((wide, least))
    return [Tiles(tokens, width, 64, tokens // 16, 3) for width in found for tokens in (128, 64)]


def outputs_tiles(dtype: torch.dtype) -> list[Tiles]:
    """What is tried for `outputs_kernel`, what is likely best first. 32 at a time: C 76 is multiplied as 96 and not as 128."""
    if dtype == torch.float32:
        return FP32_TILES
    return [Tiles(128, 128, 64, 8, 3), Tiles(128, 128, 32, 8, 4), Tiles(64, 128, 32, 4, 4)]
