"""grouped_matmul of routed copies around any plain one: gather, matmul, activation, gate, sum per output row.

Owns: what the routed arguments mean, for the backends without a fused kernel. Does not own: the matmul, the checks.
Called by: kernels/grouped_matmul and its tests.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.sum_copies import RowCopies

ACTIVATIONS = ("none", "relu")
GATE_SIDES = ("before", "after")


@dataclass(frozen=True, kw_only=True)
class Routes:
    """How copies are read, gated and summed: the optional arguments of grouped_matmul, by the same names."""

    row_index_C: Tensor | None = None
    activation: str = "none"
    gates_C: Tensor | None = None
    gate_side: str = "after"
    output_index_C: Tensor | None = None
    num_outputs: int | None = None
    output_copies: RowCopies | None = None
    row_copies: RowCopies | None = None


def by_parts(
    matmul: Callable[..., Tensor], rows_RM: Tensor, weights_GMN: Tensor, *, offsets_G: Tensor, routes: Routes
) -> Tensor:
    """rows_CN, or sums_PN with an output index. Sums in float32 at least, rounded once to the dtype of the product."""
    copies_CM = rows_RM if routes.row_index_C is None else rows_RM.index_select(0, routes.row_index_C)
    if routes.gates_C is not None and routes.gate_side == "before":
        copies_CM = (copies_CM * routes.gates_C[:, None]).to(copies_CM.dtype)
    product_CN = matmul(copies_CM, weights_GMN, offsets_G=offsets_G)
    if routes.activation == "relu":
        product_CN = product_CN.relu()
    wide_CN = product_CN
    if routes.gates_C is not None and routes.gate_side == "after":
        wide_CN = product_CN * routes.gates_C[:, None]
    if routes.output_index_C is None or routes.num_outputs is None:
        return wide_CN.to(product_CN.dtype)
    wide_CN = wide_CN.to(torch.promote_types(wide_CN.dtype, torch.float32))
    sums_PN = wide_CN.new_zeros(routes.num_outputs, wide_CN.shape[1])
    return sums_PN.index_add(0, routes.output_index_C, wide_CN).to(product_CN.dtype)
