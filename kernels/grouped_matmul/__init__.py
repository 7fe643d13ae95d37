"""grouped_matmul: each group of rows times the weights of its own expert; the only heavy operation of an expert layer.

Owns: the public function, all checks, autocast, and the choice of a backend. Does not own: routing, sorting or
gathering rows (model/dispatch.py) and where an expert lives (parallel/expert.py).
Called by: the experts of model/; train/ calls `choose_backend` once at the start of a run and logs the answer.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from kernels.grouped_matmul.cpu import by_loop, by_torch, why_not_torch
from kernels.grouped_matmul.reference import reference

BACKENDS = {"torch": by_torch, "loop": by_loop, "reference": reference}


def grouped_matmul(rows_RM: Tensor, weights_GMN: Tensor, *, offsets_G: Tensor, backend: str) -> Tensor:
    """Multiply rows offsets_G[g-1] to offsets_G[g] by weights_GMN[g].

    Args:
        rows_RM: R rows of width M, sorted by group; any strides.
        weights_GMN: one M x N matrix per group, G >= 1; any strides. Same dtype and device as the rows.
        offsets_G: int32, the end of each group in rows: non-decreasing, the last one is R. A group may be empty, and
            R may be 0.
        backend: "torch", "loop" or "reference"; what `choose_backend` returned.

    Returns:
        rows_RN in the dtype of the rows, differentiable in rows and weights. Under torch.autocast it computes in, and
        returns, the autocast dtype like torch.matmul, and fp32 leaves get fp32 gradients. A group without rows gets
        exactly zero gradients, and NaN stays inside its group. Deterministic for a fixed number of threads.

    Raises:
        ValueError: shapes, dtypes, devices or offsets that do not fit together, or that the backend cannot serve.
            Offsets on a GPU are not looked at by "torch": reading them would stall the stream.
    """
    _check_shapes(rows_RM, weights_GMN, offsets_G=offsets_G)
    device_type = rows_RM.device.type
    if torch.is_autocast_enabled(device_type):
        rows_RM, weights_GMN = _as_autocast(rows_RM), _as_autocast(weights_GMN)
    if rows_RM.dtype != weights_GMN.dtype:
        raise ValueError(
            f"rows and weights must have one dtype outside autocast, got rows {rows_RM.dtype} and weights "
            f"{weights_GMN.dtype}: cast one of them, or run under torch.autocast"
        )
    if backend == "torch":
        if reason := why_not_torch(rows_RM.dtype, device_type=device_type, widths=weights_GMN.shape[1:]):
            raise ValueError(reason)
    elif backend not in BACKENDS:
        raise ValueError(
            f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}: call choose_backend once at the start of "
            "the run and pass its answer on"
        )
    if backend != "torch" or device_type == "cpu":
        _check_offsets(offsets_G.tolist(), num_rows=rows_RM.shape[0])
    return BACKENDS[backend](rows_RM, weights_GMN, offsets_G=offsets_G)


def choose_backend(requested: str, *, device: torch.device | str, dtype: torch.dtype, widths: Iterable[int]) -> str:
    """Resolve what the config asks for into a backend name, once per run; the caller logs the answer.

    "auto" is "torch" where that works and "loop" elsewhere: in benchmarks/results/*_grouped_matmul.md "torch" is the
    faster one (by 1 to 23 %) in every shape that both serve, on 1 and 2 threads, forward and forward+backward.

    Args:
        requested: "auto", "torch", "loop" or "reference".
        device: where the experts are.
        dtype: what the matmul computes in (the autocast dtype when the run uses autocast).
        widths: every M and N that the run will multiply.

    Raises:
        ValueError: an unknown name, or a backend that cannot serve this device, this dtype or these widths.
    """
    reason = why_not_torch(dtype, device_type=torch.device(device).type, widths=widths)
    if requested == "auto":
        return "loop" if reason else "torch"
    if requested not in BACKENDS:
        raise ValueError(f"the grouped matmul backend must be one of auto, {', '.join(BACKENDS)}, got {requested!r}")
    if requested == "torch" and reason:
        raise ValueError(reason)
    return requested


def _check_shapes(rows_RM: Tensor, weights_GMN: Tensor, *, offsets_G: Tensor) -> None:
    if rows_RM.ndim != 2 or weights_GMN.ndim != 3 or rows_RM.shape[1] != weights_GMN.shape[1]:
        raise ValueError(
            f"rows [R, M] and weights [G, M, N] must agree in M, got rows {list(rows_RM.shape)} and weights "
            f"{list(weights_GMN.shape)}: transpose or reshape one of them"
        )
    if offsets_G.dtype != torch.int32 or offsets_G.shape != weights_GMN.shape[:1] or offsets_G.shape[0] == 0:
        raise ValueError(
            f"offsets must be int32 with one end per group of weights, at least one, got {offsets_G.dtype} "
            f"{list(offsets_G.shape)} for weights {list(weights_GMN.shape)}: pass counts.cumsum(0, dtype=torch.int32)"
        )
    if not rows_RM.device == weights_GMN.device == offsets_G.device:
        raise ValueError(
            f"rows, weights and offsets must be on one device, got {rows_RM.device}, {weights_GMN.device} and "
            f"{offsets_G.device}: move them"
        )


def _check_offsets(ends: list[int], *, num_rows: int) -> None:
    if ends[0] < 0 or ends[-1] != num_rows or ends != sorted(ends):
        shown = ends if len(ends) <= 8 else [*ends[:4], "...", *ends[-3:]]
        raise ValueError(
            f"offsets must be the non-decreasing ends of the groups, the last one the number of rows, got "
            f"{shown} for {num_rows} rows: sort the rows by group and pass counts.cumsum(0, dtype=torch.int32)"
        )


def _as_autocast(tensor: Tensor) -> Tensor:
    """What autocast does to an input of torch.matmul; it passes F.grouped_mm by (torch 2.13 on CPU)."""
    if tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
