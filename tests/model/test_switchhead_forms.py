"""SwitchHead's other forms: which projections are experts, who shares a router, softmax gates, one expert, the regulariser."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model.switchhead import GatedAttention, SwitchHead
from tests.model import by_hand
from tests.model.build import (
    OPEN,
    context,
    dense_attention,
    gradients_agree,
    losses_of,
    normal,
    remembering,
    set_logits,
    switchhead,
    switchhead_weights,
    with_constant_channel,
)
from tests.model.watch import Recorded, Watched

SUBSETS = ["".join(subset) for size in range(1, 5) for subset in itertools.combinations("qkvo", size)]
each_subset = pytest.mark.parametrize("experts", SUBSETS)


def routers(layer: Any) -> dict[str, Any]:
    return {name.removesuffix("_router"): module for name, module in layer.named_children() if name.endswith("_router")}


def form(experts: str = "vo", **settings: Any) -> Any:
    return switchhead(experts=tuple(experts), **settings)


def assert_written_out(layer: Any, x_BMD: Tensor, facts: Any, *, num_memory: int = 0) -> None:
    y = layer(x_BMD, facts).y_BSD
    own = {"top_k": layer.config.top_k, "gates": layer.config.gates}
    visible = by_hand.causal(x_BMD.shape[1] - num_memory, earlier=num_memory)
    for row, x_MD in zip(y, x_BMD, strict=True):
        expected = by_hand.switchhead(x_MD, **switchhead_weights(layer), **own, visible_SS=visible)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-12)


@each_subset
@pytest.mark.parametrize("sharing", ["side", "separate", "shared"])
def test_any_projections_may_be_experts_with_any_routers(experts: str, sharing: str):
    """With memory, so that the keys' side and the queries' side have different tokens."""
    layer = form(experts, routers=sharing, head_dim=6)
    assert_written_out(layer, normal(2, 5, 6), remembering(2, 2), num_memory=2)


@each_subset
@pytest.mark.parametrize("positions", ["rope", "xl"])
def test_all_experts_with_gates_of_one_are_multi_head_attention_with_summed_experts(experts: str, positions: str):
    layer, x = form(experts, top_k=3, positions=positions), with_constant_channel(normal(2, 5, 6))
    for router in routers(layer).values():
        set_logits(router, OPEN)
    torch.testing.assert_close(layer(x, context(2)).y_BSD, dense_attention(layer, x), rtol=0, atol=1e-12)


@each_subset
def test_each_expert_projection_has_a_bank_and_each_other_one_a_matrix(experts: str):
    layer = form(experts)
    modules = dict(layer.named_children())
    for letter, name in {"q": "query", "k": "key", "v": "value", "o": "output"}.items():
        assert (f"{name}_experts" in modules) == (letter in experts)
        assert (name in modules) == (letter not in experts)
    shapes = {shape.name: shape.num_groups for shape in layer.config.banks(layer.place)}
    assert shapes == {name: bank.num_groups for name, bank in modules.items() if name.endswith("_experts")}


@pytest.mark.parametrize(
    ("experts", "sharing", "names"),
    [
        ("vo", "side", {"value", "output"}),
        ("qkvo", "side", {"value", "output"}),
        ("qk", "side", {"key", "query"}),
        ("qkvo", "separate", {"value", "key", "output", "query"}),
        ("qkvo", "shared", {"value"}),
        ("vo", "shared", {"value"}),
        ("o", "shared", {"output"}),
    ],
)
def test_the_routers_are_those_of_the_setting_and_each_has_a_report(experts: str, sharing: str, names: set[str]):
    layer = form(experts, routers=sharing)
    assert set(routers(layer)) == names
    assert set(layer(normal(1, 3, 6), context(1)).reports) == names


def test_a_shared_router_is_v_and_o_with_equal_routers():
    shared, own, x = form(routers="shared"), form(), normal(2, 5, 6)
    with torch.no_grad():
        for name in ("value_router", "output_router"):
            getattr(own, name).weight.copy_(shared.value_router.weight)
    for layer in (shared, own):
        layer(x, context(2)).y_BSD.square().sum().backward()
    torch.testing.assert_close(shared(x, context(2)).y_BSD, own(x, context(2)).y_BSD, rtol=0, atol=1e-13)
    both = own.value_router.weight.grad + own.output_router.weight.grad
    torch.testing.assert_close(shared.value_router.weight.grad, both, rtol=0, atol=1e-13)


def test_projections_that_share_a_router_are_dropped_together():
    """Zero routers: who is chosen depends on the masks alone."""
    layer, x = form("qkvo", expert_dropout=0.5, top_k=1).train(), normal(1, 60, 6)
    for router in routers(layer).values():
        set_logits(router, 0.0)
    layer.dispatcher = watched = Watched()
    layer(x, context(1))
    chosen = {name: ids for name, ids in zip(layer.router_of, watched.expert_ids, strict=True)}
    assert torch.equal(chosen["value"], chosen["key"])
    assert torch.equal(chosen["output"], chosen["query"])
    assert not torch.equal(chosen["value"], chosen["output"])


@pytest.mark.parametrize("experts", ["vo", "qkvo"])
@pytest.mark.parametrize("top_k", [2, 3])
def test_softmax_gates_are_shares_of_the_chosen_logits(experts: str, top_k: int):
    assert_written_out(form(experts, gates="softmax", top_k=top_k), normal(2, 5, 6), context(2))


@pytest.mark.parametrize("top_k", [2, 3])
def test_with_softmax_gates_identical_experts_are_one_expert_whatever_k(top_k: int):
    layer, x = form(gates="softmax", top_k=top_k), normal(2, 5, 6)
    with torch.no_grad():
        for bank in (layer.value_experts, layer.output_experts):
            bank.weight.unflatten(0, (2, 3))[:] = bank.weight.unflatten(0, (2, 3))[:, :1].clone()
    torch.testing.assert_close(layer(x, context(2)).y_BSD, dense_attention(layer, x) / 3**2, rtol=0, atol=1e-13)


def gated(**settings: Any) -> Any:
    return switchhead(num_experts=1, top_k=1, single_expert="gate_output", **settings)


@pytest.mark.parametrize("positions", ["rope", "xl", "none"])
@pytest.mark.parametrize("documents", [None, torch.tensor([[0, 0, 1, 1, 1]] * 2)], ids=["causal", "documents"])
def test_one_gate_on_what_a_head_has_read_written_out(positions: str, documents: Tensor | None):
    layer, x = gated(positions=positions), normal(2, 5, 6)
    form = switchhead_weights(layer)
    y = layer(x, context(2, documents_BS=documents)).y_BSD
    visible = by_hand.causal(5) if documents is None else by_hand.causal(5) & (documents[0][:, None] == documents[0])
    for x_SD, found in zip(x, y, strict=True):
        expected = torch.zeros_like(x_SD)
        for h, (query, key, value, output) in enumerate(zip(*form["weights"].values(), strict=True)):
            read = by_hand.attend(x_SD @ query, x_SD @ key, x_SD @ value, visible, head=h, positions=form["positions"])
            gates = torch.stack([by_hand.gate(layer.output_router.weight.detach()[h] @ x_D) for x_D in x_SD])
            expected += (gates[:, None] * read) @ output
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("positions", ["rope", "xl"])
@pytest.mark.parametrize(("logit", "share"), [(OPEN, 1.0), (0.0, 0.5)])
def test_one_gated_output_is_multi_head_attention_and_half_of_it_with_a_zero_router(
    logit: float, share: float, positions: str
):
    """One gate, where the other reading has two: a half instead of a quarter."""
    layer, x = gated(positions=positions), with_constant_channel(normal(2, 5, 6))
    set_logits(layer.output_router, logit)
    torch.testing.assert_close(layer(x, context(2)).y_BSD, share * dense_attention(layer, x), rtol=0, atol=1e-13)


def test_the_two_readings_of_one_expert_are_what_the_settings_build():
    assert isinstance(gated(), GatedAttention)
    for single_expert in (None, "gate_both"):
        both = switchhead(num_experts=1, top_k=1, single_expert=single_expert)
        assert isinstance(both, SwitchHead)
        assert set(routers(both)) == {"value", "output"}
    assert gated().output_router.weight.shape == (2, 6)
    result = gated()(normal(1, 3, 6), context(1))
    assert (losses_of(result), dict(result.reports)) == ((), {})


def test_one_gated_output_with_memory_and_with_bfloat16():
    layer, x = gated(dtype=torch.float32), normal(2, 7, 6, dtype=torch.float32)
    wide = layer(x, remembering(2, 3)).y_BSD
    assert wide.shape == (2, 4, 6)
    assert not torch.allclose(wide, layer(x[:, 3:], context(2)).y_BSD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = layer(x, remembering(2, 3)).y_BSD
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), wide, rtol=0, atol=0.03 * wide.abs().max().item())


@pytest.mark.parametrize("num_memory", [0, 3])
@pytest.mark.parametrize("sharing", ["side", "shared", "separate"])
def test_the_regulariser_is_the_mean_over_rows_of_the_negative_entropy_over_tokens_and_heads(
    sharing: str, num_memory: int
):
    """One term for each router, of the row's own tokens: memory was counted when it was a row."""
    layer, x = form("qkvo", entropy_weight=0.3, routers=sharing), 4 * normal(2, num_memory + 5, 6)
    losses = losses_of(layer(x, remembering(2, num_memory) if num_memory else context(2)))
    assert len(losses) == len(routers(layer))
    for loss, router in zip(losses, routers(layer).values(), strict=True):
        logits = (x[:, num_memory:] @ router.weight.detach().T).unflatten(2, (2, 3))
        assert loss.item() == pytest.approx(0.3 * by_hand.sequence_negative_entropy(logits), rel=1e-12)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [([0.0] * 6, -math.log(3)), ([200.0, 0, 0, 200, 0, 0], 0.0), ([200.0, 0, 0, 0, 200, 0], -math.log(2))],
)
def test_the_regulariser_has_its_exact_values(logits: list[float], expected: float):
    """The last: each head always takes the same expert, but not the same as the other head."""
    layer, x = form(entropy_weight=0.5), with_constant_channel(normal(2, 5, 6))
    for router in routers(layer).values():
        set_logits(router, torch.tensor(logits).double())
    for loss in losses_of(layer(x, context(2))):
        assert loss.item() == pytest.approx(0.5 * expected, rel=1e-12, abs=1e-12)


