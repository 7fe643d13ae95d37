"""Selection, gates, expert dropout, the entropy regulariser and the two router initialisations."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model.parameters import materialize
from model.router import (
    Router,
    RouterReport,
    batch_spread,
    choose,
    collapse_alarm,
    entropy_loss,
    kept_experts,
    load_spread,
    sigma_moe_rows,
    switchhead_rows,
)
from model.statistics import LocalStatistics
from tests.model import by_hand
from tests.model.build import context, normal


def entropy(logits_TE: Tensor) -> Tensor:
    return entropy_loss([batch_spread(logits_TE[:, None], LocalStatistics(), weight=1.0)])


def rows_before_and_after(draw, *, std: float, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The plain normal rows that a generator gives, and what the initialiser makes with the same generator."""
    plain = torch.empty(shape).normal_(0.0, std, generator=torch.Generator().manual_seed(3))
    return plain.double(), draw(std)(shape, torch.Generator().manual_seed(3)).double()


def test_logits_are_heads_of_experts_in_row_order():
    router = Router(d_model=4, num_heads=2, num_experts=3, draw=switchhead_rows(0.5))
    materialize(router, seed=1, dtype=torch.float64)
    x = normal(5, 4)
    logits = router(x)
    assert logits.shape == (5, 2, 3)
    for h in range(2):
        for e in range(3):
            torch.testing.assert_close(logits[:, h, e], x @ router.get_parameter("weight")[3 * h + e])


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_k_best_are_chosen_best_first_with_sigmoid_gates_that_are_not_renormalised(top_k: int):
    logits = normal(20, 3, 5)
    choice = choose(logits, top_k=top_k)
    for t in range(20):
        for h in range(3):
            expected = by_hand.best(logits[t, h], top_k)
            assert choice.experts_THK[t, h].tolist() == expected
            torch.testing.assert_close(choice.gates_THK[t, h], by_hand.gate(logits[t, h, expected]))


@pytest.mark.parametrize("top_k", [1, 2, 3, 70])
def test_among_equal_logits_the_lowest_ids_win(top_k: int):
    """70 experts: a sort that is only stable for short rows would show."""
    assert choose(torch.zeros(2, 1, 70), top_k=top_k).experts_THK.tolist() == [[list(range(top_k))]] * 2


def test_ties_behind_a_leader_and_ties_of_signed_zeros_go_to_the_lowest_ids():
    logits = torch.tensor([[[0.0, 1.0, 1.0, 2.0, 1.0]], [[-1.0, -0.0, 0.0, -0.0, -1.0]]])
    assert choose(logits, top_k=3).experts_THK.tolist() == [[[3, 1, 2]], [[1, 2, 3]]]


@pytest.mark.parametrize(
    ("kept", "chosen"),
    [
        ([True, True, True, True], [2, 3]),
        ([True, True, False, True], [3, 1]),
        ([True, False, False, False], [0, 1]),  # one survivor; the second pick is forced, ties go to the lowest id
        ([False, False, False, True], [3, 0]),
        ([False, False, False, False], [0, 1]),
    ],
)
def test_dropped_experts_are_ranked_last_and_a_forced_pick_keeps_its_own_gate(kept: list[bool], chosen: list[int]):
    logits = torch.tensor([[[0.1, 0.2, 0.9, 0.5]]], requires_grad=True)
    choice = choose(logits, top_k=2, kept_THE=torch.tensor([[kept]]))
    assert choice.experts_THK.flatten().tolist() == chosen
    torch.testing.assert_close(choice.gates_THK.flatten(), torch.sigmoid(logits[0, 0, chosen]))
    choice.gates_THK.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.flatten().nonzero().flatten().tolist() == sorted(chosen)


def test_the_expert_mask_draws_for_each_token_head_and_expert():
    logits = torch.zeros(2 * 600, 3, 5)
    kept = kept_experts(logits, context([4, 2**33]), probability=0.2, site="value_expert")
    assert kept is not None
    kept = kept.double()
    assert kept.shape == (1200, 3, 5)
    assert (kept.mean(0) - 0.8).abs().max() < 5 * (0.2 * 0.8 / 1200) ** 0.5
    others = torch.corrcoef(kept.view(1200, 15).T) - torch.eye(15)
    assert others.abs().max() < 5 / 1200**0.5


def test_memory_has_masks_of_its_own_and_leaves_those_of_the_row_alone():
    at = {"probability": 0.5, "site": "value_expert"}
    alone = kept_experts(torch.zeros(2 * 30, 3, 5), context([4, 9]), **at)
    both = kept_experts(torch.zeros(2 * 60, 3, 5), context([4, 9]), **at, num_memory=30)
    assert alone is not None
    assert both is not None
    memory, row = both.view(2, 60, 15).split(30, dim=1)
    assert torch.equal(row, alone.view(2, 30, 15))
    assert abs((memory == row).double().mean().item() - 0.5) < 5 * 0.5 / 900**0.5


