"""Every router of sigma-MoE's comparison in the layer: forward by hand, gradients, evaluation, and Avg-K's identities."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import model.router
from model.router import best
from tests.model import by_hand
from tests.model.build import context, gradients_agree, losses_of, normal, set_logits, sigma_moe, with_constant_channel
from tests.model.watch import Recorded, Watched

ROUTERS = ["sigmoid", "softmax", "softmax_after", "switch", "sinkhorn", "noisy", "average_keys", "recurrent"]


def layer_with(router: str, **settings: Any) -> Any:
    """A layer with both losses; the recurrent router's biases and the noise are off their initial zeros."""
    defaults: dict[str, Any] = {"router": router, "entropy_weight": 0.7, "load_weight": 0.4}
    if router == "recurrent":
        defaults["router_dim"] = 7
    layer = sigma_moe(**(defaults | settings))
    with torch.no_grad():
        for number, (name, value) in enumerate(layer.named_parameters()):
            if "bias" in name or "noise" in name:
                value += 0.3 * normal(*value.shape, seed=number)
    return layer


def logits_of(layer: Any, x_TD: Tensor) -> Tensor:
    """Written from the equations, without the router modules."""
    if layer.config.router == "average_keys":
        return torch.stack([(x_TD @ up_DF).mean(1) for up_DF in layer.experts.up], dim=1)
    if layer.config.router != "recurrent":
        return x_TD @ layer.router.weight.T
    cell = torch.nn.GRUCell(7, 7).double()
    recurrence = layer.router.recurrence
    with torch.no_grad():
        cell.weight_ih.copy_(recurrence.input_weight)
        cell.weight_hh.copy_(recurrence.state_weight)
        cell.bias_ih.copy_(recurrence.input_bias)
        cell.bias_hh.copy_(recurrence.state_bias)
    return cell(x_TD @ layer.router.input_weight.T) @ layer.router.weight.T


@pytest.mark.parametrize("router", [router for router in ROUTERS if router not in ("sigmoid", "sinkhorn")])
def test_the_forward_equals_the_equations_token_by_token(router: str):
    layer, x = layer_with(router), normal(2, 6, 6)
    gates = {"softmax": "before", "switch": "before", "average_keys": "open"}.get(router, "after")
    x_TD = x.flatten(0, 1)
    weights = {"up_EDF": layer.experts.up, "down_EFD": layer.experts.down}
    expected = by_hand.routed_mlp(x_TD, **weights, logits_SE=logits_of(layer, x_TD), top_k=2, gates=gates)
    torch.testing.assert_close(layer(x, context(2)).y_BSD.flatten(0, 1), expected, rtol=0, atol=1e-13)


def test_sinkhorn_evaluates_by_the_plain_ranking_with_sigmoid_gates():
    balanced, plain, x = layer_with("sinkhorn"), layer_with("sigmoid"), normal(2, 6, 6)
    assert torch.equal(balanced(x, context(2)).y_BSD, plain(x, context(2)).y_BSD)
    assert not torch.allclose(balanced.train()(x, context(2)).y_BSD, plain.train()(x, context(2)).y_BSD)


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_equal_finite_differences_with_the_selection_frozen(router: str, monkeypatch: pytest.MonkeyPatch):
    layer, x, frozen = layer_with(router, d_model=4).train(), normal(1, 4, 4), []

    def first_choice(scores_THE: Tensor, top_k: int) -> Tensor:
        if not frozen:
            frozen.append(best(scores_THE, top_k))
        return frozen[0]

    monkeypatch.setattr(model.router, "best", first_choice)
    assert gradients_agree(layer, x, context(1))


@pytest.mark.parametrize("router", ROUTERS)
def test_every_parameter_gets_gradient(router: str):
    layer, x = layer_with(router, expert_dim=16, num_shared_experts=1).train(), normal(4, 16, 6)
    result = layer(x, context(4))
    torch.stack([(result.y_BSD * normal(4, 16, 6, seed=3)).sum(), *losses_of(result)]).sum().backward()
    for name, value in layer.named_parameters():
        if name == "router.recurrence.state_weight":  # the state below the first layer is 0
            continue
        assert value.grad is not None, name
        assert value.grad.any(), name


