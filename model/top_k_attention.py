"""Attention over all visible keys or over the k best of each query, with memory linear in the length: the model's entrance to it.

Owns: `top_k_attend`, which turns a KeyMask into what kernels/top_k_attention reads, and the dropout of the kept probabilities. Does not
own: the computation (kernels/top_k_attention), projections, positions, the caches of decoding. Called by the mixers in place of a dense
softmax attention.

Source: Gupta, Dar, Goodman, Ciprut, Berant, "Memory-efficient Transformers via Top-k Attention", arXiv 2106.06899.

Shape letters: B rows, H heads, G heads of k and v, S queries, M keys, C head width, R queries of one chunk, K kept keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.top_k_attention import top_k_attention
from model.context import BatchContext, keep_at
from model.mask import KeyMask


@dataclass(frozen=True)
class AttentionDropout:
    """Dropout of attention probabilities in training, with its place in the network; 0 <= probability < 1."""

    context: BatchContext
    probability: float
    site: str = "attention"

    def apply(self, x_BHRK: Tensor, *, query_R: Tensor, key: Tensor) -> Tensor:
        """x, or 0 in its place, over 1 - probability; also what takes gradients back. Offsets in the row, int64; key like x or (K,)."""
        heads = torch.arange(x_BHRK.shape[1], device=x_BHRK.device)
        coordinates = (heads[None, :, None, None], query_R[:, None], key)
        keep = keep_at(self.context, *coordinates, probability=self.probability, site=self.site)
        return (x_BHRK * keep).div_(1 - self.probability)


def top_k_attend(
    q_BHSC: Tensor,
    k_BGMC: Tensor,
    v_BGMC: Tensor,
    *,
    mask: KeyMask,
    top_k: int | None,
    chunk: int,
    scale: float,
    relative: tuple[Tensor, Tensor] | None = None,
    drop: AttentionDropout | None = None,
    backend: str = "torch",
) -> Tensor:
    """softmax over the top_k best visible keys of each query, times v: (B, H, S, C); v may have a C of its own.

    All but the mask is what `kernels.top_k_attention.top_k_attention` takes; `candidates` there says which backends can serve.

    Raises:
        ValueError: what that function refuses, or a mask of other sizes.
    """
    if q_BHSC.shape[2] != mask.num_queries or k_BGMC.shape[2] != mask.num_keys:
        raise ValueError(
            f"q {tuple(q_BHSC.shape)} and k {tuple(k_BGMC.shape)} must be (B, H, S, C) and (B, G, M, C) with the mask's S = "
            f"{mask.num_queries} and M = {mask.num_keys}: make the mask from their lengths"
        )
    return top_k_attention(
        q_BHSC, k_BGMC, v_BGMC, top_k=top_k, scale=scale, first_BS=mask.first_keys(), chunk=chunk, relative=relative,
        drop=drop, backend=backend,
    )  # fmt: skip