def test_a_rank_without_rows_has_no_masks_also_with_memory():
    kept = kept_experts(torch.zeros(0, 3, 5), context([]), probability=0.5, site="x", num_memory=4)
    assert kept is not None
    assert kept.shape == (0, 3, 5)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_softmax_gates_are_the_shares_of_the_chosen_logits_also_where_an_expert_is_dropped(top_k: int):
    logits, kept = normal(20, 3, 5), normal(20, 3, 5, seed=1) > 0
    choice = choose(logits, top_k=top_k, kept_THE=kept, gates="softmax")
    assert torch.equal(choice.experts_THK, choose(logits, top_k=top_k, kept_THE=kept).experts_THK)
    torch.testing.assert_close(choice.gates_THK.sum(-1), torch.ones(20, 3).double(), rtol=0, atol=1e-14)
    powers = logits.gather(-1, choice.experts_THK).exp()
    torch.testing.assert_close(choice.gates_THK, powers / powers.sum(-1, keepdim=True), rtol=1e-13, atol=0)


def test_gates_over_all_experts_are_their_shares_and_open_ones_are_one():
    logits, kept = normal(20, 3, 5), normal(20, 3, 5, seed=1) > 0
    expected = choose(logits, top_k=2, kept_THE=kept).experts_THK
    powers = logits.exp() / logits.exp().sum(-1, keepdim=True)
    wanted_by: dict[Any, Tensor] = {
        "softmax_of_all": powers.gather(-1, expected),
        "open": torch.ones(20, 3, 2).double(),
    }
    for gates, wanted in wanted_by.items():
        choice = choose(logits, top_k=2, kept_THE=kept, gates=gates)
        assert torch.equal(choice.experts_THK, expected)
        torch.testing.assert_close(choice.gates_THK, wanted, rtol=1e-13, atol=0)


def test_offsets_change_the_ranking_of_each_head_and_not_the_gates():
    logits = normal(20, 3, 5)
    offsets = torch.zeros(3, 5, dtype=torch.float64)
    offsets[1, 4], offsets[2, 0] = 100.0, 100.0
    choice = choose(logits, top_k=2, offsets_HE=offsets)
    assert torch.equal(choice.experts_THK[:, 0], choose(logits, top_k=2).experts_THK[:, 0])
    assert (choice.experts_THK[:, 1, 0] == 4).all()
    assert (choice.experts_THK[:, 2, 0] == 0).all()
    torch.testing.assert_close(choice.gates_THK, logits.gather(-1, choice.experts_THK).sigmoid())


def report_of(counts_HE: list[list[float]], rows: int) -> RouterReport:
    counts = torch.tensor(counts_HE)
    return RouterReport(counts.flatten(), torch.full_like(counts, rows / counts.shape[1]).flatten(), torch.tensor(rows))


@pytest.mark.parametrize(
    ("counts", "rows", "expected"),
    [
        pytest.param([[12.0, 12.0, 12.0, 12.0]], 24, [1.0], id="even"),
        pytest.param([[24.0, 24.0, 0.0, 0.0]], 24, [0.0], id="two_experts_take_every_row"),
        pytest.param([[24.0, 0.0, 0.0, 0.0], [6.0, 6.0, 6.0, 6.0]], 24, [0.0, 1.0], id="one_of_two_heads"),
        pytest.param([[24.0, 24.0]], 24, [1.0], id="nothing_to_choose"),
        pytest.param([[8.0, 8.0, 8.0, 0.0]], 24, [2 / 3], id="three_of_four_by_one"),
        pytest.param([[1.0, 1.0] + [0.0] * 98], 2, [1.0], id="more_experts_than_copies"),
        pytest.param([[0.0, 0.0, 0.0]], 0, [1.0], id="no_rows"),
    ],
)
def test_the_load_spread_is_0_where_k_experts_take_all_and_1_where_loads_are_even(counts, rows: int, expected):
    torch.testing.assert_close(load_spread(report_of(counts, rows)), torch.tensor(expected), rtol=0, atol=1e-5)


