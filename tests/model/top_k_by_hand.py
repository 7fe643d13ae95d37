"""Top-k attention on whole matrices under plain autograd, and by loops over single scores, for the tests of its chunked form.

Owns: small operands and masks, the right answer (arXiv 2106.06899), the comparison of outputs and gradients by name. No code of
kernels/top_k_attention but the call under test. Called by test_top_k_attention.py and test_top_k_backward.py.
"""

import math
from typing import Any

import torch
from torch import Tensor

from model.mask import KeyMask
from model.top_k_attention import top_k_attend
from tests.model.build import normal

WIDTH = 5
SCALE = WIDTH**-0.5
CPU = torch.device("cpu")
NAMES = ("q", "k", "v", "q_position", "r")


class BlindQuery(KeyMask):
    """Queries 0 and 1 see the keys up to their own, 2 sees nothing, and the keys from 3 on are seen from then on. Of two rows."""

    def first_keys(self) -> Tensor:
        return torch.tensor([0, 0] + [3] * (self.num_queries - 2)).expand(2, -1)


def causal(length: int, earlier: int = 0, **facts: Any) -> KeyMask:
    return KeyMask(num_queries=length, num_keys=earlier + length, device=CPU, **facts)


def operands(mask: KeyMask, *, relative: bool = False, batch: int = 2, heads: int = 2) -> list[Tensor]:
    """q, k, v and perhaps q_position and r, that want gradients."""
    by_query, by_key = (batch, heads, mask.num_queries, WIDTH), (batch, heads, mask.num_keys, WIDTH)
    shapes = [by_query, by_key, by_key] + [by_query, (heads, mask.num_keys, WIDTH)] * relative
    return [normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def attend(inputs: list[Tensor], mask: KeyMask, *, top_k: int | None, chunk: int = 4, **more: Any) -> Tensor:
    q, k, v, *relative = inputs
    return top_k_attend(q, k, v, mask=mask, top_k=top_k, chunk=chunk, scale=SCALE, relative=tuple(relative) or None, **more)  # type: ignore[arg-type]  # fmt: skip


def dense(inputs: list[Tensor], mask: KeyMask, *, top_k: int | None = None, factor: Tensor | None = None) -> Tensor:
    """All scores at once: mask, keep the first top_k of a stable sort, softmax, dropout factor."""
    q, k, v, *relative = inputs
    scores = torch.einsum("bhic,bhjc->bhij", q, k)
    if relative:
        scores = scores + positional_term(*relative)
    visible = mask.rows(0, mask.num_queries).expand_as(scores)
    if top_k is not None:
        order = scores.detach().masked_fill(~visible, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        visible = visible & torch.zeros_like(visible).scatter(-1, order[..., :top_k], True)
    seeing = visible.any(-1, keepdim=True)
    weights = (scores * SCALE).masked_fill(~visible & seeing, -torch.inf).softmax(-1) * seeing
    return (weights if factor is None else weights * factor) @ v


def positional_term(q_position: Tensor, r: Tensor) -> Tensor:
    """Distance by distance: row M - 1 - d of r belongs to the distance d."""
    (batch, heads, length, _), num_keys = q_position.shape, r.shape[1]
    term = torch.zeros(batch, heads, length, num_keys, dtype=r.dtype)
    for distance in range(num_keys):
        for i in range(length):
            j = i + num_keys - length - distance
            if j >= 0:
                term[:, :, i, j] = (q_position[:, :, i] * r[:, num_keys - 1 - distance]).sum(-1)
    return term


def by_loop(inputs: list[Tensor], mask: KeyMask, *, top_k: int) -> Tensor:
    """One query after the other in Python numbers: exponentials of the best scores, ties to the lowest key."""
    q, k, v = (x.tolist() for x in inputs)
    visible = mask.rows(0, mask.num_queries).expand(len(q), -1, -1, -1).tolist()
    y = torch.zeros_like(inputs[0])
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in y.shape[:3])).tolist():
        score = {
            j: sum(x * z for x, z in zip(q[b][h][i], k[b][h][j], strict=True))
            for j in range(len(k[b][h]))
            if visible[b][0][i][j]
        }
        best = sorted(score, key=lambda j: (-score[j], j))[:top_k]
        powers = [math.exp(score[j] * SCALE) for j in best]
        for c in range(WIDTH):
            y[b, h, i, c] = sum(power * v[b][h][j][c] for power, j in zip(powers, best, strict=True)) / sum(powers)
    return y.detach()


def assert_same(actual: Tensor, expected: Tensor, inputs: list[Tensor], tolerance: float = 1e-11) -> None:
    """The outputs, and every gradient by name under one random gradient of the output."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    dy = normal(*actual.shape, seed=99)
    pairs = zip(NAMES, torch.autograd.grad(actual, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=False)
    for name, got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def weights_of(q: Tensor, k: Tensor, mask: KeyMask, *, top_k: int | None, **more: Any) -> Tensor:
    """The attention matrix (B, H, S, M), read off by giving every key its own value channel."""
    eye = torch.eye(mask.num_keys, dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return attend([q, k, eye], mask, top_k=top_k, **more)
