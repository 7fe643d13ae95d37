"""top_k_attention as its definition reads, for tests to compare with: all scores at once, in any dtype, under plain autograd.

Owns: what the right answer is. Does not own: checks (the public function). Called by: kernels/top_k_attention, its tests, its benchmark.
"""

import torch
from torch import Tensor


def reference(
    q_BHSC: Tensor, k_BGMC: Tensor, v_BGMD: Tensor, *, top_k: int, scale: float, first_BS: Tensor | None = None
) -> Tensor:
    """softmax over the top_k best visible keys of each query, the first ones of equal scores, times v; in float32 at least.

    A score of -inf has no weight, whether the key is not seen or the product overflowed.
    """
    wide = torch.promote_types(q_BHSC.dtype, torch.float32)
    k_BHMC, v_BHMD = (each.repeat_interleave(q_BHSC.shape[1] // each.shape[1], dim=1) for each in (k_BGMC, v_BGMD))
    scores = q_BHSC.to(wide) @ k_BHMC.to(wide).mT
    num_queries, num_keys = scores.shape[-2:]
    key_M = torch.arange(num_keys, device=scores.device)
    visible = key_M <= torch.arange(num_keys - num_queries, num_keys, device=scores.device)[:, None]
    if first_BS is not None:
        visible = visible & (key_M >= first_BS[:, None, :, None])
    scores = scores.masked_fill(~visible, -torch.inf)
    order = scores.detach().sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :top_k], True) & ~scores.isneginf()
    sees = chosen.any(-1, keepdim=True)  # a query without weights gets zeros, not the softmax of nothing
    weights = scores.masked_fill(~chosen & sees, -torch.inf).masked_fill(~sees, 0.0).mul(scale).softmax(-1) * sees
    return (weights @ v_BHMD.to(wide)).to(v_BHMD.dtype)