def test_the_collapse_alarm_names_the_layers_whose_experts_are_idle_and_the_remedy():
    reports = {
        "layers.0.feedforward.mlp": report_of([[12.0, 12.0, 12.0, 12.0]], 24),
        "layers.3.feedforward.mlp": report_of([[24.0, 23.0, 1.0, 0.0]], 24),
        "layers.4.mixer.value": report_of([[6.0, 6.0, 6.0, 6.0], [24.0, 0.0, 0.0, 0.0]], 24),
    }
    alarm = collapse_alarm(reports)
    assert alarm is not None
    assert "layers.3.feedforward.mlp (0.0" in alarm
    assert "layers.4.mixer.value (0.000)" in alarm
    assert "layers.0" not in alarm
    assert "raise the layer's entropy_weight" in alarm
    assert collapse_alarm({name: reports[name] for name in ("layers.0.feedforward.mlp",)}) is None


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        pytest.param(torch.zeros(6, 5), -math.log(5), id="zero_logits"),
        pytest.param(torch.tensor([[0.0, 200.0, 0.0]]).expand(6, 3), 0.0, id="one_expert_for_all_tokens"),
        pytest.param(200.0 * torch.eye(5), -math.log(5), id="a_different_expert_for_each_token"),
        pytest.param(200.0 * torch.eye(4)[[0, 0, 0, 1]], 0.75 * math.log(0.75) + 0.25 * math.log(0.25), id="three_to_one"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_entropy_term_has_its_exact_values(logits: Tensor, expected: float, dtype: torch.dtype):
    tolerance = 1e-15 if dtype == torch.float64 else 1e-6
    assert entropy(logits.to(dtype)).item() == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("handicap", [0.0, 12.0, 60.0])
def test_the_entropy_term_equals_its_definition_also_with_an_expert_that_is_hardly_ever_likely(handicap: float):
    logits = 3 * normal(40, 7)
    logits[:, 0] -= handicap
    assert entropy(logits).item() == pytest.approx(by_hand.negative_entropy(logits), rel=1e-13)


def test_the_gradient_of_the_entropy_term_equals_finite_differences():
    logits = (3 * normal(6, 4)).requires_grad_()
    entropy(logits).backward()
    assert logits.grad is not None
    for t in range(6):
        for e in range(4):
            nudge = torch.zeros(6, 4, dtype=torch.float64)
            nudge[t, e] = 1e-5
            upper, lower = (by_hand.negative_entropy(logits.detach() + sign * nudge) for sign in (1, -1))
            assert logits.grad[t, e].item() == pytest.approx((upper - lower) / 2e-5, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("spread", [30.0, 89.0, 104.0, 1e4, 1e38])
def test_the_entropy_term_and_its_gradient_are_finite_for_saturated_logits(spread: float):
    """Probabilities that are subnormal in float32 (e^-89) or vanish (e^-104); expert 3 is never likely, others rarely."""
    logits = torch.tensor([[1.0, 0.0, 0.0, -1.0], [0.0, 1.0, 0.0, -1.0], [1.0, 0.0, 0.0, -1.0]]) * spread
    logits.requires_grad_()
    loss = entropy(logits)
    loss.backward()
    expected = (2 * math.log(2 / 3) + math.log(1 / 3)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("d_model", [412, 64])
def test_sigma_moe_rows_have_equal_norms_and_the_standard_deviation_of_the_plain_draw(d_model: int):
    plain, rows = rows_before_and_after(sigma_moe_rows, std=0.3, shape=(16, d_model))
    norms = rows.norm(dim=1)
    assert plain.norm(dim=1).std() > 1e-2, "the plain rows must differ for this test to say anything"
    torch.testing.assert_close(norms, norms[:1].expand(16), rtol=1e-6, atol=0)
    assert rows.std().item() == pytest.approx(plain.std().item(), rel=1e-6)
    torch.testing.assert_close(rows / norms[:, None], plain / plain.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-7)


def test_sigma_moe_logits_of_normalised_inputs_start_with_standard_deviation_root_two_over_depth():
    num_layers, d_model = 16, 412
    std = math.sqrt(2 / num_layers / d_model)
    rows = sigma_moe_rows(std)((64, d_model), torch.Generator().manual_seed(3)).double()
    x = torch.nn.functional.layer_norm(normal(500, d_model), (d_model,))
    assert (x @ rows.T).std().item() == pytest.approx(math.sqrt(2 / 16), rel=0.02)


def test_switchhead_rows_keep_almost_their_norms_and_do_not_make_them_equal():
    plain, rows = rows_before_and_after(switchhead_rows, std=0.3, shape=(40, 412))
    before, after = plain.norm(dim=1), rows.norm(dim=1)
    assert torch.corrcoef(torch.stack([before, after]))[0, 1] > 0.99
    torch.testing.assert_close(after, before, rtol=0.02, atol=0)
    assert (after.std() / after.mean()).item() == pytest.approx(1 / math.sqrt(2 * 412), rel=0.5)


def test_switchhead_rows_are_unit_rows_times_their_own_over_the_global_standard_deviation():
    plain, rows = rows_before_and_after(switchhead_rows, std=0.3, shape=(6, 20))
    unit = plain / plain.norm(dim=1, keepdim=True)
    expected = unit * (plain.var(dim=1, keepdim=True).sqrt() / unit.flatten().var().sqrt())
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("counts", "expected"), [([48.0, 0, 0, 0], 0.0), ([12.0, 12, 12, 12], 1.0), ([24.0, 24, 0, 0], 1 / 3)]
)
def test_heads_that_share_experts_can_all_take_one(counts: list[float], expected: float):
    """Six rows of eight picks over four experts: no router of one head could bring that about, a table can."""
    torch.testing.assert_close(load_spread(report_of([counts], 6)), torch.tensor([expected]), rtol=0, atol=1e-5)
