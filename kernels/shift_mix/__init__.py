"""shift_mix: each token times a factor plus an earlier token times another, in one pass over memory; and the same for decoding.

Owns: the public functions, all checks, and the choice of a backend. Does not own: how far a layer shifts, the factors, the rings
(model/hsm).
Called by: model/hsm/layer.py, model/hsm/shift.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.availability import check_backend, why_not_triton
from kernels.shift_mix import cpu
from kernels.shift_mix.reference import reference

BACKENDS = ("triton", "torch", "reference")
BOUNDARIES = ("zero", "self", "clamp")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def shift_mix(
    u_BSD: Tensor,
    a_X: Tensor,
    b_X: Tensor,
    *,
    shifts: tuple[int, ...],
    boundary: str = "zero",
    document_ids_BS: Tensor | None = None,
    backend: str,
) -> Tensor:
    """y[t] = a * u[t] + b * v[t], v[t] = u[t - shift] of the same document: hierarchical shift mixing with factors (arXiv 2601.22852, our
    reading: docs/hsm.md).

    Args:
        u_BSD: B rows of S positions of width D, fp32, fp16 or bf16 ("torch" and "reference": any float). Other strides are copied first.
        a_X, b_X: factors of X equal slices of the width: 1 for all of it, D for each channel. float32 ("torch" and "reference": any
            float).
        shifts: how far, at least 1: one for all channels, or one for each of as many equal slices of the width.
        boundary: v[t] where the document of t has no token so far back. "zero": zeros; "self": u[t]; "clamp": its first token.
        document_ids_BS: whole numbers, equal in a document, which is one run of positions; None: a row is one document.
        backend: "triton", "torch" (in blocks of positions) or "reference".

    Returns:
        (B, S, D) in the dtype of u, differentiable in u, a and b; mixed in float32 at least and rounded once. Saved for the backward pass:
        the inputs. Deterministic, bit for bit.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a shift below 1; "triton" without a GPU.
    """
    whole = isinstance(shifts, (tuple, list)) and shifts and all(_is_whole(shift, least=1) for shift in shifts)
    if u_BSD.ndim != 3 or not whole or not u_BSD.shape[2] or u_BSD.shape[2] % len(shifts):
        raise ValueError(
            "u must be [B, S, D] with a D of at least 1 that the number of shifts divides, and these a tuple of whole numbers, all of at "
            f"least 1, got {list(u_BSD.shape)} and {shifts}: change one of them"
        )
    _check_factors(u_BSD, a_X, b_X, backend=backend, function="shift_mix")
    _check_boundary(boundary, function="shift_mix")
    _check_documents(document_ids_BS, u_BSD)
    if backend == "reference":
        return reference(u_BSD, a_X, b_X, shifts=shifts, boundary=boundary, document_ids_BS=document_ids_BS)
    first_BS = None if document_ids_BS is None else _begins(document_ids_BS)
    u_BSD, a_X, b_X = (each.contiguous() for each in (u_BSD, a_X, b_X))
    if backend == "torch":
        return cpu.mix(u_BSD, a_X, b_X, first_BS, shifts=shifts, boundary=boundary)
    from kernels.shift_mix.op import mix_op

    return mix_op(u_BSD, a_X, b_X, first_BS, list(shifts), boundary)


def shift_mix_step(
    u_BW: Tensor, ring_BRW: Tensor, a_X: Tensor, b_X: Tensor, *, position: int, boundary: str = "zero", backend: str
) -> Tensor:
    """The mix of one more token of each row, which takes its place in the ring: y = a * u + b * (the token R positions before).

    Args:
        u_BW: the token at `position`, as a rule a slice of the width; its channels lie side by side.
        ring_BRW: the last R tokens, position p at place p mod R; changed in place. R is the shift. Contiguous, dtype of u.
        a_X, b_X: factors of X equal slices of W.
        position: of the token, from 0: so many were seen before.
        boundary, backend: as of shift_mix; "reference" is "torch" here.

    Returns:
        (B, W) in the dtype of u, mixed as by shift_mix. "triton": one launch, without a gradient.

    Raises:
        ValueError: as shift_mix; a ring that does not belong to u, a position that is no whole number from 0.
    """
    _check_ring(u_BW, ring_BRW)
    _check_factors(u_BW, a_X, b_X, backend=backend, function="shift_mix_step")
    _check_boundary(boundary, function="shift_mix_step")
    if not _is_whole(position, least=0):
        raise ValueError(
            f"the position of shift_mix_step must be a whole number from 0, got {position!r}: pass how many tokens were seen before"
        )
    size = ring_BRW.shape[1]
    place = position % size
    source = place if position >= size else -1
    if source < 0 and boundary == "clamp" and position > 0:
        source = 0  # the first token, which nothing has replaced
    if backend != "triton":
        return cpu.step(u_BW, ring_BRW, a_X, b_X, place=place, source=source, boundary=boundary)
    from kernels.shift_mix.op import step_op

    u_BW = u_BW.detach() if u_BW.stride(1) == 1 else u_BW.detach().contiguous()
    return step_op(u_BW, ring_BRW, a_X.detach().contiguous(), b_X.detach().contiguous(), place, source, boundary)


def candidates(device_type: str) -> tuple[str, ...]:
    """The backends that can serve float32, float16 and bfloat16 on this device, the likely fastest first."""
    return ("torch",) if why_not_triton(device_type) else ("triton", "torch")


def _begins(document_ids_BS: Tensor) -> Tensor:
    """int32: where in its row the document of each position begins."""
    length = document_ids_BS.shape[1]
    changes_BS = F.pad(document_ids_BS[:, 1:] != document_ids_BS[:, :-1], (1, 0), value=False)[:, :length]
    position_S = torch.arange(length, device=document_ids_BS.device, dtype=torch.int32)
    return (position_S * changes_BS).cummax(1).values if length else changes_BS.int()


def _is_whole(number: object, *, least: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= least


def _check_documents(document_ids_BS: Tensor | None, u_BSD: Tensor) -> None:
    if document_ids_BS is None:
        return
    if not isinstance(document_ids_BS, Tensor):
        raise ValueError(
            f"document ids must be a tensor [B, S] of u, got {type(document_ids_BS).__name__}: pass an id for each position in a tensor"
        )
    dtype = document_ids_BS.dtype
    whole = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    if document_ids_BS.shape != u_BSD.shape[:2] or not whole or document_ids_BS.device != u_BSD.device:
        raise ValueError(
            f"document ids must be whole numbers [B, S] of u on its device, got {list(document_ids_BS.shape)} of {dtype} on "
            f"{document_ids_BS.device} and u {list(u_BSD.shape)} on {u_BSD.device}: pass an id for each position"
        )


def _check_ring(u_BW: Tensor, ring_BRW: Tensor) -> None:
    fits = ring_BRW.ndim == 3 and u_BW.shape == ring_BRW.shape[::2] and ring_BRW.shape[1] > 0
    same = u_BW.dtype == ring_BRW.dtype and u_BW.device == ring_BRW.device
    if not fits or not same or not ring_BRW.is_contiguous():
        raise ValueError(
            "u [B, W] and a contiguous ring [B, R, W] with a place or more must agree in sizes, dtype and device, got "
            f"{list(u_BW.shape)} of {u_BW.dtype} on {u_BW.device} and {list(ring_BRW.shape)} of {ring_BRW.dtype} on {ring_BRW.device}: "
            "use the ring of these rows"
        )


def _check_boundary(boundary: str, *, function: str) -> None:
    if boundary not in BOUNDARIES:
        raise ValueError(f"the boundary of {function} must be one of {', '.join(BOUNDARIES)}, got {boundary!r}")


def _check_factors(u: Tensor, a_X: Tensor, b_X: Tensor, *, backend: str, function: str) -> None:
    if a_X.ndim != 1 or a_X.shape != b_X.shape or not len(a_X) or u.shape[-1] % len(a_X):
        raise ValueError(
            f"a and b must be [X] with an X that divides the width of u, got a {list(a_X.shape)}, b {list(b_X.shape)} and u "
            f"{list(u.shape)}: pass one factor for each slice"
        )
    if a_X.dtype != b_X.dtype or not u.device == a_X.device == b_X.device:
        raise ValueError(
            f"a and b must have one dtype and the device of u, got {a_X.dtype} on {a_X.device}, {b_X.dtype} on {b_X.device} and u on "
            f"{u.device}: cast or move them"
        )
    if not u.is_floating_point() or not a_X.is_floating_point():
        raise ValueError(f"u, a and b of {function} must be floats, got u {u.dtype}, a and b {a_X.dtype}: cast them")
    check_backend(function, backend, BACKENDS, device_type=u.device.type)
    if backend == "triton" and (u.dtype not in DTYPES or a_X.dtype != torch.float32):
        raise ValueError(
            f"the triton backend of {function} takes u in {', '.join(map(str, DTYPES))} and factors in torch.float32, got {u.dtype} and "
            f"{a_X.dtype}: cast them, or choose another backend"
        )
