"""shift_mix by torch alone, in blocks of positions that stay in the cache: the backend "torch", of any device.

Owns: that path. Does not own: checks (the public functions). Called by: kernels/shift_mix.

Letters: B rows, S positions, D channels of u, X factors, W channels of a slice, s positions of a block, h the first of them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**40}  # of u, in one block; 2**18: docs/log.md


def mix(
    u_BSD: Tensor, a_X: Tensor, b_X: Tensor, first_BS: Tensor | None, *, shifts: tuple[int, ...], boundary: str
) -> Tensor:
    """(B, S, D): see the public function. first_BS: where the document of each position begins in its row."""
    return _Mix.apply(u_BSD, a_X, b_X, first_BS, shifts, boundary)


def step(u_BW: Tensor, ring_BRW: Tensor, a_X: Tensor, b_X: Tensor, *, place: int, source: int, boundary: str) -> Tensor:
    """(B, W): see kernel.launch_step."""
    a_W, b_W = (_per_channel(each, u_BW) for each in (a_X, b_X))
    y_BW = a_W * u_BW
    if source >= 0 or boundary != "zero":
        y_BW = y_BW.addcmul(b_W, u_BW if source < 0 else ring_BRW[:, source])
    ring_BRW[:, place] = u_BW.detach()
    return y_BW.to(u_BW.dtype)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u_BSD: Tensor,
        a_X: Tensor,
        b_X: Tensor,
        first_BS: Tensor | None,
        shifts: tuple[int, ...],
        boundary: str,
    ) -> Tensor:
        ctx.save_for_backward(u_BSD, a_X, b_X, first_BS)
        ctx.shifts, ctx.boundary = shifts, boundary
        y_BSD = torch.empty_like(u_BSD)
        for row, part, shift, start, end in _blocks(u_BSD, shifts):
            u_SW = u_BSD[row, :, part]
            a_W, b_W = (_per_channel(each, u_BSD)[part] for each in (a_X, b_X))
            mixed_sW = u_SW[start:end] * a_W  # in the factors' dtype
            first_s = None if first_BS is None else first_BS[row, start:end]
            earlier_sW, at = _earlier(u_SW, first_s, shift, start, end, boundary=boundary)
            mixed_sW[at:].addcmul_(earlier_sW, b_W)
            y_BSD[row, start:end, part] = mixed_sW
        return y_BSD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_BSD: Tensor) -> tuple[Tensor | None, ...]:
        u_BSD, a_X, b_X, first_BS = ctx.saved_tensors
        gradient_BSD = gradient_BSD.contiguous()  # torch adds up other strides in another order
        of_u, of_a, of_b = ctx.needs_input_grad[:3]
        of_u_BSD = torch.empty_like(u_BSD) if of_u else None
        sums_2D = torch.zeros(2, u_BSD.shape[2], dtype=_wide(a_X, u_BSD), device=u_BSD.device)
        for row, part, shift, start, end in _blocks(u_BSD, ctx.shifts):
            gradient_SW = gradient_BSD[row, :, part]
            own_sW, token_sW = gradient_SW[start:end], u_BSD[row, start:end, part].to(sums_2D.dtype)
            first_S = None if first_BS is None else first_BS[row]
            w_hW = _later(gradient_SW, first_S, shift, start, end, boundary=ctx.boundary, dtype=sums_2D.dtype)
            if of_a or of_b:
                sums_2D[0, part] += (own_sW * token_sW).sum(0)
                sums_2D[1, part] += (w_hW * token_sW[: len(w_hW)]).sum(0)
            if of_u_BSD is not None:
                a_W, b_W = (_per_channel(each, u_BSD)[part] for each in (a_X, b_X))
                mixed_sW = own_sW * a_W
                mixed_sW[: len(w_hW)].addcmul_(w_hW, b_W)
                of_u_BSD[row, start:end, part] = mixed_sW
        sums_2X = sums_2D.view(2, len(a_X), -1).sum(2).to(a_X.dtype)
        return of_u_BSD, sums_2X[0] if of_a else None, sums_2X[1] if of_b else None, None, None, None


def _blocks(u_BSD: Tensor, shifts: tuple[int, ...]) -> Iterator[tuple[int, slice, int, int, int]]:
    """Row, channels, shift, first position and end of each block."""
    batch, length, width = u_BSD.shape
    slice_width = width // len(shifts)
    size = max(1, CHUNK_ELEMENTS.get(u_BSD.device.type, 2**40) // slice_width)
    for row in range(batch):
        for start in range(0, length, size):
            for number, shift in enumerate(shifts):
                channels = slice(number * slice_width, (number + 1) * slice_width)
                yield row, channels, shift, start, min(start + size, length)


def _earlier(
    u_SW: Tensor, first_s: Tensor | None, shift: int, start: int, end: int, *, boundary: str
) -> tuple[Tensor, int]:
    """The shifted tokens of a block's positions from its at-th on; before that they are zeros."""
    at = min(max(0, shift - start), end - start)  # the first position whose token is in the row
    shifted_sW = u_SW[start + at - shift : end - shift]
    if first_s is None and (boundary == "zero" or at == 0):
        return shifted_sW, at
    position_s = torch.arange(start, end, device=u_SW.device)
    source_s = position_s - shift
    begin_s = torch.zeros_like(source_s) if first_s is None else first_s
    outside_s = source_s < begin_s
    if boundary == "zero":
        outside_s = outside_s[at:]
        return shifted_sW.masked_fill(outside_s[:, None], 0.0) if outside_s.any() else shifted_sW, at
    if not outside_s.any():
        return shifted_sW, at
    stand_in_s = position_s if boundary == "self" else begin_s
    return u_SW.index_select(0, torch.where(outside_s, stand_in_s, source_s)), 0


def _later(
    gradient_SW: Tensor, first_S: Tensor | None, shift: int, start: int, end: int, *, boundary: str, dtype: torch.dtype
) -> Tensor:
    """w of a block: for each position the sum of the gradients of those that have been handed its token; of the first positions alone
    where those behind have none.
    """
    length = len(gradient_SW)
    heard = max(0, min(end, length - shift) - start)
    w_hW = gradient_SW[start + shift : start + shift + heard]
    position_s = torch.arange(start, end, device=w_hW.device)
    if first_S is None:
        first_S = torch.zeros(length, dtype=torch.int64, device=w_hW.device)
    foreign_h = first_S[start + shift : start + shift + heard] > position_s[:heard]
    if foreign_h.any():
        w_hW = w_hW.masked_fill(foreign_h[:, None], 0.0)
    if boundary == "zero":
        return w_hW
    w_sW = torch.zeros_like(gradient_SW[start:end], dtype=dtype)
    w_sW[:heard] = w_hW
    if boundary == "self":
        outside_s = position_s - shift < first_S[start:end]
        w_sW += gradient_SW[start:end].masked_fill(~outside_s[:, None], 0.0)
    if boundary == "clamp":
        for begin in position_s[first_S[start:end] == position_s].tolist():
            others_s = first_S[begin : begin + shift] == begin
            w_sW[begin - start] += gradient_SW[begin : begin + int(others_s.sum())].sum(0, dtype=dtype)
    return w_sW


def _per_channel(factors_X: Tensor, rows: Tensor) -> Tensor:
    """In the dtype that is computed in."""
    return factors_X.to(_wide(factors_X, rows)).repeat_interleave(rows.shape[-1] // len(factors_X))


def _wide(factors_X: Tensor, rows: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(factors_X.dtype, rows.dtype), torch.float32)
