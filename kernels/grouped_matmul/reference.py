"""grouped_matmul as its definition reads, for tests to compare with: one group after the other, in any dtype.

Owns: what the right answer is. Does not own: checks (the public function).
Called by: kernels/grouped_matmul, its tests and its benchmark.
"""

import torch
from torch import Tensor


def reference(rows_RM: Tensor, weights_GMN: Tensor, *, offsets_G: Tensor) -> Tensor:
    """Returns rows_RN: rows offsets_G[g-1] to offsets_G[g], multiplied by weights_GMN[g], for every g."""
    products = []
    start = 0
    for group, end in enumerate(offsets_G.tolist()):
        products.append(rows_RM[start:end] @ weights_GMN[group])
        start = end
    return torch.cat(products)
