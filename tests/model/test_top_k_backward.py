"""What backward of the chunked attention repeats and keeps: dropout, dtypes, memory. Invariants numbered as in test_top_k_attention.py."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from model.context import keep_at, keep_mask
from model.mask import KeyMask
from model.top_k_attention import AttentionDropout, top_k_attend
from tests.model.build import context, normal
from tests.model.top_k_by_hand import NAMES, WIDTH, assert_same, attend, causal, dense, operands, weights_of


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("relative", [False, True], ids=["", "relative"])
@pytest.mark.parametrize("probability", [0.0, 0.4])
def test_invariant_8_gradients_equal_finite_differences_over_three_chunks_also_with_dropout(
    top_k, relative, probability
):
    mask = causal(5, 2)
    drop = AttentionDropout(context(1), probability=probability)
    inputs = operands(mask, relative=relative, batch=1, heads=1)
    assert torch.autograd.gradcheck(lambda *x: attend(list(x), mask, top_k=top_k, chunk=2, drop=drop), inputs)


def keep_by_coordinates(drop: AttentionDropout, mask: KeyMask, batch: int, heads: int) -> Tensor:
    """Element by element, as the module says: row, head, offset of the query, offset of the key."""
    where = [torch.arange(n) for n in (heads, mask.num_queries, mask.num_keys)]
    keep = torch.zeros(batch, *(len(x) for x in where), dtype=torch.bool)
    place = {"probability": drop.probability, "site": drop.site}
    for h, i, j in torch.cartesian_prod(*where).tolist():
        coordinates = (h, i, j - (mask.num_keys - mask.num_queries))
        keep[:, h, i, j] = keep_at(drop.context, *(torch.tensor([x]) for x in coordinates), **place)
    return keep


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("chunk", [9, 4, 1])
def test_dropout_is_a_function_of_coordinates_and_the_same_in_every_chunk(top_k, chunk):
    mask = causal(5, 4)
    drop = AttentionDropout(context([3, 2**40], depth=1), probability=0.4)
    inputs = operands(mask, relative=True)
    factor = keep_by_coordinates(drop, mask, 2, 2) / torch.tensor(0.6, dtype=torch.float64)
    expected = dense(inputs, mask, top_k=top_k, factor=factor)
    assert_same(attend(inputs, mask, top_k=top_k, chunk=chunk, drop=drop), expected, inputs)


def test_two_calls_before_backward_and_recompute_keep_their_own_dropout():
    mask, inputs = causal(12), operands(causal(12))
    first, second = (AttentionDropout(context(2, step=step), probability=0.4) for step in (0, 1))
    run = [lambda *x, drop=drop: attend(list(x), mask, top_k=3, drop=drop) for drop in (first, second)]
    alone = [torch.autograd.grad(call(*inputs).square().sum(), inputs) for call in run]
    assert not torch.allclose(alone[0][2], alone[1][2])
    for together in (
        [call(*inputs) for call in run],
        [checkpoint(call, *inputs, use_reentrant=False) for call in run],
    ):
        got = torch.autograd.grad(sum(y.square().sum() for y in together), inputs)  # type: ignore[union-attr,arg-type]
        for name, *parts in zip(NAMES, got, *alone, strict=False):
            torch.testing.assert_close(parts[0], parts[1] + parts[2], rtol=0, atol=1e-12, msg=name)


def test_dropout_keeps_its_share_of_the_weights_and_scales_them():
    mask = causal(64)
    q, k, _ = (x.detach() for x in operands(mask))
    drop = AttentionDropout(context(2), probability=0.25)
    plain, dropped = (weights_of(q, k, mask, top_k=40, drop=x) for x in (None, drop))
    kept = dropped[plain > 0] > 0
    assert abs(kept.double().mean() - 0.75) < 5 * (0.75 * 0.25 / kept.numel()) ** 0.5
    torch.testing.assert_close(dropped, plain / 0.75 * (dropped > 0), rtol=1e-12, atol=0)


def test_keep_at_all_offsets_and_channels_is_the_keep_mask():
    facts, place = context([0, 7, 2**33], depth=4), {"probability": 0.3, "site": "mixer"}
    offset, channel = torch.arange(6)[None, :, None], torch.arange(9, dtype=torch.int32)
    assert torch.equal(keep_at(facts, offset, channel, **place), keep_mask(facts, 6, 9, **place))


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def memory_of(length: int, **settings: Any) -> tuple[int, int, set[torch.dtype]]:
    """(elements of the largest tensor of forward and backward, bytes kept for backward, their dtypes), in float32."""
    mask = causal(length)
    inputs = [x.float().detach().requires_grad_() for x in operands(mask, relative=True, batch=1)]
    drop = AttentionDropout(context(1), probability=0.1)
    saved: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            y = attend(inputs, mask, drop=drop, **settings)
        y.backward(torch.ones_like(y))
    kept = [x for x in saved if not any(x is given for given in inputs)]
    return largest.numel, sum(x.numel() * x.element_size() for x in kept), {x.dtype for x in kept}


@pytest.mark.parametrize("top_k", [None, 8, 500])
def test_invariant_9_nothing_is_larger_than_one_chunk_of_scores_and_what_is_kept_is_linear(top_k):
    """The widest is the positional term's gradient, with chunk - 1 columns more. Process memory: benchmarks/model/bench_top_k_memory.py."""
    for length in (64, 128):
        largest, kept, dtypes = memory_of(length, top_k=top_k, chunk=8)
        assert largest <= 2 * 8 * (length + 8)
        selecting = length - 8 if top_k == 8 else 0  # the first chunk reaches 8 keys and keeps them all
        assert kept == 2 * selecting * 8 * (4 + 4)
        assert dtypes == ({torch.float32, torch.int32} if selecting else set())


