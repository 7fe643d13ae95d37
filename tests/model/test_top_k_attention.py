"""Chunked and top-k attention against whole matrices under plain autograd, and against loops over single scores.

The numbered invariants are those found in the paper's code (arXiv 2106.06899), checked in float64. Dropout, dtypes and memory:
test_top_k_backward.py.
"""

import pytest
import torch

from kernels.top_k_attention.selection import select_top_k
from model.top_k_attention import top_k_attend
from tests.model.build import normal
from tests.model.top_k_by_hand import (
    CPU,
    SCALE,
    WIDTH,
    BlindQuery,
    assert_same,
    attend,
    by_loop,
    causal,
    dense,
    operands,
    weights_of,
)

DOCUMENTS = torch.tensor([[0] * 4 + [1] * 7 + [2], [3] * 12])
FILLED = torch.tensor([0, 3])
MASKS = [
    pytest.param(causal(12), id="causal"),
    pytest.param(causal(12, documents_BS=DOCUMENTS), id="documents"),
    pytest.param(causal(7, 5), id="memory"),
    pytest.param(causal(7, 5, filled_B=FILLED), id="memory_partly_filled"),
    pytest.param(causal(1, 11), id="decoding_one_query"),
    pytest.param(BlindQuery(num_queries=12, num_keys=12, device=CPU), id="one_query_blind"),
]


@pytest.mark.parametrize("chunk", [37, 16, 10, 7, 1, 1000])
@pytest.mark.parametrize("top_k", [None, 0, 37, 100])
@pytest.mark.parametrize("earlier", [0, 6])
def test_invariant_1_without_selection_any_chunk_equals_dense_attention_with_its_gradients(chunk, top_k, earlier):
    mask = causal(37, earlier)
    top_k = top_k and top_k + earlier
    inputs = operands(mask)
    assert_same(attend(inputs, mask, top_k=top_k, chunk=chunk), dense(inputs, mask), inputs)


@pytest.mark.parametrize("chunk", [37, 16, 10, 7, 1])
@pytest.mark.parametrize("top_k", [8, 36])
def test_invariant_2_top_k_equals_selection_on_the_whole_matrix_with_its_gradients_at_any_chunk(chunk, top_k):
    mask = causal(37)
    inputs = operands(mask)
    assert_same(attend(inputs, mask, top_k=top_k, chunk=chunk), dense(inputs, mask, top_k=top_k), inputs)


@pytest.mark.parametrize("relative", [False, True], ids=["", "relative"])
@pytest.mark.parametrize("top_k", [None, 1, 3, 11])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_equals_the_whole_matrix_with_its_gradients(mask, top_k, relative):
    inputs = operands(mask, relative=relative)
    assert_same(attend(inputs, mask, top_k=top_k), dense(inputs, mask, top_k=top_k), inputs)


@pytest.mark.parametrize("mask", MASKS[:4])
def test_the_output_equals_a_loop_over_single_scores(mask):
    inputs = operands(mask)
    torch.testing.assert_close(attend(inputs, mask, top_k=3), by_loop(inputs, mask, top_k=3), rtol=0, atol=1e-12)


def test_invariant_3_no_mass_on_the_future_rows_sum_to_one_and_early_rows_are_dense():
    mask = causal(37)
    q, k, _ = operands(mask)
    weights = weights_of(q, k, mask, top_k=8)
    assert weights.triu(1).count_nonzero() == 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 37, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal((weights > 0).sum(-1)[0, 0], torch.arange(1, 38).clamp(max=8))
    torch.testing.assert_close(weights[:, :, :8], weights_of(q, k, mask, top_k=None)[:, :, :8], rtol=0, atol=1e-14)


def test_invariant_4_the_distance_to_dense_attention_is_twice_the_tail():
    mask = causal(37)
    q, k, v = operands(mask)
    full, kept = (weights_of(q, k, mask, top_k=top_k) for top_k in (None, 8))
    tail = full.sort(-1).values[..., :-8].sum(-1)
    torch.testing.assert_close((full - kept).abs().sum(-1), 2 * tail, rtol=0, atol=1e-14)
    error = (attend([q, k, v], mask, top_k=8) - attend([q, k, v], mask, top_k=None)).abs().amax(-1)
    assert (error <= 2 * tail * v.abs().max() + 1e-14).all()
    assert error.max() > 0.01


def test_invariant_5_spreading_the_kept_weights_equals_gathering_the_kept_values():
    """The paper's sparse form: only the kept pairs are ever touched."""
    mask = causal(37)
    q, k, v = operands(mask)
    scores = (q @ k.mT).masked_fill(~mask.rows(0, 37), -torch.inf)
    kept = scores.topk(8)
    rows = v[:, :, None].expand(-1, -1, 37, -1, -1).gather(3, kept.indices[..., None].expand(-1, -1, -1, -1, WIDTH))
    sparse = ((kept.values * SCALE).softmax(-1)[..., None] * rows).sum(3)
    assert_same(attend([q, k, v], mask, top_k=8, chunk=10), sparse, [q, k, v])


def test_invariant_7_keys_that_are_never_selected_get_no_gradient():
    mask = causal(12)
    inputs = q, k, _ = operands(mask)
    selected = (weights_of(q, k, mask, top_k=2) > 0).any(2)
    assert 0 < selected.sum() < selected.numel()
    _, dk, dv = torch.autograd.grad(attend(inputs, mask, top_k=2).square().sum(), inputs)
    for gradient in (dk, dv):
        assert torch.equal(gradient.abs().sum(-1) > 0, selected)


