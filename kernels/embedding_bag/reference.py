"""embedding_bag as its definition reads, for tests to compare with, in any dtype. Called by: kernels/embedding_bag, its tests."""

import torch
from torch import Tensor

from kernels.tables.routes import TableRoutes


def reference(table_LD: Tensor, gates_C: Tensor, routes: TableRoutes) -> Tensor:
    """output[p] = sum over the copies c of output row p of gate_c * table[entry_c]; float32 at least."""
    rows_CD = table_LD[routes.entry_C].to(torch.promote_types(table_LD.dtype, torch.float32))
    sums_PD = rows_CD.new_zeros(routes.num_outputs, table_LD.shape[1])
    return sums_PD.index_add(0, routes.output_C, gates_C[:, None].to(rows_CD.dtype) * rows_CD)