def test_the_regulariser_is_a_mean_over_rows_not_a_mean_before_the_entropy():
    """Each row always takes one expert, another one than the next row: 0, where sigma-MoE's would be -log 2."""
    layer, x = form(entropy_weight=0.5), torch.zeros(2, 5, 6, dtype=torch.float64)
    x[0, :, 0], x[1, :, 1] = 200.0, 200.0
    with torch.no_grad():
        for router in routers(layer).values():
            router.weight.zero_()
            router.weight[[0, 3], 0] = 1.0
            router.weight[[1, 4], 1] = 1.0
    assert [loss.item() for loss in losses_of(layer(x, context(2)))] == pytest.approx([0.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("num_memory", [0, 3])
def test_reports_count_the_row_and_not_its_memory(num_memory: int):
    layer, x = form("qkvo", routers="separate"), normal(2, num_memory + 5, 6)
    reports = layer(x, remembering(2, num_memory) if num_memory else context(2)).reports
    for name, report in layer(x[:, num_memory:], context(2)).reports.items():
        assert report.num_rows == reports[name].num_rows == 10
        assert torch.equal(report.count_G, reports[name].count_G)
        torch.testing.assert_close(report.probability_G, reports[name].probability_G)


def test_only_the_routers_of_v_and_k_read_memory():
    layer = form("qkvo", routers="separate")
    logits = {name: Recorded(router) for name, router in routers(layer).items()}
    layer(normal(2, 8, 6), remembering(2, 3))
    read = {name: recorded.last.shape[0] for name, recorded in logits.items()}
    assert read == {"value": 16, "key": 16, "output": 10, "query": 10}


@pytest.mark.parametrize(
    "settings",
    [
        {"experts": ("q", "k", "v", "o")},
        {"experts": ("q", "k"), "routers": "separate"},
        {"routers": "shared", "positions": "xl"},
        {"gates": "softmax"},
        {"entropy_weight": 0.7},
    ],
    ids=str,
)
def test_gradients_of_each_form_equal_finite_differences(settings: dict[str, Any]):
    layer, x = form(**{"head_dim": 4, "top_k": 3, "d_model": 4, **settings}), normal(2, 4, 4)
    assert gradients_agree(layer, x, remembering(2, 1), fast=True)


def test_gradients_of_one_gated_output_equal_finite_differences():
    assert gradients_agree(gated(head_dim=4, d_model=4), normal(2, 3, 4), context(2), fast=True)


def test_only_selected_experts_of_q_and_k_send_gradient_to_their_router_logits():
    layer, x = form("qk"), normal(2, 5, 6)
    logits = {name: Recorded(router) for name, router in routers(layer).items()}
    (layer(x, context(2)).y_BSD * normal(2, 5, 6, seed=3)).sum().backward()
    for recorded in logits.values():
        for token, head in itertools.product(
            range(1, 5), range(2)
        ):  # the first query has one key: its scores have no gradient
            reached = recorded.last_gradient[token, head].nonzero().flatten().tolist()
            assert reached == sorted(by_hand.best(recorded.last[token, head], 2))


def test_all_routings_are_planned_at_once_and_all_experts_of_the_input_start_before_one_is_awaited():
    layer, x = form("qkvo"), normal(2, 7, 6)
    layer.dispatcher = watched = Watched()
    layer(x, remembering(2, 2))
    into, back = [("value", 14), ("query", 10), ("key", 14)], ("output", (20, 10))
    assert watched.calls == [
        ("plan", 4),
        *(call for name, rows in into for call in (("dispatch", name, (rows, 6)), "weights")),
        *(("combine", name, (2 * rows, 10)) for name, rows in into),
        ("dispatch", *back),
        "weights",
        ("combine", "output", (10, 6)),
    ]
