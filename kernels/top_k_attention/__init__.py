"""top_k_attention: causal attention of each query to its best keys, with memory linear in the length.

Owns: the public function, all checks, autocast, and which backends can serve. Does not own: projections, positions, who sees whom
(model/mask.py), the caches of decoding, what is dropped (model/top_k_attention.py).
Called by: model/top_k_attention.py.
"""

import math

import torch
from torch import Tensor

from kernels.autocast import as_autocast
from kernels.availability import check_backend, why_not_triton
from kernels.top_k_attention.cpu import Drop, Setting, attend_in_chunks
from kernels.top_k_attention.reference import reference

BACKENDS = ("triton", "torch", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 128  # of a head: a tile holds all of it, and 256 would spill 400 to 5,000 bytes
MAX_TOP_K = 256  # what the search of the kernels holds of a query's scores is at least twice as many


def top_k_attention(
    q_BHSC: Tensor,
    k_BGMC: Tensor,
    v_BGMD: Tensor,
    *,
    top_k: int | None,
    scale: float,
    first_BS: Tensor | None = None,
    chunk: int = 1024,
    relative: tuple[Tensor, Tensor] | None = None,
    drop: Drop | None = None,
    backend: str,
) -> Tensor:
    """softmax over the top_k best visible keys of each query, times v (arXiv 2106.06899).

    The last S keys are the queries' own positions. A query sees the keys up to its own. Equal scores: the lowest key wins. A query that
    sees fewer than top_k keys uses those; one that sees none gives zeros and gets no gradient.

    Args:
        q_BHSC, k_BGMC, v_BGMD: S <= M; H / G neighbouring heads of q share one of k and v, and no copy is made for them. "triton": fp32,
            fp16 or bf16, widths up to 128, other strides are copied first; "torch" and "reference": any floating-point dtypes.
        top_k: None or 0 keeps all keys, exact attention; so does a number above the keys that a query sees. "triton": up to 256, or M.
        scale: the scores' factor inside the softmax, > 0 and finite, so it leaves the selection alone. A learned one: multiply q by it.
        first_BS: int32 or int64, the lowest key that each query sees (its document's first, or of a part-filled cache); it does not
            decrease along S. None: 0.
        chunk: for "torch", the most queries that are worked on at once; the peak holds a few buffers of B x H x chunk x M numbers.
        relative: (q_position_BHSC, r_HMC) adds the Transformer-XL term q_position . r[M - 1 - d] to the score of the key d places before
            the query (arXiv 1901.02860, section 3.3, the terms b and d): row p of r holds distance M - 1 - p, the farthest first, 0
            last. "torch" only.
        drop: dropout of the kept probabilities. "torch" only.
        backend: one of `candidates`, or "reference", which holds all B x H x S x M scores.

    Returns:
        (B, H, S, D), differentiable once in q, k, v and `relative`. "torch": in the dtype of v; products, selection and softmax run in
        float32 at least, also under autocast. "triton": under torch.autocast in the autocast dtype; scores are accumulated and compared
        in float32, probabilities are rounded to the dtype of v before their product, as in flash attention; deterministic, bit for
        bit; fp32 products round to TF32 only where torch.backends.cuda.matmul.allow_tf32 is set at the call. Backward keeps q, k, v
        and: "torch", with top_k, 8 bytes per kept key; "triton", the output and 12 bytes per query and head, nothing per key.
        A score of -inf, of a product that overflowed, has no weight: where all that a query sees are such, it gives zeros and gets no
        gradient, as if it saw nothing. A kept score that is NaN or inf makes its query's output NaN.

    Raises:
        ValueError: sizes, dtypes or devices that do not fit together, or a backend that cannot serve. On a GPU nobody looks whether
            first_BS decreases: reading it would stall the stream.
    """
    _check(q_BHSC, k_BGMC, v_BGMD, top_k=top_k, chunk=chunk, scale=scale, first_BS=first_BS)
    _check_relative(q_BHSC, k_BGMC, relative)
    num_queries, num_keys = q_BHSC.shape[2], k_BGMC.shape[2]
    top_k = min(top_k or num_keys, num_keys)
    if backend == "triton":
        q_BHSC, k_BGMC, v_BGMD = map(as_autocast, (q_BHSC, k_BGMC, v_BGMD))
    _check_backend(backend, q_BHSC, k_BGMC, v_BGMD, top_k=top_k, extras=relative is not None or drop is not None)
    if backend == "torch":
        setting = Setting(num_queries, num_keys, first_BS, top_k, chunk, scale, drop)
        return attend_in_chunks(q_BHSC, k_BGMC, v_BGMD, relative, setting)
    if backend == "reference":
        return reference(q_BHSC, k_BGMC, v_BGMD, top_k=top_k, scale=scale, first_BS=first_BS)
    from kernels.grouped_matmul.tiles import precision
    from kernels.top_k_attention.op import forward_op

    first_BS = None if first_BS is None else first_BS.clamp(min=0).int().contiguous()
    contiguous = (each.contiguous() for each in (q_BHSC, k_BGMC, v_BGMD))
    return forward_op(*contiguous, first_BS, top_k, float(scale), precision())[0]


def candidates(
    device_type: str, *, top_k: int | None, num_keys: int, widths: tuple[int, ...], extras: bool = False
) -> tuple[str, ...]:
    """The backends that can serve M keys and, in decoding, more of them. widths: of q, k and v. extras: with `relative` or `drop`."""
    most = top_k or num_keys
    num_keys = max(num_keys, most + bool(top_k))  # with one key more than the row, not all are kept
    none = why_not_triton(device_type) or _why_not(top_k=most, num_keys=num_keys, widths=widths, extras=extras)
    return ("torch",) if none else ("triton", "torch")


def _why_not(*, top_k: int, num_keys: int, widths: tuple[int, ...], extras: bool) -> str | None:
    """What the kernels have against a call on a GPU, or None."""
    if extras:
        return (
            "the triton backend of top_k_attention has no relative positions and no dropout: choose the torch backend"
        )
    if max(widths) > MAX_WIDTH:
        return (
            f"the triton backend of top_k_attention takes heads up to {MAX_WIDTH} wide, got {max(widths)}: narrow them, or choose the "
            "torch backend"
        )
    if MAX_TOP_K < top_k < num_keys:
        return (
            f"the triton backend of top_k_attention takes top_k up to {MAX_TOP_K}, or all keys, got {top_k} of {num_keys}: lower top_k, or "
            "choose the torch backend"
        )
    return None


def _check_backend(backend: str, q: Tensor, k: Tensor, v: Tensor, *, top_k: int, extras: bool) -> None:
    check_backend("top_k_attention", backend, BACKENDS, device_type=q.device.type)
    if backend == "reference" and extras:
        raise ValueError(
            "the reference backend of top_k_attention has no relative positions and no dropout: choose the torch backend"
        )
    if backend != "triton":
        return
    if reason := _why_not(top_k=top_k, num_keys=k.shape[2], widths=(q.shape[3], v.shape[3]), extras=extras):
        raise ValueError(reason)
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"the triton backend of top_k_attention computes in one of {', '.join(map(str, DTYPES))}, got q {q.dtype}, k {k.dtype} and v "
            f"{v.dtype}: cast them, or choose the torch backend"
        )


