"""sum_copies: the copies of a row added up in a fixed order. The second half of every kernel that reduces over the choices.

Owns: which copies belong to a row, and in which order they are added. Does not own: what the copies are.
Called by: kernels/grouped_matmul (the sum per output row; backward, the sum per input row). Not differentiable: it is used
inside the operations that are. A float atomic would save the pass over the copies, and its sums would differ from run to
run; a program per row would read an expert's weights for each of its copies, M * N elements instead of N.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.availability import why_not_triton


@dataclass(frozen=True)
class RowCopies:
    """The copies of each of P rows: row p has order_C[ends_P[p-1] : ends_P[p]], added in that order. Both int32.

    `of` makes them ascend in each row. A caller that knows another fixed order may make its own (model/dispatch.py does).
    """

    order_C: Tensor
    ends_P: Tensor

    @staticmethod
    def of(index_C: Tensor, *, num_rows: int) -> "RowCopies":
        """From the row of each copy, in [0, num_rows), ascending in each row; by a stable sort, without waiting for the device."""
        rows_C, order_C = index_C.sort(stable=True)
        rows_P = torch.arange(num_rows, device=index_C.device, dtype=index_C.dtype)
        return RowCopies(order_C.int(), torch.searchsorted(rows_C, rows_P, right=True, out_int32=True))


def sum_copies(copies_CN: Tensor, copies: RowCopies) -> Tensor:
    """sums_PN in the dtype of copies_CN (contiguous; on a GPU, or in Triton's interpreter), accumulated in float32 in the order of order_C.

    A row without copies is exactly zero.

    Raises:
        ValueError: tensors that no Triton kernel can run on, or copies that are not contiguous.
    """
    if reason := why_not_triton(copies_CN.device.type):
        raise ValueError(f"sum_copies: {reason}")
    if not copies_CN.is_contiguous():
        raise ValueError(f"the copies to sum must be contiguous, got strides {copies_CN.stride()}: copy them")
    from kernels.sum_copies.kernel import add

    return add(copies_CN, copies.order_C, copies.ends_P)
