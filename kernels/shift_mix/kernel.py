"""shift_mix on a GPU: the Triton kernels and the functions that launch them.

Owns: the kernels, their blocks, the launches of the forward pass, the backward pass and a decoding step. Does not own: autograd (op.py),
checks (the public functions), the bytes (traffic.py).
Called by: kernels/shift_mix/op.py and forms.py.

A program has a block of positions of one row and a block of channels. Forward it reads the block and the one `shift` positions before,
which another program has just read, from the L2 cache. Backward it makes w, the anti-causal shift of the output's gradient, from that
gradient alone; then the gradient of u is a * gradient + b * w, and the sums for a and b are those of gradient * u and of w * u over the
block's own positions, because the shift's transpose may stand on either side. So nothing but u is saved. The sums go to memory by block
and channel, 2 * 4 bytes for BLOCK_S numbers of u, and are added in order. With the boundary "clamp" a document's first token has the
gradients of `shift` positions: a program whose block begins a document, the first of every row is one, adds them up by as many steps one
after the other, a read each. So with shifts of a thousand the backward pass is as long as such a program.

Slices of the width with shifts of their own are launched one by one, the shift being an argument and not a constant: a model has one
for each layer. Letters, here only: B rows, S positions, D channels of u, W channels of the slice, `part` channels that share a factor.
Tensors are contiguous, but the input of a step.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false
# A launch passes numbers where a kernel declares tl.constexpr, and options of the compiler that it does not declare.

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_S, BLOCK_D, NUM_WARPS = 32, 128, 8  # 32: 4 % more bytes backward for the sums, in bf16
STEP_BLOCK = 256
UNSPECIALIZED = ["S", "shift", "number"]  # a layer's shift, a row's length and a slice compile nothing new


@triton.jit
def _place(S, number, D: tl.constexpr, W: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """The program's row as its first position, its positions in the row, its channels, and which of both exist.

    The slice begins at a multiple of the constant W, so the compiler knows how channels are aligned: in bf16 8 in one load, where it
    knows nothing of the first channel 1.
    """
    column_blocks: tl.constexpr = (W + BLOCK_D - 1) // BLOCK_D
    block = tl.program_id(0) // column_blocks
    row_blocks = tl.cdiv(S, BLOCK_S)
    base = (block // row_blocks).to(tl.int64) * S
    t = (block % row_blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    in_slice = (tl.program_id(0) % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    return base, t, number * W + in_slice, t < S, in_slice < W, block


@triton.jit
def _begin(first, base, t, inside):
    """Where the document of each position begins in its row: at 0 where there are no documents."""
    begin = t * 0
    if first is not None:
        begin = tl.load(first + base + t, mask=inside, other=0)
    return begin


@triton.jit(do_not_specialize=UNSPECIALIZED)
def mix_kernel(
    u, a, b, first, y, S, shift, number,
    D: tl.constexpr, W: tl.constexpr, PART: tl.constexpr, BOUNDARY: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    base, t, d, in_row, in_slice, _ = _place(S, number, D, W, BLOCK_S, BLOCK_D)
    begin = _begin(first, base, t, in_row)
    inside = in_row[:, None] & in_slice[None, :]
    own = tl.load(u + (base + t)[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    source = t - shift
    has = source >= begin
    if BOUNDARY == "clamp":
        source = tl.maximum(source, begin)
        has = in_row
    earlier = tl.load(u + (base + source)[:, None] * D + d[None, :], mask=inside & has[:, None], other=0.0)
    earlier = earlier.to(tl.float32)
    if BOUNDARY == "self":
        earlier = tl.where(has[:, None], earlier, own)
    of_own = tl.load(a + d // PART, mask=in_slice, other=0.0)
    of_earlier = tl.load(b + d // PART, mask=in_slice, other=0.0)
    mixed = of_own[None, :] * own + of_earlier[None, :] * earlier
    tl.store(y + (base + t)[:, None] * D + d[None, :], mixed.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_kernel(
    gradient, u, a, b, first, of_u, sums, S, shift, number,
    D: tl.constexpr, W: tl.constexpr, PART: tl.constexpr, BOUNDARY: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """of_u, and for each block of positions the sums (2, D) for a and b. Either may be None."""
    base, t, d, in_row, in_slice, block = _place(S, number, D, W, BLOCK_S, BLOCK_D)
    begin = _begin(first, base, t, in_row)
    inside = in_row[:, None] & in_slice[None, :]
    at = (base + t)[:, None] * D + d[None, :]
    own = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    later = t + shift
    hears = (later < S) & (_begin(first, base, later, later < S) <= t)
    w = tl.load(gradient + (base + later)[:, None] * D + d[None, :], mask=hears[:, None] & in_slice[None, :], other=0.0)
    w = w.to(tl.float32)
    if BOUNDARY == "self":
        w += tl.where((t - shift >= begin)[:, None], 0.0, own)
    if BOUNDARY == "clamp":  # a document's first token stands for what is before it, at `shift` positions
        begins = in_row & (begin == t)
        steps = tl.where(tl.max(begins.to(tl.int32), 0) > 0, shift, 0)
        for step in range(steps):
            here = begins & (t + step < S)
            here &= _begin(first, base, t + step, here) == t
            more = tl.load(
                gradient + at + tl.cast(step, tl.int64) * D, mask=here[:, None] & in_slice[None, :], other=0.0
            )
            w += more.to(tl.float32)
    if of_u is not None:
        of_own = tl.load(a + d // PART, mask=in_slice, other=0.0)
        of_earlier = tl.load(b + d // PART, mask=in_slice, other=0.0)
        mixed = of_own[None, :] * own + of_earlier[None, :] * w
        tl.store(of_u + at, mixed.to(of_u.dtype.element_ty), mask=inside)
    if sums is not None:
        token = tl.load(u + at, mask=inside, other=0.0).to(tl.float32)
        sums += block.to(tl.int64) * (2 * D)
        tl.store(sums + d, tl.sum(own * token, 0), mask=in_slice)
        tl.store(sums + D + d, tl.sum(w * token, 0), mask=in_slice)


@triton.jit(do_not_specialize=["place", "source"])
def step_kernel(
    u, a, b, ring, y, place, source, stride,
    R: tl.constexpr, W: tl.constexpr, PART: tl.constexpr, ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token of each row. source: the place of the earlier token, or -1: zeros, or the token itself."""
    column_blocks: tl.constexpr = (W + BLOCK - 1) // BLOCK
    d = (tl.program_id(0) % column_blocks) * BLOCK + tl.arange(0, BLOCK)
    row = (tl.program_id(0) // column_blocks).to(tl.int64)
    inside = d < W
    token = tl.load(u + row * stride + d, mask=inside, other=0.0)
    own = token.to(tl.float32)
    earlier = tl.load(ring + (row * R + source) * W + d, mask=inside & (source >= 0), other=0.0).to(tl.float32)
    if not ZERO:
        earlier = tl.where(source >= 0, earlier, own)
    of_own = tl.load(a + d // PART, mask=inside, other=0.0)
    of_earlier = tl.load(b + d // PART, mask=inside, other=0.0)
    tl.store(y + row * W + d, (of_own * own + of_earlier * earlier).to(y.dtype.element_ty), mask=inside)
    tl.store(ring + (row * R + place) * W + d, token, mask=inside)


def launch_mix(
    u_BSD: Tensor, a_X: Tensor, b_X: Tensor, first_BS: Tensor | None, *, shifts: list[int], boundary: str
) -> Tensor:
    """(B, S, D) in the dtype of u. first_BS: int32, where the document of each position begins in its row."""
    y_BSD = torch.empty_like(u_BSD)
    for grid, arguments in _launches(u_BSD, a_X, shifts=shifts, boundary=boundary):
        mix_kernel[grid](u_BSD, a_X, b_X, first_BS, y_BSD, **arguments)
    return y_BSD


def launch_backward(
    gradient_BSD: Tensor, u_BSD: Tensor, a_X: Tensor, b_X: Tensor, first_BS: Tensor | None, *, shifts: list[int],
    boundary: str, of_u: bool, of_factors: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The gradient of u, and those of a and b as one tensor (2, X) of float32; of what is not asked for None."""
    (batch, length, width), num_factors = u_BSD.shape, len(a_X)
    of_u_BSD = torch.empty_like(u_BSD) if of_u else None
    blocks = batch * triton.cdiv(length, BLOCK_S)
    sums_P2D = u_BSD.new_empty(blocks, 2, width, dtype=torch.float32) if of_factors else None
    for grid, arguments in _launches(u_BSD, a_X, shifts=shifts, boundary=boundary):
        backward_kernel[grid](gradient_BSD, u_BSD, a_X, b_X, first_BS, of_u_BSD, sums_P2D, **arguments)
    if sums_P2D is None:
        return of_u_BSD, None
    return of_u_BSD, sums_P2D.sum(0).view(2, num_factors, -1).sum(2)


def launch_step(
    u_BW: Tensor, ring_BRW: Tensor, a_X: Tensor, b_X: Tensor, *, place: int, source: int, boundary: str
) -> Tensor:
    """(B, W); the token is written to the ring at `place`, after the one at `source` was read."""
    (batch, size, width), y_BW = ring_BRW.shape, u_BW.new_empty(u_BW.shape)
    if y_BW.numel():
        step_kernel[(batch * triton.cdiv(width, STEP_BLOCK),)](
            u_BW, a_X, b_X, ring_BRW, y_BW, place, source, u_BW.stride(0), R=size, W=width, PART=width // len(a_X),
            ZERO=boundary == "zero", BLOCK=STEP_BLOCK,
        )  # fmt: skip
    return y_BW


def _launches(u_BSD: Tensor, a_X: Tensor, *, shifts: list[int], boundary: str) -> list[tuple[tuple[int], dict]]:
    """Of each slice the grid, and the arguments that forward and backward share. A shift beyond the row is one of its length."""
    batch, length, width = u_BSD.shape
    slice_width = width // len(shifts)
    blocks = batch * triton.cdiv(length, BLOCK_S) * triton.cdiv(slice_width, BLOCK_D)
    sizes = {
        "D": width,
        "W": slice_width,
        "PART": width // len(a_X),
        "BLOCK_S": BLOCK_S,
        "BLOCK_D": BLOCK_D,
        "num_warps": NUM_WARPS,
    }
    return [
        (
            (blocks,),
            {"S": length, "shift": min(shift, length), "number": number, "BOUNDARY": boundary} | sizes,
        )
        for number, shift in enumerate(shifts)
        if blocks
    ]