def _check(
    q: Tensor, k: Tensor, v: Tensor, *, top_k: int | None, chunk: int, scale: float, first_BS: Tensor | None
) -> None:
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 query, not {chunk}: 1024 is a good size on a GPU")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0):
        raise ValueError(f"top_k must be a whole number of kept keys >= 1, or None or 0 for all keys, not {top_k!r}")
    if not 0 < scale < math.inf:
        raise ValueError(
            f"scale must be above 0 and finite, not {scale}: the selection is made before it, so fold a sign into q"
        )
    fits = (
        q.ndim == k.ndim == v.ndim == 4 and q.shape[2] <= k.shape[2] and 0 not in (k.shape[1], q.shape[3], v.shape[-1])
    )
    fits = fits and (k.shape[0], k.shape[3]) == (q.shape[0], q.shape[3]) and v.shape[:3] == k.shape[:3]
    if not fits or q.shape[1] % k.shape[1] or not q.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be (B, H, S, C), (B, G, M, C) and (B, G, M, D) with "
            "S <= M and H a multiple of G: reshape one of them"
        )
    if not all(each.is_floating_point() for each in (q, k, v)):
        raise ValueError(
            f"q, k and v must have floating-point dtypes, got {q.dtype}, {k.dtype} and {v.dtype}: cast them"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}: move them")
    if first_BS is None:
        return
    wanted = (q.shape[0], q.shape[2])
    if first_BS.shape != wanted or first_BS.dtype not in (torch.int32, torch.int64) or first_BS.device != q.device:
        raise ValueError(
            f"first must be {wanted} of torch.int32 or torch.int64 on {q.device}, one key for each query of q, got "
            f"{tuple(first_BS.shape)} of {first_BS.dtype} on {first_BS.device}"
        )
    if first_BS.is_cpu and not torch.compiler.is_compiling() and (first_BS.diff(dim=1) < 0).any():
        raise ValueError(
            "first must not decrease along the queries: sort the keys so that what a query sees is a range"
        )


def _check_relative(q: Tensor, k: Tensor, relative: tuple[Tensor, Tensor] | None) -> None:
    table = (q.shape[1], *k.shape[2:])
    if relative is not None and (relative[0].shape != q.shape or relative[1].shape != table):
        raise ValueError(
            f"relative must be (q_position, r) of {tuple(q.shape)}, like q, and {table}, one row per distance, but they are "
            f"{tuple(relative[0].shape)} and {tuple(relative[1].shape)}"
        )
