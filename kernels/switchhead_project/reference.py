"""SwitchHead's V and O as their definitions read, for tests to compare with: one expert after the other, in any dtype.

Owns: what the right answer is. Does not own: checks (the public functions). Called by: kernels/switchhead_project, its tests, its
benchmark.
"""

import torch
from torch import Tensor


def project_values(x_TD: Tensor, weights_GDC: Tensor, gates_THK: Tensor, experts_THK: Tensor) -> Tensor:
    """(T, H, C): sum_k gate[t,h,k] * (x[t] @ W[h*E + expert[t,h,k]])."""
    tokens, heads, _ = gates_THK.shape
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    sums_THC = x_TD.new_zeros(tokens, heads, weights_GDC.shape[2], dtype=wide)
    for group, weight_DC in enumerate(weights_GDC):
        head, expert = divmod(group, len(weights_GDC) // heads)
        token_N, choice_N = (experts_THK[:, head] == expert).nonzero(as_tuple=True)
        results_NC = (x_TD[token_N] @ weight_DC) * gates_THK[token_N, head, choice_N, None]
        sums_THC = sums_THC.index_put((token_N, torch.full_like(token_N, head)), results_NC.to(wide), accumulate=True)
    return sums_THC.to(x_TD.dtype)


def project_outputs(y_THC: Tensor, weights_GCD: Tensor, gates_THK: Tensor, experts_THK: Tensor) -> Tensor:
    """(T, D): sum_h,k (gate[t,h,k] * y[t,h]) @ W[h*E + expert[t,h,k]]."""
    heads = gates_THK.shape[1]
    wide = torch.promote_types(y_THC.dtype, torch.float32)
    sums_TD = y_THC.new_zeros(len(y_THC), weights_GCD.shape[2], dtype=wide)
    for group, weight_CD in enumerate(weights_GCD):
        head, expert = divmod(group, len(weights_GCD) // heads)
        token_N, choice_N = (experts_THK[:, head] == expert).nonzero(as_tuple=True)
        gated_NC = (y_THC[token_N, head] * gates_THK[token_N, head, choice_N, None]).to(y_THC.dtype)
        sums_TD = sums_TD.index_add(0, token_N, (gated_NC @ weight_CD).to(wide))
    return sums_TD.to(y_THC.dtype)