def test_invariant_7_with_one_kept_key_the_output_is_its_value_and_q_and_k_get_no_gradient():
    mask = causal(12)
    inputs = q, k, v = operands(mask)
    y = attend(inputs, mask, top_k=1)
    best = (q @ k.mT).masked_fill(~mask.rows(0, 12), -torch.inf).argmax(-1)
    assert torch.equal(y, v.gather(2, best[..., None].expand(-1, -1, -1, WIDTH)))
    dq, dk, _ = torch.autograd.grad(y.square().sum(), inputs)
    assert dq.count_nonzero() == dk.count_nonzero() == 0


def test_of_equal_scores_the_lowest_keys_win():
    mask = causal(12)
    q, k, _ = operands(mask)
    weights = weights_of(q, torch.ones_like(k), mask, top_k=3)
    for i in range(12):
        seen = min(i + 1, 3)
        expected = torch.tensor([1 / seen] * seen + [0] * (12 - seen), dtype=torch.float64)
        torch.testing.assert_close(weights[:, :, i], expected.expand(2, 2, -1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selection_equals_a_stable_sort_whatever_is_tied(dtype):
    scores = (normal(40, 30) * 1.5).round().to(dtype)
    scores[::3, 10:] = -torch.inf
    scores[1::3, 4:] = -torch.inf
    scores[5, 3] = torch.nan
    scores[7] = 0
    for top_k in (1, 4, 9, 29):
        kept = select_top_k(scores, top_k)
        assert kept.keys.dtype == torch.int32
        order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        torch.testing.assert_close(kept.scores, scores.gather(-1, kept.keys.long()), rtol=0, atol=0, equal_nan=True)
        for row in range(40):
            legal = {int(j) for j in order[row] if scores[row, j] != -torch.inf}
            assert {int(j) for j in kept.keys[row] if scores[row, j] != -torch.inf} == legal
            assert len(set(kept.keys[row].tolist())) == top_k


def test_a_query_that_sees_nothing_gives_exact_zeros_and_gets_zero_gradients():
    mask = BlindQuery(num_queries=12, num_keys=12, device=CPU)
    inputs = operands(mask, relative=True)
    for top_k in (None, 3):
        y = attend(inputs, mask, top_k=top_k)
        assert y[:, :, 2].count_nonzero() == 0
        assert y[:, :, 3].count_nonzero() > 0
        gradients = torch.autograd.grad(y[:, :, 2].sum(), inputs)
        assert all(gradient.count_nonzero() == 0 for gradient in gradients)


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("num_heads", [1, 2])
def test_grouped_queries_share_keys_and_values_also_by_distance(num_heads: int, top_k: int | None):
    mask = causal(12, 2)
    q, k, v, q_position, r = operands(mask, relative=True, heads=6)
    k, v = (x[:, :num_heads].detach().requires_grad_() for x in (k, v))
    heads = [(h, h * num_heads // 6) for h in range(6)]
    per_head = [
        dense([q[:, [h]], k[:, [g]], v[:, [g]], q_position[:, [h]], r[[h]]], mask, top_k=top_k) for h, g in heads
    ]
    inputs = [q, k, v, q_position, r]
    assert_same(attend(inputs, mask, top_k=top_k), torch.cat(per_head, dim=1), inputs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chunk": 0}, ["chunk must be at least 1", "0"]),
        ({"top_k": -1}, ["top_k", "-1", "None or 0"]),
        ({"scale": 0.0}, ["scale must be above 0", "0.0"]),
        ({"scale": float("inf")}, ["scale must be above 0 and finite", "inf"]),
        ({"scale": float("nan")}, ["scale must be above 0 and finite", "nan"]),
        ({"mask": causal(12, 1)}, ["q (2, 2, 12, 5)", "S = 12 and M = 13"]),
        ({"mask": causal(11, 1)}, ["q (2, 2, 12, 5)", "S = 11 and M = 12"]),
        ({"k_BGMC": torch.zeros(2, 1, 12, WIDTH)}, ["k (2, 1, 12, 5)", "v (2, 2, 12, 5)", "reshape one of them"]),
        (
            {name: torch.zeros(2, 3, 12, WIDTH) for name in ("k_BGMC", "v_BGMC")},
            ["k (2, 3, 12, 5)", "H a multiple of G"],
        ),
        ({"v_BGMC": torch.zeros(2, 2, 11, WIDTH)}, ["v (2, 2, 11, 5)", "(B, G, M, D)"]),
        ({"relative": (torch.zeros(2, 2, 12, WIDTH), torch.zeros(2, 23, WIDTH))}, ["(2, 12, 5)", "(2, 23, 5)"]),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_an_error_that_names_it(change, words):
    q, k, v = operands(causal(12))
    settings = {"mask": causal(12), "top_k": 3, "chunk": 4, "scale": 1.0, "q_BHSC": q, "k_BGMC": k, "v_BGMC": v}
    with pytest.raises(ValueError) as error:
        top_k_attend(**(settings | change))  # type: ignore[arg-type]
    assert all(word in str(error.value) for word in words), error.value
