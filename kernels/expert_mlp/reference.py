"""expert_mlp as its definition reads, for tests to compare with: one group after the other, in any dtype.

Owns: what the right answer is. Does not own: checks (the public function). Called by: kernels/expert_mlp, its tests, its benchmark.
"""

import torch
from torch import Tensor


def reference(
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
) -> Tensor:
    """output[p] = sum over the copies c of output row p of (gate * relu(row @ W1[group]) [* factors]) @ W2[group]."""
    ends = offsets_L.tolist()
    results = []
    for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        hidden = (rows_RD[row_index_C[start:end]] @ up_LDF[group]).relu() * gates_C[start:end, None]
        if factors_CF is not None:
            hidden = hidden * factors_CF[start:end]
        results.append(hidden.to(rows_RD.dtype) @ down_LFD[group])
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    sums_PD = rows_RD.new_zeros(num_outputs, rows_RD.shape[1], dtype=wide)
    return sums_PD.index_add(0, output_index_C, torch.cat(results).to(wide)).to(rows_RD.dtype)
