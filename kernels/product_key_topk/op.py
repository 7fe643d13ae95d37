"""product_key_topk as an operation of torch: what torch.compile sees, and what autograd calls.

Owns: the custom operations, their shapes, what is saved for the backward pass, the order of its launches. Does not own: the kernels
(kernel.py), checks and autocast (the public function). Called by: kernels/product_key_topk, which imports it only where Triton is there.

Saved are the inputs and the ids of the picks, whose stable sort by sub-key is made in the backward pass.
"""

# pyright: reportArgumentType=false
# torch.library passes plain tensors to what it registers.

from typing import Any

import torch
from torch import Tensor

from kernels.product_key_topk.kernel import launch_choose, launch_of_keys, launch_of_queries
from kernels.sum_copies import RowCopies


@torch.library.custom_op("switchyard::product_key_topk", mutates_args=())
def choose_op(queries_TPZC: Tensor, keys_HZJC: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """scores_THK, first_THK, second_THK. Contiguous float32; both have H heads or 1."""
    return launch_choose(queries_TPZC, keys_HZJC, top_k=top_k)


@choose_op.register_fake
def _choose_fake(queries_TPZC, keys_HZJC, top_k):
    shape = (len(queries_TPZC), max(queries_TPZC.shape[1], keys_HZJC.shape[0]), top_k)
    ids = (queries_TPZC.new_empty(shape, dtype=torch.int64) for _ in range(2))
    return queries_TPZC.new_empty(shape), *ids


@torch.library.custom_op("switchyard::product_key_topk_backward", mutates_args=())
def backward_op(
    gradient_THK: Tensor,
    queries_TPZC: Tensor,
    keys_HZJC: Tensor,
    first_THK: Tensor,
    second_THK: Tensor,
    of_queries: bool,
    of_keys: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of queries and keys; of what is not asked for an empty tensor."""
    queries_gradient, keys_gradient = queries_TPZC.new_empty(0), keys_HZJC.new_empty(0)
    if of_queries:
        queries_gradient = launch_of_queries(gradient_THK, keys_HZJC, first_THK, second_THK)
        if queries_TPZC.shape[1] < queries_gradient.shape[1]:
            queries_gradient = queries_gradient.sum(1, keepdim=True)
    if of_keys:
        copies = _by_sub_key(first_THK, second_THK, keys_HZJC)
        keys_gradient = launch_of_keys(gradient_THK, queries_TPZC, copies, shape=tuple(keys_HZJC.shape))
    return queries_gradient, keys_gradient


@backward_op.register_fake
def _backward_fake(gradient_THK, queries_TPZC, keys_HZJC, first_THK, second_THK, of_queries, of_keys):
    asked = ((queries_TPZC, of_queries), (keys_HZJC, of_keys))
    return tuple(torch.empty_like(tensor) if of_it else tensor.new_empty(0) for tensor, of_it in asked)


def _by_sub_key(first_THK: Tensor, second_THK: Tensor, keys_HZJC: Tensor) -> RowCopies:
    """The picks (t, h, k, z) in the order of their sub-key (h, z, j), or (z, j) where all heads share them."""
    (_, H, _), (k_heads, _, J, _) = first_THK.shape, keys_HZJC.shape
    head_H = torch.arange(H, device=first_THK.device) % k_heads
    set_HZ = head_H[:, None] * 2 + torch.arange(2, device=first_THK.device)
    rows_THKZ = torch.stack([first_THK, second_THK], dim=3) + set_HZ[:, None] * J
    return RowCopies.of(rows_THKZ.flatten().int(), num_rows=k_heads * 2 * J)  # 32 bits: half as much to sort


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    queries_TPZC, keys_HZJC, _ = inputs
    ctx.save_for_backward(queries_TPZC, keys_HZJC, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient_THK: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    asked = ctx.needs_input_grad[:2]
    found = backward_op(gradient_THK.contiguous(), *ctx.saved_tensors, *asked)
    return *(each if of_it else None for each, of_it in zip(found, asked, strict=True)), None


choose_op.register_autograd(_backward, setup_context=_save)