@pytest.mark.parametrize("router", ["softmax_after", "noisy", "sinkhorn", "recurrent", "softmax", "switch"])
def test_only_a_softmax_over_all_experts_sends_gradient_to_logits_that_were_not_selected(router: str):
    layer, x = layer_with(router, entropy_weight=0.0, load_weight=0.0, expert_dim=16).train(), normal(2, 6, 6)
    recorded = Recorded(layer.router, lambda scored: scored if isinstance(scored, Tensor) else scored.logits_T1E)
    layer.dispatcher = watched = Watched()
    (layer(x, context(2)).y_BSD * normal(2, 6, 6, seed=3)).sum().backward()
    for chosen, gradient in zip(watched.expert_ids[0], recorded.last_gradient[:, 0], strict=True):
        wanted = range(5) if router in ("softmax", "switch") else sorted(chosen.tolist())
        assert gradient.nonzero().flatten().tolist() == list(wanted)


@pytest.mark.parametrize("router", ROUTERS)
def test_evaluation_is_deterministic_and_does_not_depend_on_the_batch(router: str):
    layer, x = layer_with(router, expert_dropout=0.5, hidden_dropout=0.5, num_shared_experts=1), normal(4, 5, 6)
    together = layer(x, context(4)).y_BSD
    assert torch.equal(layer(x, context(4, step=3)).y_BSD, together)
    alone = torch.stack([layer(token[None, None], context(1)).y_BSD[0, 0] for token in x.flatten(0, 1)])
    torch.testing.assert_close(alone, together.flatten(0, 1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("router", ROUTERS)
def test_in_training_only_sinkhorn_depends_on_the_batch(router: str):
    settings = {"expert_dropout": 0.3, "hidden_dropout": 0.3, "num_shared_experts": 1}
    layer, x, positions = layer_with(router, **settings).train(), normal(4, 5, 6), [3, 2**33, 8, 1]
    together = layer(x, context(positions)).y_BSD
    alone = torch.stack([layer(x[i : i + 1], context(positions[i : i + 1])).y_BSD[0] for i in range(4)])
    assert torch.allclose(alone, together, rtol=0, atol=1e-13) == (router != "sinkhorn")


@pytest.mark.parametrize("router", ROUTERS)
def test_a_rank_without_rows_takes_part_with_zero_gradients(router: str):
    settings = {"expert_dropout": 0.3, "hidden_dropout": 0.3, "num_shared_experts": 1}
    layer, x = layer_with(router, **settings).train(), torch.zeros(0, 5, 6, dtype=torch.float64, requires_grad=True)
    result = layer(x, context([]))
    torch.stack([result.y_BSD.sum(), *losses_of(result)]).sum().backward()
    assert result.y_BSD.shape == (0, 5, 6)
    for name, value in layer.named_parameters():
        assert value.grad is not None, name
        assert not value.grad.any(), name


@pytest.mark.parametrize("router", ROUTERS)
def test_under_bfloat16_autocast_router_losses_and_gradients_stay_float32(router: str):
    layer, x = layer_with(router, dtype=torch.float32), normal(2, 6, 6, dtype=torch.float32)
    plain = layer(x, context(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = layer(x, context(2))
    assert narrow.y_BSD.dtype == torch.bfloat16
    assert torch.equal(plain.reports["mlp"].probability_G, narrow.reports["mlp"].probability_G)
    for one, other in zip(losses_of(plain), losses_of(narrow), strict=True):
        assert torch.equal(one, other)
    assert plain.carry_TX is None or torch.equal(plain.carry_TX, narrow.carry_TX)
    torch.stack([narrow.y_BSD.float().square().sum(), *losses_of(narrow)]).sum().backward()
    assert all(value.grad is None or value.grad.dtype == torch.float32 for value in layer.parameters())


@pytest.mark.parametrize("router", ROUTERS)
def test_permuting_experts_with_their_routers_rows_changes_nothing(router: str):
    layer, x, order = layer_with(router), normal(2, 6, 6), [3, 0, 4, 1, 2]
    before = layer(x, context(2)).y_BSD
    with torch.no_grad():
        for value in layer.parameters():
            if len(value) == 5:
                value.copy_(value[order])
    torch.testing.assert_close(layer(x, context(2)).y_BSD, before, rtol=0, atol=1e-13)


def test_average_keys_with_experts_of_width_one_are_the_top_k_feed_forward():
    """Score and pre-activation are then the same, and the k best pre-activations run (specs, topk_attention section 3)."""
    layer, x = sigma_moe(router="average_keys", num_experts=9, expert_dim=1, top_k=4), normal(2, 6, 6)
    up_DF, down_FD = layer.experts.up.detach()[:, :, 0].T, layer.experts.down.detach()[:, 0]
    expected = []
    for token in x.flatten(0, 1):
        hidden = token @ up_DF
        kept = by_hand.best(hidden, 4)
        expected.append(sum(hidden[i].clamp(min=0) * down_FD[i] for i in kept))
    found = layer(x, context(2)).y_BSD.flatten(0, 1)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-13)


def test_average_keys_with_one_expert_are_the_dense_mlp():
    layer, x = sigma_moe(router="average_keys", num_experts=1, expert_dim=9, top_k=1), normal(2, 6, 6)
    expected = by_hand.dense_mlp(x.flatten(0, 1), up_DF=layer.experts.up[0], down_FD=layer.experts.down[0])
    torch.testing.assert_close(layer(x, context(2)).y_BSD.flatten(0, 1), expected, rtol=0, atol=1e-13)


def test_average_keys_have_no_router_weights_and_a_regulariser_reaches_every_experts_keys():
    layer, x = sigma_moe(router="average_keys", entropy_weight=1.0), normal(2, 6, 6)
    assert {name for name, _ in layer.named_parameters()} == {"experts.up", "experts.down"}
    losses_of(layer(x, context(2)))[0].backward()
    per_channel_EDF = layer.experts.up.grad
    assert (per_channel_EDF.flatten(1).norm(dim=1) > 0).all()
    torch.testing.assert_close(per_channel_EDF, per_channel_EDF[:, :, :1].expand_as(per_channel_EDF))


@pytest.mark.parametrize("router", ROUTERS)
def test_the_regulariser_looks_at_the_logits_without_noise_or_potentials(router: str):
    layer, x = layer_with(router, load_weight=0.0).train(), normal(2, 6, 6)
    (loss,) = losses_of(layer(x, context(2)))
    expected = 0.7 * by_hand.negative_entropy(logits_of(layer, x.flatten(0, 1)).detach())
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("reading", "factor"), [(None, 1), ("paper", 1), ("code", 1 / 25)])
def test_both_losses_are_given_where_both_have_a_weight(reading: str | None, factor: float):
    layer, x = layer_with("switch", load_reading=reading), with_constant_channel(normal(2, 6, 6))
    set_logits(layer.router, 0.0)
    load, entropy = losses_of(layer(x, context(2)))
    assert entropy.item() == pytest.approx(-0.7 * math.log(5), rel=1e-13)
    assert load.item() == pytest.approx(0.4 * factor, rel=1e-12)  # P is 1 / 5 for each expert, whatever f is


def test_switchs_router_rows_are_not_made_equal():
    norms = {}
    for router in ("switch", "softmax"):
        layer = sigma_moe(router=router, num_experts=32)
        norms[router] = layer.router.weight.norm(dim=1)
    assert norms["switch"].std() > 0.1 * norms["switch"].mean()
    torch.testing.assert_close(norms["softmax"], norms["softmax"][:1].expand(32), rtol=1e-6, atol=0)
