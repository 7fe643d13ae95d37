"""expert_mlp: the two-layer expert of sigma-MoE over all routed copies, gather, activation, gate and sum in one operation.

Owns: the public function, all checks, autocast, and the choice of a backend. Does not own: routing and sorting (model/dispatch.py) and
where an expert lives (parallel/expert.py).
Called by: model/experts.py.
"""

import torch
from torch import Tensor

from kernels.autocast import as_autocast
from kernels.availability import check_backend
from kernels.expert_mlp.reference import reference
from kernels.sum_copies import RowCopies

BACKENDS = ("triton", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def expert_mlp(
    rows_RD: Tensor,
    up_LDF: Tensor,
    down_LFD: Tensor,
    gates_C: Tensor,
    *,
    row_index_C: Tensor,
    output_index_C: Tensor,
    offsets_L: Tensor,
    num_outputs: int,
    factors_CF: Tensor | None = None,
    keep_hidden: bool = False,
    output_copies: RowCopies | None = None,
    row_copies: RowCopies | None = None,
    backend: str,
) -> Tensor:
    """output[p] = sum over the copies c of output row p of (gate * relu(row @ W1[group]) [* factors]) @ W2[group].

    That is sigma-MoE (arXiv 2310.10837) for copies that are sorted by group.

    Args:
        rows_RD: R received rows of width D, fp32, fp16 or bf16 ("reference": any). Other strides are copied first.
        up_LDF, down_LFD: W1 and W2 of the L >= 1 groups, dtype and device of the rows.
        gates_C: float32, one per copy.
        row_index_C: int32 or int64, the row that each copy reads, in [0, R).
        output_index_C: likewise, the output row that it adds to, in [0, num_outputs).
        offsets_L: int32, the end of each group's range of copies: non-decreasing, the last one is C. Groups may be empty.
        num_outputs: P. An output row without copies is exactly zero.
        factors_CF: float32 factors of the hidden activations (dropout); they get no gradient.
        keep_hidden: keep relu(row @ W1) (C, F) for the backward pass instead of computing it again: C F numbers of the rows'
            dtype, for D F fewer multiply-adds per copy; traffic.py has the bytes.
        output_copies, row_copies: what `RowCopies.of` makes of the two indices, where the caller has it: it is a sort of C numbers.
            It is made once where the two indices are one tensor and R is P.
        backend: "triton" or "reference".

    Returns:
        (P, D) in the dtype of the rows, differentiable in rows, up, down and gates; under torch.autocast in the autocast dtype, and
        fp32 leaves get fp32 gradients. Products and sums are accumulated in fp32; the result of a copy is rounded once to the
        dtype of the rows, and their sum once. fp32 products round to TF32 only where torch.backends.cuda.matmul.allow_tf32 is
        set. Deterministic, bit for bit. A group without copies gets exactly zero gradients.

    Raises:
        ValueError: shapes, dtypes, devices, indices or offsets that do not fit together; "triton" without a GPU. What
            indices and offsets hold is not looked at on a GPU: reading them would stall the stream.
    """
    rows_RD, up_LDF, down_LFD = map(as_autocast, (rows_RD, up_LDF, down_LFD))
    _check_shapes(rows_RD, up_LDF, down_LFD)
    shape = (up_LDF.shape[0], up_LDF.shape[2])
    _check_copies(gates_C, row_index_C, output_index_C, offsets_L, factors_CF, shape=shape, device=rows_RD.device)
    if rows_RD.is_cpu and not torch.compiler.is_compiling():
        _check_values(row_index_C, output_index_C, offsets_L, num_rows=len(rows_RD), num_outputs=num_outputs)
    _check_backend(backend, rows_RD)
    tensors = (rows_RD, up_LDF, down_LFD, gates_C)
    if backend == "reference":
        return reference(
            *tensors, row_index_C=row_index_C, output_index_C=output_index_C, offsets_L=offsets_L, num_outputs=num_outputs,
            factors_CF=factors_CF,
        )  # fmt: skip
    from kernels.expert_mlp.op import forward_op

    if output_copies is None:
        output_copies = RowCopies.of(output_index_C, num_rows=num_outputs)
    if row_copies is None and row_index_C is output_index_C and len(rows_RD) == num_outputs:
        row_copies = output_copies
    if row_copies is None:
        row_copies = RowCopies.of(row_index_C, num_rows=len(rows_RD))
    output_PD, _ = forward_op(
        *(each.contiguous() for each in (*tensors, row_index_C, output_index_C, offsets_L)),
        None if factors_CF is None else factors_CF.contiguous(),
        output_copies.order_C, output_copies.ends_P, row_copies.order_C, row_copies.ends_P, keep_hidden,
    )  # fmt: skip
    return output_PD


def _check_backend(backend: str, rows_RD: Tensor) -> None:
    check_backend("expert_mlp", backend, BACKENDS, device_type=rows_RD.device.type)
    if backend == "triton" and rows_RD.dtype not in DTYPES:
        raise ValueError(
            f"the triton backend of expert_mlp computes in {', '.join(map(str, DTYPES))}, got {rows_RD.dtype}: cast the rows and the "
            "weights, or choose the reference backend"
        )


def _check_shapes(rows_RD: Tensor, up_LDF: Tensor, down_LFD: Tensor) -> None:
    fits = rows_RD.ndim == 2 and up_LDF.ndim == down_LFD.ndim == 3 and up_LDF.shape[1] == rows_RD.shape[1]
    if not fits or up_LDF.mT.shape != down_LFD.shape or 0 in up_LDF.shape:
        raise ValueError(
            f"rows [R, D], up [L, D, F] and down [L, F, D] must agree, with no size 0 but R, got rows {list(rows_RD.shape)}, up "
            f"{list(up_LDF.shape)} and down {list(down_LFD.shape)}: transpose or reshape one of them"
        )
    if not rows_RD.dtype == up_LDF.dtype == down_LFD.dtype:
        raise ValueError(
            f"rows, up and down must have one dtype outside autocast, got {rows_RD.dtype}, {up_LDF.dtype} and {down_LFD.dtype}: cast "
            "them, or run under torch.autocast"
        )
    if not rows_RD.device == up_LDF.device == down_LFD.device:
        raise ValueError(
            f"rows, up and down must be on one device, got {rows_RD.device}, {up_LDF.device} and {down_LFD.device}: move them"
        )


def _check_copies(
    gates_C: Tensor, row_index_C: Tensor, output_index_C: Tensor, offsets_L: Tensor, factors_CF: Tensor | None, *,
    shape: tuple[int, ...], device: torch.device,
) -> None:  # fmt: skip
    """shape: (L, F)."""
    num_groups, expert_dim = shape
    num_copies = gates_C.numel()
    floats, integers = (torch.float32,), (torch.int32, torch.int64)
    expected = {
        "gates": (gates_C, (num_copies,), floats),
        "row_index": (row_index_C, (num_copies,), integers),
        "output_index": (output_index_C, (num_copies,), integers),
        "offsets": (offsets_L, (num_groups,), (torch.int32,)),
    }
    if factors_CF is not None:
        expected["factors"] = (factors_CF, (num_copies, expert_dim), floats)
        if factors_CF.requires_grad:
            raise ValueError("factors get no gradient, but requires_grad is set: detach them")
    for name, (tensor, wanted, dtypes) in expected.items():
        if tuple(tensor.shape) != wanted or tensor.dtype not in dtypes or tensor.device != device:
            raise ValueError(
                f"{name} must be {list(wanted)} of {' or '.join(map(str, dtypes))} on {device} for {num_copies} gates and "
                f"{num_groups} groups of width {expert_dim}, got {list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            )


def _check_values(
    row_index_C: Tensor, output_index_C: Tensor, offsets_L: Tensor, *, num_rows: int, num_outputs: int
) -> None:
    num_copies = len(row_index_C)
    ends = offsets_L.tolist()
    if ends[0] < 0 or ends[-1] != num_copies or ends != sorted(ends):
        raise ValueError(
            f"offsets must be the non-decreasing ends of the groups, the last one the number of copies, got {ends} for "
            f"{num_copies} copies: sort the copies by group and pass counts.cumsum(0, dtype=torch.int32)"
        )
    for name, index_C, size in (("row_index", row_index_C, num_rows), ("output_index", output_index_C, num_outputs)):
        if num_copies and not (index_C.min() >= 0 and index_C.max() < size):
            raise ValueError(
                f"{name} must be in [0, {size}), got {int(index_C.min())} to {int(index_C.max())}: pass the index of this plan"
            )
