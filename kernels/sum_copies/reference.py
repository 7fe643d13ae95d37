"""sum_copies as a loop. Called by: kernels/sum_copies and its tests."""

import torch
from torch import Tensor


def reference(copies_CN: Tensor, index_C: Tensor, *, num_rows: int) -> Tensor:
    """sums_PN: row p is the sum of the copies c with index_C[c] == p, in float32 at least, rounded once."""
    sums_PN = torch.zeros(num_rows, copies_CN.shape[1], dtype=torch.promote_types(copies_CN.dtype, torch.float32))
    for copy, row in enumerate(index_C.tolist()):
        sums_PN[row] += copies_CN[copy].to(sums_PN.dtype)
    return sums_PN.to(copies_CN.dtype)
