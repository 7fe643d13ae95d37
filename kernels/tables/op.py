"""The passes over a table as operations of torch, for backward passes: products, sums, and the gradient of the table itself.

Owns: the custom operations, and whether a gradient is written or spent at once on a step of Adam. Does not own: the kernels (by_row.py,
by_entry.py), the state of Adam (kernels/tables/adam.py).
Called by: the backward passes in kernels/peer_experts/op.py and kernels/embedding_bag/op.py.
"""

import torch
from torch import Tensor

from kernels.tables.adam import PendingStep, RowAdam
from kernels.tables.by_entry import add_runs
from kernels.tables.by_row import products, weighted_sums


@torch.library.custom_op("switchyard::table_products", mutates_args=())
def products_op(rows_RD: Tensor, table_LD: Tensor, entry_C: Tensor, ends_R: Tensor) -> Tensor:
    """row . table[entry] of each copy (C,), float32."""
    return products(rows_RD, table_LD, entry_C, ends_R).products_C


@products_op.register_fake
def _(rows_RD, table_LD, entry_C, ends_R):
    return rows_RD.new_empty(len(entry_C), dtype=torch.float32)


@torch.library.custom_op("switchyard::table_sums", mutates_args=())
def sums_op(table_LD: Tensor, weights_C: Tensor, entry_C: Tensor, ends_R: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, D) in `dtype`: of each row the sum of weight * table[entry] over its copies."""
    return weighted_sums(table_LD, weights_C, entry_C, ends_R, dtype=dtype)


@sums_op.register_fake
def _(table_LD, weights_C, entry_C, ends_R, dtype):
    return table_LD.new_empty(len(ends_R), table_LD.shape[1], dtype=dtype)


@torch.library.custom_op("switchyard::table_gradient", mutates_args=())
def gradient_op(
    source_RD: Tensor,
    index_C: Tensor,
    weights_C: Tensor,
    entry_C: Tensor,
    order_C: Tensor,
    num_entries: int,
    dtype: torch.dtype,
) -> Tensor:
    """(L, D) in `dtype`: of each entry the sum over its copies of weight * source[index]; exact zeros for an entry without copies."""
    out_LD = source_RD.new_zeros(num_entries, source_RD.shape[1], dtype=dtype)
    add_runs(source_RD, index_C, weights_C, entry_C, order_C, out_LD)
    return out_LD


@gradient_op.register_fake
def _(source_RD, index_C, weights_C, entry_C, order_C, num_entries, dtype):
    return source_RD.new_empty(num_entries, source_RD.shape[1], dtype=dtype)


@torch.library.custom_op("switchyard::table_adam", mutates_args=("table_LD", "exp_avg_LD", "exp_avg_sq_LD", "steps_L"))
def adam_op(
    table_LD: Tensor,
    exp_avg_LD: Tensor,
    exp_avg_sq_LD: Tensor,
    steps_L: Tensor,
    source_RD: Tensor,
    index_C: Tensor,
    weights_C: Tensor,
    entry_C: Tensor,
    order_C: Tensor,
    settings: list[float],
) -> None:
    """Steps the touched rows of the table by what `gradient_op` would give: see RowAdam."""
    state = (exp_avg_LD, exp_avg_sq_LD, steps_L)
    add_runs(source_RD, index_C, weights_C, entry_C, order_C, table_LD, state=state, settings=settings)


def table_gradient(
    table_LD: Tensor, source_RD: Tensor, index_C: Tensor, weights_C: Tensor, entry_C: Tensor, order_C: Tensor, *,
    step: PendingStep | None,
) -> Tensor | None:  # fmt: skip
    """The gradient of the table, in its dtype; None where there is a step, which the table has then made."""
    copies = (source_RD, index_C, weights_C, entry_C, order_C)
    if step is None:
        return gradient_op(*copies, len(table_LD), table_LD.dtype)
    adam_op(table_LD, *step.state, *copies, list(step.settings))
    return None


def contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What the kernels take: other strides are copied."""
    return tuple(tensor.contiguous() for tensor in tensors)


def of_adam(*adams: RowAdam | None) -> tuple[list[Tensor], list[float]]:
    """State and settings of the RowAdams of an operation's tables, one after the other; nothing where there are none."""
    found = [adam for adam in adams if adam is not None]
    return [tensor for adam in found for tensor in adam.state], [number for adam in found for number in adam.settings]


def of_no_adam(num_state: int) -> tuple[list[None], list[None] | None]:
    """What a backward pass returns for state and settings: torch takes a list of tensors, and an empty one, for several inputs."""
    return [None] * num_state, None if num_state else []
