"""Product keys: the pruned choice against all pairs scored (invariants 1 to 3, 6 and 8 of specs of arXiv 2407.04153), and the scores."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import product_keys
from model.parameters import materialize
from model.product_keys import PairChoice, ProductKeys, candidates, choose_pairs, gates_of
from tests.model.build import normal

SIZES = [(4, 1), (4, 4), (4, 16), (5, 7), (7, 8), (12, 16), (23, 9), (40, 32)]  # sub-keys of a half, picks


def all_pairs(scores_THZJ: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The best scores and ids a J + b by scoring every pair, among equal ones the lowest id."""
    sums_THG = (scores_THZJ[..., 0, :, None] + scores_THZJ[..., 1, None, :]).flatten(-2)
    ordered = sums_THG.sort(dim=-1, descending=True, stable=True)
    return ordered.values[..., :top_k], ordered.indices[..., :top_k]


def ids_of(choice: PairChoice, num_keys: int) -> Tensor:
    return choice.first_THK * num_keys + choice.second_THK


@pytest.mark.parametrize(("num_keys", "top_k"), SIZES)
def test_the_choice_is_that_of_scoring_all_pairs(num_keys: int, top_k: int):
    scores = normal(25, 2, 2, num_keys, seed=top_k)
    choice = choose_pairs(scores, top_k=top_k)
    best, ids = all_pairs(scores, top_k)
    assert torch.equal(ids_of(choice, num_keys), ids)
    assert torch.equal(choice.scores_THK, best)


@pytest.mark.parametrize(("num_keys", "top_k"), SIZES)
def test_among_equal_scores_the_lowest_expert_id_wins(num_keys: int, top_k: int):
    """Whole numbers add up exactly, so every tie is one of equal parts or of different parts with the same sum."""
    for span in (1, 2, 4):
        draws = torch.Generator().manual_seed(span)
        scores = torch.randint(0, span, (40, 1, 2, num_keys), generator=draws).float()
        assert torch.equal(ids_of(choose_pairs(scores, top_k=top_k), num_keys), all_pairs(scores, top_k)[1])


def test_ties_that_only_rounding_makes_leave_the_scores_of_the_choice_right():
    scores = normal(200, 1, 2, 12, dtype=torch.float32) + 2.0**20  # sums are rounded to steps of 1/8 or 1/4
    best = all_pairs(scores, 16)[0]
    assert (best.diff(dim=-1) == 0).any()
    choice = choose_pairs(scores, top_k=16)
    assert torch.equal(choice.scores_THK, best)
    assert all(len(row.unique()) == 16 for row in ids_of(choice, 12).flatten(0, 1))


@pytest.mark.parametrize(("top_k", "count"), [(8, 20), (16, 50), (32, 119), (64, 280), (128, 645)])
def test_the_number_of_candidates_is_the_sum_of_k_div_i(top_k: int, count: int):
    assert len(candidates(top_k, 1024)[0]) == count == sum(top_k // i for i in range(1, top_k + 1))


@pytest.mark.parametrize(("num_keys", "top_k"), SIZES)
def test_the_candidates_give_the_choice_of_all_k_squared_pairs(num_keys: int, top_k: int, monkeypatch):
    scores = normal(25, 2, 2, num_keys)
    pruned = choose_pairs(scores, top_k=top_k)

    def every_pair(num_picks: int, num_keys: int) -> tuple[list[int], list[int]]:
        first, second = torch.cartesian_prod(*[torch.arange(min(num_picks, num_keys))] * 2).T.tolist()
        return first, second

    monkeypatch.setattr(product_keys, "candidates", every_pair)
    for left, right in zip(pruned, choose_pairs(scores, top_k=top_k), strict=True):
        assert torch.equal(left, right)


def test_the_first_pick_is_the_best_of_both_halves_and_the_second_shares_one_with_it():
    scores = normal(50, 2, 2, 9)
    choice = choose_pairs(scores, top_k=12)
    assert torch.equal(choice.first_THK[..., 0], scores[..., 0, :].argmax(-1))
    assert torch.equal(choice.second_THK[..., 0], scores[..., 1, :].argmax(-1))
    same = (choice.first_THK[..., :2].diff() == 0) | (choice.second_THK[..., :2].diff() == 0)
    assert same.all()


def test_scores_come_sorted_and_ids_differ_within_a_head():
    choice = choose_pairs(normal(50, 2, 2, 9), top_k=30)
    assert (choice.scores_THK.diff(dim=-1) < 0).all()
    assert all(len(set(row)) == 30 for row in ids_of(choice, 9).flatten(0, 1).tolist())


def test_the_softmax_over_all_pairs_is_the_product_of_the_halves_softmaxes():
    scores = normal(20, 2, 2, 6)
    choice = choose_pairs(scores, top_k=36)
    first, second = scores.softmax(-1).unbind(-2)
    expected = first.gather(-1, choice.first_THK) * second.gather(-1, choice.second_THK)
    torch.testing.assert_close(gates_of(choice.scores_THK, kind="softmax"), expected, rtol=0, atol=1e-15)


def test_a_constant_added_to_a_half_changes_neither_choice_nor_softmax_gates_and_has_no_gradient():
    scores, constant = normal(20, 2, 2, 6), torch.tensor([0.75, -2.5], dtype=torch.float64, requires_grad=True)
    before = choose_pairs(scores, top_k=5)
    after = choose_pairs(scores + constant[:, None], top_k=5)
    assert torch.equal(ids_of(before, 6), ids_of(after, 6))
    gates = gates_of(after.scores_THK, kind="softmax")
    torch.testing.assert_close(gates, gates_of(before.scores_THK, kind="softmax"), rtol=0, atol=1e-14)
    (gates * normal(*gates.shape, seed=3)).sum().backward()
    assert constant.grad is not None
    assert constant.grad.abs().max() < 1e-14


def test_only_chosen_sub_keys_get_a_gradient():
    scores = normal(6, 1, 2, 8).requires_grad_()
    choice = choose_pairs(scores, top_k=3)
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


@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("key_dim", [4, None])
def test_a_sub_keys_score_is_its_product_with_the_same_half_of_the_heads_query(key_dim: int | None, shared_keys: bool):
    router, x = keys(key_dim=key_dim, shared_keys=shared_keys, bias=True), normal(7, 6)
    half = router.key_dim // 2
    found = router(x).scores_THZJ
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
    torch.testing.assert_close(router(x).scores_THZJ, plain(query).scores_THZJ, rtol=0, atol=1e-13)
    assert (router(x).updates.keys() == {"router.batch_norm.mean", "router.batch_norm.variance"}) == (norm == "batch")


def test_scores_stay_float32_under_bfloat16_autocast():
    router, x = keys(norm="batch"), normal(9, 6, dtype=torch.float32)
    materialize(router, seed=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = router(x).scores_THZJ
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, router(x).scores_THZJ)


def test_the_first_values_are_xavier_queries_and_keys_within_one_over_the_root_of_their_width():
    router = keys(d_model=64, num_heads=4, num_keys=100, key_dim=32)
    assert router.query is not None
    query, bound = router.query.get_parameter("weight"), math.sqrt(6 / (64 + 4 * 32))
    assert 0.98 * bound < query.abs().max().item() <= bound
    assert 0.99 / 4 < router.keys.abs().max().item() <= 1 / 4
    assert router.keys.std().item() == pytest.approx(1 / 4 / math.sqrt(3), rel=0.02)


def test_candidate_ranks_are_those_whose_product_is_at_most_k():
    first, second = candidates(6, 4)
    assert sorted(zip(first, second, strict=True)) == [
        (0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 0)
    ]  # fmt: skip
