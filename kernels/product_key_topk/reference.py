"""product_key_topk as its definition reads, in any dtype: all sub-scores, the best of each half, all pairs of those.

Owns: what the right answer is. Does not own: checks (the public function). Called by: kernels/product_key_topk, its tests, its benchmark.
"""

import torch
from torch import Tensor


def reference(queries_TPZC: Tensor, keys_HZJC: Tensor, *, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """scores_THK, first_THK, second_THK: see the public function.

    The K best pairs lie among the K best of both halves (arXiv 1907.05242, section 3.2). A stable sort of them in the order of their
    ids a J + b lets the lowest id win between equal scores.
    """
    num_keys = keys_HZJC.shape[2]
    scores_THZJ = (queries_TPZC.permute(1, 2, 0, 3) @ keys_HZJC.mT).permute(2, 0, 1, 3)
    order_THZI = scores_THZJ.detach().sort(dim=-1, descending=True, stable=True).indices[..., : min(top_k, num_keys)]
    first_THI, second_THI = order_THZI.sort(dim=-1).values.unbind(2)
    ids_THQ = (first_THI[..., :, None] * num_keys + second_THI[..., None, :]).flatten(2)  # ascending
    of_first_THJ, of_second_THJ = scores_THZJ.unbind(2)
    sums_THQ = of_first_THJ.gather(2, ids_THQ // num_keys) + of_second_THJ.gather(2, ids_THQ % num_keys)
    best_THK = sums_THQ.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    chosen_THK = ids_THQ.gather(2, best_THK)
    return sums_THQ.gather(2, best_THK), torch.div(chosen_THK, num_keys, rounding_mode="floor"), chosen_THK % num_keys
