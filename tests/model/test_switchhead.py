"""SwitchHead with V and O as experts: invariants 1 to 4, 9 and 14 of its specification's section 13, for both kinds of positions.

Positions, memory and decoding are in test_attend.py, other experts, routers and gates in test_switchhead_forms.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model import by_hand
from tests.model.build import (
    OPEN,
    context,
    dense_attention,
    gradients_agree,
    normal,
    set_logits,
    switchhead,
    switchhead_weights,
    with_constant_channel,
)
from tests.model.watch import Recorded, Watched, assert_float32_throughout

each_position = pytest.mark.parametrize("positions", ["rope", "xl"])


def set_both(layer: Any, logits: Tensor | float) -> None:
    set_logits(layer.value_router, logits)
    set_logits(layer.output_router, logits)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_forward_equals_the_specification_token_by_token_and_head_by_head(top_k: int):
    layer, x = switchhead(top_k=top_k), normal(2, 6, 6)
    y = layer(x, context(2)).y_BSD
    for row in range(2):
        expected = by_hand.switchhead(x[row], **switchhead_weights(layer), top_k=top_k, visible_SS=by_hand.causal(6))
        torch.testing.assert_close(y[row], expected, rtol=0, atol=1e-13)


@each_position
def test_all_experts_with_gates_of_one_are_multi_head_attention_with_summed_experts(positions: str):
    layer, x = switchhead(top_k=3, positions=positions), with_constant_channel(normal(2, 5, 6))
    set_both(layer, OPEN)
    torch.testing.assert_close(layer(x, context(2)).y_BSD, dense_attention(layer, x), rtol=0, atol=1e-13)


@each_position
@pytest.mark.parametrize(("logit", "share"), [(OPEN, 1.0), (0.0, 0.25)])
def test_one_expert_is_multi_head_attention_with_open_gates_and_a_quarter_of_it_with_zero_routers(
    logit: float, share: float, positions: str
):
    layer, x = (
        switchhead(num_experts=1, top_k=1, single_expert="gate_both", positions=positions),
        with_constant_channel(normal(2, 5, 6)),
    )
    set_both(layer, logit)
    torch.testing.assert_close(layer(x, context(2)).y_BSD, share * dense_attention(layer, x), rtol=0, atol=1e-13)


@each_position
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_identical_experts_with_zero_routers_are_multi_head_attention_times_half_k_squared(top_k: int, positions: str):
    layer, x = switchhead(top_k=top_k, positions=positions), normal(2, 5, 6)
    set_both(layer, 0.0)
    with torch.no_grad():
        for bank in (layer.value_experts, layer.output_experts):
            bank.weight.unflatten(0, (2, 3))[:] = bank.weight.unflatten(0, (2, 3))[:, :1].clone()
    one_expert_each = dense_attention(layer, x) / 3**2
    expected = (top_k / 2) ** 2 * one_expert_each
    torch.testing.assert_close(layer(x, context(2)).y_BSD, expected, rtol=0, atol=1e-13)


@each_position
@pytest.mark.parametrize("side", ["value", "output"])
def test_permuting_the_experts_of_a_head_with_their_router_rows_changes_nothing(side: str, positions: str):
    layer, x = switchhead(positions=positions), normal(2, 5, 6)
    before = layer(x, context(2)).y_BSD
    order = [0, 1, 2, 5, 3, 4]  # head 1 only
    bank, router = getattr(layer, f"{side}_experts"), getattr(layer, f"{side}_router")
    with torch.no_grad():
        bank.weight.copy_(bank.weight[order])
        assert not torch.allclose(layer(x, context(2)).y_BSD, before)
        router.weight.copy_(router.weight[order])
    torch.testing.assert_close(layer(x, context(2)).y_BSD, before, rtol=0, atol=1e-13)


@pytest.mark.parametrize("side", ["value", "output"])
def test_only_selected_experts_send_gradient_to_their_router_logits(side: str):
    layer, x = switchhead(), normal(2, 5, 6)
    logits = Recorded(getattr(layer, f"{side}_router"))
    (layer(x, context(2)).y_BSD * normal(2, 5, 6, seed=3)).sum().backward()
    for token in range(10):
        for head in range(2):
            chosen = by_hand.best(logits.last[token, head], 2)
            reached = logits.last_gradient[token, head].nonzero().flatten().tolist()
            assert reached == sorted(chosen)


@pytest.mark.parametrize("side", ["value", "output"])
def test_an_expert_that_no_token_selects_gets_exactly_zero_gradient(side: str):
    layer, x = switchhead(), with_constant_channel(normal(2, 5, 6))
    bank, router = getattr(layer, f"{side}_experts"), getattr(layer, f"{side}_router")
    set_logits(router, torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 1.0]).double())
    layer(x, context(2)).y_BSD.square().sum().backward()
    norms = bank.weight.grad.flatten(1).norm(dim=1)
    assert [bool(norm > 0) for norm in norms] == [True, True, False, True, False, True]


def test_gradients_of_input_routers_and_banks_equal_finite_differences_while_the_selection_stands():
    layer, x = switchhead(d_model=4, head_dim=4), normal(1, 3, 4)
    with torch.no_grad():
        for router in (layer.value_router, layer.output_router):
            router.weight *= 3
            ranked = router(x[0]).sort(-1, descending=True).values
            assert (ranked[..., 1] - ranked[..., 2]).min() > 1e-3, "a selection would change under the differences"
    assert gradients_agree(layer, x, context(1))


def test_a_row_is_evaluated_alike_whatever_rows_it_is_batched_with():
    layer, x = switchhead(), normal(4, 5, 6)
    together = layer(x, context(4)).y_BSD
    order = [2, 0, 3, 1]
    torch.testing.assert_close(layer(x[order], context(4)).y_BSD, together[order], rtol=0, atol=1e-13)
    for row in range(4):
        torch.testing.assert_close(layer(x[row : row + 1], context(1)).y_BSD[0], together[row], rtol=0, atol=1e-13)


def test_expert_dropout_changes_the_ranking_only():
    """With k = E nothing can be dropped, and neither a gate nor the scale of the rest changes."""
    plain, dropping, x = switchhead(top_k=3), switchhead(top_k=3).train(), normal(2, 5, 6)
    dropping.config = dropping.config.model_copy(update={"expert_dropout": 0.7})  # unchecked: a config refuses it
    torch.testing.assert_close(dropping(x, context(2)).y_BSD, plain(x, context(2)).y_BSD, rtol=0, atol=1e-13)


def test_value_and_output_experts_are_dropped_independently():
    """Equal routers; the choices of V and of O would agree if they shared a mask."""
    layer, x = switchhead(expert_dropout=0.5, top_k=1).train(), normal(1, 200, 6)
    with torch.no_grad():
        layer.output_router.weight.copy_(layer.value_router.weight)
    reports = layer(x, context(1)).reports
    assert not torch.equal(reports["value"].count_G, reports["output"].count_G)


def test_experts_are_dropped_with_the_configured_chance():
    """Expert 0 leads by far; expert 1 is chosen when 0 is dropped and 1 is not: p (1 - p)."""
    layer, x = switchhead(expert_dropout=0.25, num_experts=2, top_k=1).train(), with_constant_channel(normal(8, 256, 6))
    set_both(layer, torch.tensor([1.0, -1.0, 1.0, -1.0]).double())
    for report in layer(x, context(8)).reports.values():
        share = report.count_G.view(2, 2)[:, 1] / 2048
        assert (share - 0.1875).abs().max() < 5 * (0.1875 * 0.8125 / 2048) ** 0.5


def test_reports_count_the_copies_of_every_group_and_carry_no_gradient():
    layer, x = switchhead(), normal(2, 5, 6)
    reports = layer(x, context(2)).reports
    routers = switchhead_weights(layer)["routers"]
    assert set(reports) == {"value", "output"}
    for name, report in reports.items():
        counts, probabilities = torch.zeros(6), torch.zeros(6)
        for token in x.flatten(0, 1):
            for head in range(2):
                logits = routers[name][head] @ token
                probabilities[3 * head : 3 * head + 3] += (logits.exp() / logits.exp().sum()).float()
                for expert in by_hand.best(logits, 2):
                    counts[3 * head + expert] += 1
        assert torch.equal(report.count_G, counts)
        torch.testing.assert_close(report.probability_G.float(), probabilities)
        assert report.num_rows == 10
        assert not any(part.requires_grad for part in report)


def test_both_routings_are_planned_at_once_and_narrow_rows_travel():
    """V sends tokens of width D and gets (token, head) of width C back; O the reverse."""
    layer, x = switchhead(), normal(2, 5, 6)
    layer.dispatcher = watched = Watched()
    layer(x, context(2))
    assert watched.calls == [
        ("plan", 2),
        ("dispatch", "value", (10, 6)),
        "weights",
        ("combine", "value", (20, 10)),
        ("dispatch", "output", (20, 10)),
        "weights",
        ("combine", "output", (10, 6)),
    ]


def test_under_bfloat16_autocast_routers_weights_and_gradients_stay_float32():
    layer, x = switchhead(dtype=torch.float32), normal(2, 5, 6, dtype=torch.float32)
    recorded = [Recorded(router) for router in (layer.value_router, layer.output_router)]
    layer(x, context(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, context(2)).y_BSD
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
    for logits in recorded:
        plain, narrow = logits.outputs
        assert narrow.dtype == torch.float32
        assert torch.equal(plain, narrow)
    assert_float32_throughout(layer)


def test_bfloat16_autocast_is_the_float32_layer_up_to_rounding():
    layer, x = switchhead(dtype=torch.float32), normal(2, 5, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = layer(x, context(2)).y_BSD
    wide = layer(x, context(2)).y_BSD
    torch.testing.assert_close(narrow.float(), wide, rtol=0, atol=0.02 * wide.abs().max().item())


def test_a_rank_without_rows_takes_part_and_gives_none() -> None:
    layer, x = switchhead(expert_dropout=0.5).train(), torch.zeros(0, 5, 6, dtype=torch.float64, requires_grad=True)
    y = layer(x, context([])).y_BSD
    y.sum().backward()
    assert y.shape == (0, 5, 6)
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
