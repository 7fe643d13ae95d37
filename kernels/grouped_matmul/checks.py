"""What grouped_matmul refuses, each in one sentence. Called by: kernels/grouped_matmul before anything is computed."""

import torch
from torch import Tensor

from kernels.grouped_matmul.routed import ACTIVATIONS, GATE_SIDES, Routes


def check_shapes(rows_RM: Tensor, weights_GMN: Tensor, *, offsets_G: Tensor) -> None:
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


def check_offsets(ends: list[int], *, num_rows: int) -> None:
    if ends[0] < 0 or ends[-1] != num_rows or ends != sorted(ends):
        shown = ends if len(ends) <= 8 else [*ends[:4], "...", *ends[-3:]]
        raise ValueError(
            f"offsets must be the non-decreasing ends of the groups, the last one the number of rows, got "
            f"{shown} for {num_rows} rows: sort the rows by group and pass counts.cumsum(0, dtype=torch.int32)"
        )


def check_routes(routes: Routes, *, num_copies: int, device: torch.device) -> None:
    """Names, dtypes, shapes and devices of the optional arguments."""
    if routes.activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {routes.activation!r}")
    if routes.gate_side not in GATE_SIDES:
        raise ValueError(f"gate_side must be one of {', '.join(GATE_SIDES)}, got {routes.gate_side!r}")
    if (routes.output_index_C is None) != (routes.num_outputs is None):
        raise ValueError(
            f"output_index_C and num_outputs must be given together, got {'no index' if routes.output_index_C is None else 'an index'} "
            f"and num_outputs {routes.num_outputs}: give both, or neither"
        )
    integers = (torch.int32, torch.int64)
    for name, tensor, dtypes in (
        ("row_index_C", routes.row_index_C, integers),
        ("output_index_C", routes.output_index_C, integers),
        ("gates_C", routes.gates_C, (torch.float32,)),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes or tensor.shape != (num_copies,) or tensor.device != device:
            raise ValueError(
                f"{name} must be [{num_copies}], {' or '.join(str(dtype) for dtype in dtypes)}, on {device}: one number for each "
                f"copy, got {list(tensor.shape)}, {tensor.dtype}, on {tensor.device}"
            )


def check_copies(routes: Routes, *, num_rows: int) -> None:
    """That RowCopies which the caller made belong to an index of these sizes."""
    for name, copies, index_C, size in (
        ("output_copies", routes.output_copies, routes.output_index_C, routes.num_outputs),
        ("row_copies", routes.row_copies, routes.row_index_C, num_rows),
    ):
        if copies is None:
            continue
        found = [tuple(each.shape) for each in (copies.order_C, copies.ends_P)]
        if index_C is None or found != [tuple(index_C.shape), (size,)]:
            wanted = "none without an index" if index_C is None else f"order {list(index_C.shape)} and ends [{size}]"
            raise ValueError(
                f"{name} must be what RowCopies.of makes of its index, {wanted}, got order {list(found[0])} and ends {list(found[1])}: "
                "make them from the index that is given, or leave them out"
            )


def check_routes_in_range(routes: Routes, *, num_rows: int) -> None:
    """Reads the indices: on a GPU that would wait for the device."""
    for name, index_C, size in (
        ("row_index_C", routes.row_index_C, num_rows),
        ("output_index_C", routes.output_index_C, routes.num_outputs or 0),
    ):
        if index_C is not None and index_C.numel():
            low, high = (int(value) for value in torch.aminmax(index_C))
            if low < 0 or high >= size:
                raise ValueError(
                    f"{name} must be in [0, {size}), got {low} to {high}: it names rows that are not there"
                )
