"""Which rows of a table each token reads, and what the ops over tables must hold of their arguments.

Owns: TableRoutes, and the checks that peer_experts and embedding_bag share. Does not own: who chose the rows (model/product_keys.py),
what is computed of them (kernels/peer_experts, kernels/embedding_bag). Called by: model/lookup.py, and by the two ops.

Shape letters: R received rows, P output rows, C routed copies, L rows of the table held here, X any width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import availability
from kernels.availability import why_not_triton
from kernels.tables.adam import RowAdam

# of the kernels' place numbers, 32 bits wide, the last block may lie beyond the copies: by at most 1,024, and some room
MAX_COPIES = 2**31 - 4096
LARGE_TABLE = 2**17  # rows: 256 MiB of float32 at width 512, beyond every cache; with more of them a pass takes as long
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class TableRoutes:
    """C routed copies in the order in which they came: their received rows and their output rows ascend.

    entry_C: int32 or int64, the row of the table that a copy reads, in [0, L). row_C: int64, the received row that it reads. output_C:
    int64, the output row that it adds to; the same tensor as row_C where the two spaces are one. order_C: int32, the copies sorted
    stably by entry, order_C[i] is the copy at sorted place i. row_ends_R, output_ends_P: int32, the end of each row's range of copies;
    one tensor where the spaces are one.
    """

    entry_C: Tensor
    row_C: Tensor
    output_C: Tensor
    order_C: Tensor
    row_ends_R: Tensor
    output_ends_P: Tensor
    num_rows: int
    num_outputs: int

    @staticmethod
    def of(
        entry_C: Tensor,
        row_C: Tensor,
        output_C: Tensor,
        *,
        num_rows: int,
        num_outputs: int,
        order_C: Tensor | None = None,
    ) -> "TableRoutes":
        """The routes of these copies, without waiting for the device. order_C: what a stable sort by entry gave, where it is known.

        Raises:
            ValueError: dtypes, shapes or numbers of rows that break the above, 2**31 - 4096 copies or more, or, on a CPU, rows that do not
                ascend or lie outside, or an order that is another one.
        """
        _check_sizes(num_rows=num_rows, num_outputs=num_outputs)
        _check_copies(entry_C, row_C, output_C, order_C)
        for name, index_C, size in (("row_C", row_C, num_rows), ("output_C", output_C, num_outputs)):
            if index_C.is_cpu and not torch.compiler.is_compiling():
                _check_ascending(name, index_C, size)
        if order_C is None:
            order_C = entry_C.argsort(stable=True).int()
        elif order_C.is_cpu and not torch.compiler.is_compiling():
            _check_order(order_C, entry_C)
        row_ends_R = _ends(row_C, num_rows)
        one_space = output_C is row_C and num_rows == num_outputs
        output_ends_P = row_ends_R if one_space else _ends(output_C, num_outputs)
        return TableRoutes(entry_C, row_C, output_C, order_C, row_ends_R, output_ends_P, num_rows, num_outputs)


def check_tables(op: str, routes: TableRoutes, gates_C: Tensor | None, /, **tensors: Tensor) -> None:
    """The tensors have rows of one width, at least 1, and lie on the device of the routes; those but "rows" are tables of equal length."""
    device = routes.entry_C.device
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if any(tensor.ndim != 2 for tensor in tensors.values()) or len({shape[1] for shape in shapes.values()}) > 1:
        raise ValueError(f"{op} needs rows [R, D] and tables [L, D] of one width D, got {shapes}: slice or reshape one")
    if 0 in {shape[1] for shape in shapes.values()}:
        raise ValueError(
            f"{op} needs rows and tables of a width of at least 1, got {shapes}: a part without columns has no work"
        )
    lengths = {name: shape[0] for name, shape in shapes.items() if name != "rows"}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{op} needs tables of one length L, got {lengths}: they must be the parts of one bank")
    if "rows" in tensors and shapes["rows"][0] != routes.num_rows:
        raise ValueError(f"{op} needs as many rows as its routes, got {shapes['rows'][0]} rows for {routes.num_rows}")
    for name, tensor in tensors.items():
        if tensor.device != device or not tensor.is_floating_point():
            raise ValueError(
                f"the {name} of {op} must be floats on the device of the routes, got {tensor.dtype} on {tensor.device} for routes on "
                f"{device}: move or cast them"
            )
    if gates_C is not None:
        wide = torch.float64 if torch.float64 in {tensor.dtype for tensor in tensors.values()} else torch.float32
        if (
            gates_C.shape != routes.entry_C.shape
            or gates_C.dtype not in (torch.float32, wide)
            or gates_C.device != device
        ):
            raise ValueError(
                f"the gates of {op} must be {list(routes.entry_C.shape)} of {wide} on {device}: one for each copy, got "
                f"{list(gates_C.shape)} of {gates_C.dtype} on {gates_C.device}"
            )
    num_entries = next(iter(lengths.values()))
    if device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range("entry_C", routes.entry_C, num_entries)


def check_backend(op: str, backend: str, backends: tuple[str, ...], *tensors: Tensor) -> None:
    """That the backend is known and serves these tensors."""
    availability.check_backend(op, backend, backends, device_type=tensors[0].device.type)
    if backend != "triton":
        return
    for tensor in tensors:
        if tensor.dtype not in TRITON_DTYPES:
            raise ValueError(
                f"the triton backend of {op} computes in {', '.join(map(str, TRITON_DTYPES))}, got {tensor.dtype}: cast rows and tables, "
                "or choose another backend"
            )


def check_adam(op: str, backend: str, *pairs: tuple[RowAdam, Tensor]) -> None:
    """That the backend takes a RowAdam, that each is the state of its table and of no other, and that the table will be stepped."""
    if not torch.compiler.is_compiling():
        _check_apart(op, pairs)
    for adam, table_LD in pairs:
        adam.check(table_LD)
        if backend == "reference":
            raise ValueError(f"the reference backend of {op} gives gradients and takes no adam: choose another backend")
        if torch.is_grad_enabled() and not table_LD.requires_grad:
            raise ValueError(
                f"{op} with adam steps its tables in the backward pass, but requires_grad of a table of {list(table_LD.shape)} is False: "
                "set it, or leave adam out"
            )
        if torch.is_grad_enabled() and not table_LD.is_leaf:
            raise ValueError(
                f"{op} with adam steps its tables in place, so they must be leaves, but a table of {list(table_LD.shape)} was computed by "
                f"{table_LD.grad_fn}: pass the parameter itself"
            )


def _check_apart(op: str, pairs: Sequence[tuple[RowAdam, Tensor]]) -> None:
    tensors = [tensor for adam, table_LD in pairs for tensor in (table_LD, *adam.state) if tensor.numel()]
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    if len(storages) < len(tensors):
        raise ValueError(
            f"{op} with adam steps each table and its state in place, so no two may share memory, got {len(tensors)} tensors in "
            f"{len(storages)} storages: give each table a RowAdam and a storage of its own"
        )


def candidates(device_type: str) -> tuple[str, ...]:
    """The backends that can serve tensors on a device of this type; the first serves wherever torch runs."""
    return ("torch",) if why_not_triton(device_type) else ("torch", "triton")


def _ends(ascending_C: Tensor, num_rows: int) -> Tensor:
    rows = torch.arange(num_rows, device=ascending_C.device, dtype=ascending_C.dtype)
    return torch.searchsorted(ascending_C, rows, right=True, out_int32=True)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ValueError(
                f"{name} of TableRoutes must be a whole number from 0, got {size!r}: pass how many rows there are"
            )


def _check_copies(entry_C: Tensor, row_C: Tensor, output_C: Tensor, order_C: Tensor | None) -> None:
    if entry_C.numel() >= MAX_COPIES:
        raise ValueError(
            f"TableRoutes takes fewer than {MAX_COPIES} copies, got {entry_C.numel()}: their order has 32 bits; use fewer tokens at once"
        )
    expected: dict[str, tuple[Tensor | None, tuple[torch.dtype, ...]]] = {
        "entry_C": (entry_C, INTEGERS),
        "row_C": (row_C, (torch.int64,)),
        "output_C": (output_C, (torch.int64,)),
        "order_C": (order_C, (torch.int32,)),
    }
    for name, (tensor, dtypes) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != (entry_C.numel(),) or tensor.dtype not in dtypes or tensor.device != entry_C.device:
            raise ValueError(
                f"{name} must be [{entry_C.numel()}] of {' or '.join(map(str, dtypes))} on {entry_C.device}, one number for each copy, got "
                f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            )


def _check_ascending(name: str, index_C: Tensor, size: int) -> None:
    if (index_C[1:] < index_C[:-1]).any():
        raise ValueError(f"{name} must ascend, but does not: give the copies in the order of their rows")
    _check_range(name, index_C, size)


def _check_order(order_C: Tensor, entry_C: Tensor) -> None:
    """No two neighbours out of order means each copy once: a step along the order is up in the entry, or else in the copy."""
    _check_range("order_C", order_C, len(entry_C))
    up_C = entry_C.index_select(0, order_C).diff()
    wrong_C = (up_C < 0) | ((up_C == 0) & (order_C.diff() <= 0))
    if wrong_C.any():
        place = int(wrong_C.nonzero()[0])
        copies = order_C[place : place + 2]
        raise ValueError(
            f"order_C must hold each copy once, sorted stably by entry_C, got the copies {copies.tolist()} of the entries "
            f"{entry_C[copies].tolist()} at the places {place} and {place + 1}: pass what a stable sort gave, or leave it out"
        )


def _check_range(name: str, index_C: Tensor, size: int) -> None:
    low, high = (int(value) for value in torch.aminmax(index_C)) if index_C.numel() else (0, -1)
    if low < 0 or high >= size:
        raise ValueError(f"{name} must be in [0, {size}), got {low} to {high}: it names rows that are not there")