@pytest.mark.parametrize("top_k", [None, 8])
def test_keys_and_values_that_eight_heads_share_are_not_copied_for_them(top_k):
    """The scores of one query per head are a fifth of the keys, were they expanded."""
    mask = causal(1, 63)
    inputs = [*operands(mask, batch=1, heads=8)[:1], *operands(mask, batch=1, heads=1)[1:]]
    with LargestTensor() as largest:
        attend(inputs, mask, top_k=top_k).sum().backward()
    assert largest.numel <= 8 * 64 < 8 * 64 * WIDTH


def test_under_autocast_products_and_selection_are_still_in_float32():
    """In bfloat16 the scores 256 + j / 2 round to a few values; the best is the last."""
    q = torch.ones(1, 1, 1, 2)
    k = torch.stack([torch.full((8,), 256.0), torch.arange(8) / 2], -1)[None, None].bfloat16()
    v = torch.eye(8).bfloat16()[None, None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = top_k_attend(q, k, v, mask=causal(1, 7), top_k=2, chunk=1, scale=1.0)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(
        y[0, 0, 0, 6:].double(), (torch.tensor([0.0, 0.5]).softmax(-1)).double(), rtol=0, atol=2**-8
    )


def test_bfloat16_inputs_give_the_float64_result_rounded_once():
    mask = causal(37)
    wide = [x.detach().bfloat16().double().requires_grad_() for x in operands(mask, relative=True)]
    narrow = [x.detach().bfloat16().requires_grad_() for x in wide]
    expected, actual = dense(wide, mask, top_k=8), attend(narrow, mask, top_k=8, chunk=10)
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-5)
    dy = normal(*actual.shape).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(actual, narrow, dy)
    wanted = torch.autograd.grad(expected, wide, dy.double())
    for name, first, second in zip(NAMES, got, wanted, strict=True):
        assert first.dtype == torch.bfloat16
        torch.testing.assert_close(first.double(), second, rtol=2**-8, atol=1e-4, msg=name)


def test_a_second_derivative_is_an_error():
    mask, inputs = causal(12), operands(causal(12))
    (dv,) = torch.autograd.grad(attend(inputs, mask, top_k=3).square().sum(), inputs[2], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dv.sum().backward()


def test_the_same_call_gives_the_same_bits():
    mask = causal(37)
    inputs = [x.float().detach().requires_grad_() for x in operands(mask, relative=True)]
    drop = AttentionDropout(context(2), probability=0.2)
    results = []
    for _ in range(2):
        y = attend(inputs, mask, top_k=8, drop=drop)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
