"""The best scores of each query and their keys, by torch. Called by: kernels/top_k_attention/cpu.py and the tests."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """The chosen scores of each query and their keys, (..., K); the keys are int32."""

    scores: Tensor
    keys: Tensor


def select_top_k(scores: Tensor, top_k: int) -> Kept:
    """The top_k largest of the last axis, which must be longer; of equal scores the first. The order inside the result is unspecified.

    torch.topk promises nothing about ties, so it is asked for one more: only where the last two agree did it have a choice, and only
    those rows are done again, by counting.
    """
    values, keys = _top(scores, top_k + 1)
    border = values[..., top_k]
    tied = (values[..., top_k - 1] == border) & (border > -torch.inf)  # -inf: a masked key, which has no weight
    values, keys = values[..., :top_k].contiguous(), keys[..., :top_k].int()
    if tied.any():
        tied_scores, border = scores[tied], border[tied][:, None]
        above, equal = ~(tied_scores <= border), tied_scores == border  # topk puts NaN above all, so does this
        room = top_k - above.sum(-1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
        tied_keys = chosen.nonzero()[:, -1].view(-1, top_k)
        keys[tied] = tied_keys.int()
        values[tied] = tied_scores.gather(-1, tied_keys)
    return Kept(values, keys)


def _top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """scores.topk(count), descending. The best are in the `count` groups with the largest maxima: two short searches for one long one.

    For 65 of 4,096 numbers a third of the time, for 65 of 16,384 a fifth.
    """
    length = scores.shape[-1]
    depth = math.isqrt(length // count)  # of a group: then both searches are about equally long
    if depth < 3:
        return scores.topk(count, dim=-1)
    groups = length // depth
    maxima = scores[..., : depth * groups].unflatten(-1, (depth, groups)).amax(-2)
    chosen = maxima.topk(count, dim=-1, sorted=False).indices
    places = (chosen[..., None] + groups * torch.arange(depth, device=scores.device)).flatten(-2)
    rest = torch.arange(depth * groups, length, device=scores.device)
    places = torch.cat([places, rest.expand(*places.shape[:-1], -1)], -1)
    values, found = scores.gather(-1, places).topk(count, dim=-1)
    return values, places.gather(-1, found)
