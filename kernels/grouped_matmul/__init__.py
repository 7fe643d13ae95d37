"""grouped_matmul: each group of rows times the weights of its own expert; the only heavy operation of an expert layer.

Owns: the public function, autocast, and the choice of a backend. Does not own: its checks (checks.py), routing and sorting
(model/dispatch.py) and where an expert lives (parallel/expert.py).
Called by: the experts of model/; train/ calls `choose_backend` once at the start of a run and logs the answer.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from kernels.autocast import as_autocast
from kernels.availability import why_not_triton
from kernels.grouped_matmul.checks import check_copies, check_offsets, check_routes, check_routes_in_range, check_shapes
from kernels.grouped_matmul.cpu import by_loop, by_torch, why_not_torch
from kernels.grouped_matmul.reference import reference
from kernels.grouped_matmul.routed import Routes, by_parts
from kernels.sum_copies import RowCopies

PLAIN = {"torch": by_torch, "loop": by_loop, "reference": reference}
BACKENDS = (*PLAIN, "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_matmul(
    rows_RM: Tensor,
    weights_GMN: Tensor,
    *,
    offsets_G: Tensor,
    backend: str,
    row_index_C: Tensor | None = None,
    activation: str = "none",
    gates_C: Tensor | None = None,
    gate_side: str = "after",
    output_index_C: Tensor | None = None,
    num_outputs: int | None = None,
    output_copies: RowCopies | None = None,
    row_copies: RowCopies | None = None,
) -> Tensor:
    """Multiply copies offsets_G[g-1] to offsets_G[g] by weights_GMN[g].

    Without an index the copies are the rows themselves, C = R. "triton" does all that is asked for in the matmul's own
    kernel, and sums in a second one in a fixed order (after CVMM, arXiv 2312.07987); the others do one after the other.

    Args:
        rows_RM: R rows of width M, sorted by group if there is no index; any strides.
        weights_GMN: one M x N matrix per group, G >= 1; any strides. Same dtype and device as the rows.
        offsets_G: int32, the end of each group in copies: non-decreasing, the last one is C. A group may be empty, and
            C may be 0.
        backend: "torch", "loop", "reference" or "triton"; what `choose_backend` returned.
        row_index_C: int32 or int64, the row that each copy reads, in [0, R).
        activation: "none" or "relu", of the product.
        gates_C: float32, one factor per copy, differentiable.
        gate_side: "before" the matmul (on its input) or "after" the activation.
        output_index_C: int32 or int64, the output row that each copy adds to, in [0, num_outputs).
        num_outputs: P, given with output_index_C.
        output_copies, row_copies: what `RowCopies.of` makes of the two indices, where the caller has it: a sort of C numbers, which
            "triton" alone needs and otherwise makes, once for both passes, and once where the two indices are one tensor and R is P.

    Returns:
        rows_CN, or sums_PN with an output index (float32 sums, rounded once; no copy gives exactly zero), in the dtype of
        the rows, differentiable in rows, weights and gates. Under torch.autocast it computes in, and returns, the autocast
        dtype like torch.matmul, and fp32 leaves get fp32 gradients. A group without rows gets exactly zero gradients, and
        NaN stays inside its group. Deterministic for a fixed number of threads; on a GPU "triton" is, with all its
        gradients, the others are not where they sum copies.

    Raises:
        ValueError: shapes, dtypes, devices, offsets or indices that do not fit together, or that the backend cannot serve.
            Offsets on a GPU are not looked at by "torch" and "triton", indices by none: reading them would stall the stream.
    """
    routes = Routes(
        row_index_C=row_index_C,
        activation=activation,
        gates_C=gates_C,
        gate_side=gate_side,
        output_index_C=output_index_C,
        num_outputs=num_outputs,
        output_copies=output_copies,
        row_copies=row_copies,
    )
    check_shapes(rows_RM, weights_GMN, offsets_G=offsets_G)
    num_copies = rows_RM.shape[0] if row_index_C is None else row_index_C.shape[0]
    check_routes(routes, num_copies=num_copies, device=rows_RM.device)
    check_copies(routes, num_rows=rows_RM.shape[0])
    device_type = rows_RM.device.type
    # autocast passes F.grouped_mm by (torch 2.13 on CPU)
    rows_RM, weights_GMN = map(as_autocast, (rows_RM, weights_GMN))
    if rows_RM.dtype != weights_GMN.dtype:
        raise ValueError(
            f"rows and weights must have one dtype outside autocast, got rows {rows_RM.dtype} and weights "
            f"{weights_GMN.dtype}: cast one of them, or run under torch.autocast"
        )
    if backend not in BACKENDS:
        raise ValueError(
            f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}: call choose_backend once at the start of "
            "the run and pass its answer on"
        )
    if reason := _why_not(backend, rows_RM.dtype, device_type=device_type, widths=weights_GMN.shape[1:]):
        raise ValueError(reason)
    # A compiled model is not checked: reading the numbers would cut its graph in two.
    if (device_type == "cpu" or backend in ("loop", "reference")) and not torch.compiler.is_compiling():
        check_offsets(offsets_G.tolist(), num_rows=num_copies)
        if device_type == "cpu":
            check_routes_in_range(routes, num_rows=rows_RM.shape[0])
    if backend == "triton":
        return _by_triton(rows_RM, weights_GMN, offsets_G, routes)
    return by_parts(PLAIN[backend], rows_RM, weights_GMN, offsets_G=offsets_G, routes=routes)


def choose_backend(requested: str, *, device: torch.device | str, dtype: torch.dtype, widths: Iterable[int]) -> str:
    """Resolve what the config asks for into a backend name, once per run; the caller logs the answer.

    "auto" is "torch" where that works and "loop" elsewhere: in benchmarks/results/*_grouped_matmul.md "torch" is the
    faster one (by 1 to 23 %) in every shape that both serve, on 1 and 2 threads, forward and forward+backward.

    Args:
        requested: "auto", "torch", "loop", "reference" or "triton".
        device: where the experts are.
        dtype: what the matmul computes in (the autocast dtype when the run uses autocast).
        widths: every M and N that the run will multiply.

    Raises:
        ValueError: an unknown name, or a backend that cannot serve this device, this dtype or these widths.
    """
    device_type = torch.device(device).type
    if requested == "auto":
        return "loop" if _why_not("torch", dtype, device_type=device_type, widths=widths) else "torch"
    if requested not in BACKENDS:
        raise ValueError(f"the grouped matmul backend must be one of auto, {', '.join(BACKENDS)}, got {requested!r}")
    if reason := _why_not(requested, dtype, device_type=device_type, widths=widths):
        raise ValueError(reason)
    return requested


def _why_not(backend: str, dtype: torch.dtype, *, device_type: str, widths: Iterable[int]) -> str | None:
    if backend == "torch":
        return why_not_torch(dtype, device_type=device_type, widths=widths)
    if backend != "triton":
        return None
    if dtype not in TRITON_DTYPES:
        return f"the triton backend of grouped_matmul computes in {list(TRITON_DTYPES)}, got {dtype}: choose another"
    return why_not_triton(device_type)


def _by_triton(rows_RM: Tensor, weights_GMN: Tensor, offsets_G: Tensor, routes: Routes) -> Tensor:
    from kernels.grouped_matmul.op import forward

    output, row = routes.output_copies, routes.row_copies
    if output is None and routes.output_index_C is not None and routes.num_outputs is not None:
        output = RowCopies.of(routes.output_index_C, num_rows=routes.num_outputs)
    if row is None and routes.row_index_C is not None and rows_RM.requires_grad and torch.is_grad_enabled():
        same = routes.row_index_C is routes.output_index_C and len(rows_RM) == routes.num_outputs
        row = output if same else RowCopies.of(routes.row_index_C, num_rows=len(rows_RM))
    return forward(
        rows_RM,
        weights_GMN,
        routes.gates_C,
        offsets_G,
        routes.row_index_C,
        routes.output_index_C,
        *((output.order_C, output.ends_P) if output else (None, None)),
        *((row.order_C, row.ends_P) if row else (None, None)),
        routes.activation == "relu",
        routes.gate_side == "before",
    )
