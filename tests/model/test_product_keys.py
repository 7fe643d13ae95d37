"""Product keys: queries, scores and gates (invariants 6 and 8 of specs of arXiv 2407.04153); tests/kernels has the choice."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.product_key_topk import PairChoice, product_key_topk
from model.parameters import materialize
from model.product_keys import ProductKeys, gates_of
from tests.model.build import normal


def choose(scores_THZJ: Tensor, *, top_k: int) -> PairChoice:
    """Of scores that are given: as queries, with the unit vectors for sub-keys."""
    unit_1ZJJ = torch.eye(scores_THZJ.shape[-1], dtype=scores_THZJ.dtype).expand(1, 2, -1, -1)
    return product_key_topk(scores_THZJ, unit_1ZJJ, top_k=top_k, backend="torch")


def test_the_softmax_over_all_pairs_is_the_product_of_the_halves_softmaxes():
    scores = normal(20, 2, 2, 6)
    choice = choose(scores, top_k=36)
    first, second = scores.softmax(-1).unbind(-2)
    expected = first.gather(-1, choice.first_THK) * second.gather(-1, choice.second_THK)
    torch.testing.assert_close(gates_of(choice.scores_THK, kind="softmax"), expected, rtol=0, atol=1e-15)


def test_a_constant_added_to_a_half_changes_neither_choice_nor_softmax_gates_and_has_no_gradient():
    scores, constant = normal(20, 2, 2, 6), torch.tensor([0.75, -2.5], dtype=torch.float64, requires_grad=True)
    before = choose(scores, top_k=5)
    after = choose(scores + constant[:, None], top_k=5)
    assert all(torch.equal(old, new) for old, new in zip(before[1:], after[1:], strict=True))
    gates = gates_of(after.scores_THK, kind="softmax")
    torch.testing.assert_close(gates, gates_of(before.scores_THK, kind="softmax"), rtol=0, atol=1e-14)
    (gates * normal(*gates.shape, seed=3)).sum().backward()
    assert constant.grad is not None
    assert constant.grad.abs().max() < 1e-14


def test_only_chosen_sub_keys_get_a_gradient():
    scores = normal(6, 1, 2, 8).requires_grad_()
    choice = choose(scores, top_k=3)
    (choice.scores_THK * normal(6, 1, 3, seed=2)).sum().backward()
    expected = torch.zeros(6, 1, 2, 8, dtype=torch.bool)
    expected[..., 0, :].scatter_(-1, choice.first_THK, True)
    expected[..., 1, :].scatter_(-1, choice.second_THK, True)
    assert scores.grad is not None
    assert torch.equal(scores.grad != 0, expected)


def test_gates_are_softmax_over_a_heads_picks_or_sigmoid_or_relu_of_each():
    scores = normal(3, 2, 4)
    exponentials = scores.exp()
    expected = exponentials / exponentials.sum(-1, keepdim=True)
    torch.testing.assert_close(gates_of(scores, kind="softmax"), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(gates_of(scores, kind="sigmoid"), 1 / (1 + (-scores).exp()), rtol=1e-14, atol=0)
    assert torch.equal(gates_of(scores, kind="relu"), scores * (scores > 0))


def keys(**settings) -> ProductKeys:
    settings = {
        "d_model": 6,
        "num_heads": 3,
        "num_keys": 5,
        "key_dim": 4,
        "shared_keys": False,
        "norm": "none",
    } | settings
    built = ProductKeys(**settings)
    materialize(built, seed=5, dtype=torch.float64)
    return built


def scores_of(router: ProductKeys, x_TD: Tensor) -> Tensor:
    return router.scores(router(x_TD).queries_TPZC)


@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("key_dim", [4, None])
def test_a_sub_keys_score_is_its_product_with_the_same_half_of_the_heads_query(key_dim: int | None, shared_keys: bool):
    router, x = keys(key_dim=key_dim, shared_keys=shared_keys, bias=True), normal(7, 6)
    half = router.key_dim // 2
    found = scores_of(router, x)
    assert found.shape == (7, 3, 2, 5)
    for head in range(3):
        query = x
        if router.query is not None:
            rows = slice(head * 4, head * 4 + 4)
            query = x @ router.query.get_parameter("weight")[rows].T + router.query.get_parameter("bias")[rows]
        for z in (0, 1):
            sub_keys = router.keys[0 if shared_keys else head, z]
            expected = query[:, z * half : (z + 1) * half] @ sub_keys.T
            torch.testing.assert_close(found[:, head, z], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("key_dim", [4, None])
def test_the_choice_is_the_best_of_all_scores(key_dim: int | None, shared_keys: bool):
    router, x = keys(key_dim=key_dim, shared_keys=shared_keys), normal(7, 6)
    choice = router.choose(router(x).queries_TPZC, top_k=4)
    first_THJ, second_THJ = scores_of(router, x).unbind(2)
    sums_THG = (first_THJ[..., :, None] + second_THJ[..., None, :]).flatten(2)
    best = sums_THG.topk(4)
    torch.testing.assert_close(choice.scores_THK, best.values, rtol=0, atol=1e-14)
    assert torch.equal(choice.first_THK * 5 + choice.second_THK, best.indices)


def test_the_choice_stays_that_of_float32_under_bfloat16_autocast():
    router, x = keys(), normal(9, 6, dtype=torch.float32)
    materialize(router, seed=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = router.choose(router(x).queries_TPZC, top_k=4)
    assert all(torch.equal(a, b) for a, b in zip(narrow, router.choose(router(x).queries_TPZC, top_k=4), strict=True))


def test_the_number_of_weights_does_not_depend_on_heads_with_shared_keys_but_does_with_their_own():
    assert keys(shared_keys=True).keys.shape == (1, 2, 5, 2)
    assert keys(shared_keys=False).keys.shape == (3, 2, 5, 2)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_queries_are_normalised_before_they_meet_the_keys(norm: str):
    router, plain, x = keys(norm=norm), keys(), normal(11, 6)
    assert plain.query is not None
    query = plain.query(x)
    by_batch = F.batch_norm(query, None, None, training=True)
    query = by_batch if norm == "batch" else F.layer_norm(query.view(11, 3, 4), (4,)).view(11, 12)
    plain.query = torch.nn.Identity()
    torch.testing.assert_close(scores_of(router, x), scores_of(plain, query), rtol=0, atol=1e-13)
    assert (router(x).updates.keys() == {"router.batch_norm.mean", "router.batch_norm.variance"}) == (norm == "batch")


def test_scores_stay_float32_under_bfloat16_autocast():
    router, x = keys(norm="batch"), normal(9, 6, dtype=torch.float32)
    materialize(router, seed=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = scores_of(router, x)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, scores_of(router, x))


def test_the_first_values_are_xavier_queries_and_keys_within_one_over_the_root_of_their_width():
    router = keys(d_model=64, num_heads=4, num_keys=100, key_dim=32)
    assert router.query is not None
    query, bound = router.query.get_parameter("weight"), math.sqrt(6 / (64 + 4 * 32))
    assert 0.98 * bound < query.abs().max().item() <= bound
    assert 0.99 / 4 < router.keys.abs().max().item() <= 1 / 4
    assert router.keys.std().item() == pytest.approx(1 / 4 / math.sqrt(3), rel=0.02)
