"""peer_experts as its definition reads, for tests to compare with, in any dtype. Called by: kernels/peer_experts, its tests."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.tables.routes import TableRoutes


def reference(
    rows_RD: Tensor, up_LD: Tensor, down_LD: Tensor, gates_C: Tensor, *, routes: TableRoutes, activation: str
) -> Tensor:
    """output[p] = sum over the copies c of output row p of gate_c * activation(row_c . up[entry_c]) * down[entry_c]."""
    z_C = products_reference(rows_RD, up_LD, routes=routes)
    weights_C = gates_C * {"gelu": F.gelu, "relu": F.relu}[activation](z_C)
    results_CD = weights_C[:, None] * down_LD[routes.entry_C].to(weights_C.dtype)
    sums_PD = results_CD.new_zeros(routes.num_outputs, rows_RD.shape[1])
    return sums_PD.index_add(0, routes.output_C, results_CD).to(rows_RD.dtype)


def products_reference(rows_RX: Tensor, up_LX: Tensor, *, routes: TableRoutes) -> Tensor:
    """z_c = row_c . up[entry_c], float32 at least."""
    wide = torch.promote_types(torch.promote_types(rows_RX.dtype, up_LX.dtype), torch.float32)
    return (rows_RX[routes.row_C].to(wide) * up_LX[routes.entry_C].to(wide)).sum(1)
