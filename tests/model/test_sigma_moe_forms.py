"""What sigma-MoE can have beside its router: shared experts, hidden dropout, the regulariser over sequences, initial scales."""

import math
from typing import Any

import pytest
import torch

from model.feedforward_config import SigmaMoEConfig
from model.parameters import materialize
from tests.model import by_hand
from tests.model.build import (
    context,
    losses_of,
    normal,
    place,
    sigma_moe,
    sigma_moe_weights,
    with_constant_channel,
)


@pytest.mark.parametrize("num_shared_experts", [1, 3])
def test_shared_experts_are_one_dense_layer_that_every_token_visits_with_gate_one(num_shared_experts: int):
    layer, x = sigma_moe(num_shared_experts=num_shared_experts), normal(2, 6, 6)
    weights = sigma_moe_weights(layer)
    shared = {"up_DF": layer.shared_up.weight.T, "down_FD": layer.shared_down.weight.T}
    assert shared["up_DF"].shape == (6, num_shared_experts * 4)
    expected = torch.stack([by_hand.sigma_moe(row, **weights, top_k=2) + by_hand.dense_mlp(row, **shared) for row in x])
    torch.testing.assert_close(layer(x, context(2)).y_BSD, expected, rtol=0, atol=1e-13)


def test_where_the_norm_is_for_the_router_alone_all_experts_read_what_comes_before_it():
    layer, x, raw = sigma_moe(num_shared_experts=2), normal(2, 6, 6), normal(2, 6, 6, seed=1)
    assert not torch.allclose(layer(x, context(2), None, raw).y_BSD, layer(x, context(2)).y_BSD)
    scored = layer(x, context(2)).reports["mlp"]
    assert torch.equal(layer(x, context(2), None, raw).reports["mlp"].probability_G, scored.probability_G)
    with torch.no_grad():
        layer.experts.down.zero_()
    shared = {"up_DF": layer.shared_up.weight.T, "down_FD": layer.shared_down.weight.T}
    expected = torch.stack([by_hand.dense_mlp(row, **shared) for row in raw])
    torch.testing.assert_close(layer(x, context(2), None, raw).y_BSD, expected, rtol=0, atol=1e-13)


def test_the_regulariser_over_sequences_is_the_mean_over_rows_of_each_rows_own():
    layer, x = sigma_moe(entropy_weight=0.3, entropy_over="sequence"), normal(3, 6, 6)
    logits_BSHE = (x @ layer.router.weight.detach().T)[:, :, None]
    (loss,) = losses_of(layer(x, context(3)))
    assert loss.item() == pytest.approx(0.3 * by_hand.sequence_negative_entropy(logits_BSHE), rel=1e-13)


def hidden_of_ones(**settings: Any) -> Any:
    """A layer that gives back its hidden activations, all of them 1 before dropout, with gates of 1: channel f of expert 0, 1, ...

    Expert e writes channels 4 e to 4 e + 3 of the output, so that output and hidden layer of each chosen expert lie side by side.
    """
    layer = sigma_moe(d_model=20, expert_dim=4, top_k=3, router="average_keys", **settings)
    with torch.no_grad():
        layer.experts.up.zero_()
        layer.experts.up[:, 0] = 1.0
        layer.experts.down.zero_()
        for e in range(5):
            layer.experts.down[e, :, 4 * e : 4 * e + 4] = torch.eye(4)
    return layer


def test_hidden_dropout_zeroes_single_channels_of_single_experts_and_scales_the_rest():
    layer, x = hidden_of_ones(hidden_dropout=0.25), with_constant_channel(torch.zeros(40, 50, 20).double())
    plain = layer(x, context(40)).y_BSD
    assert torch.equal(plain[..., :12], torch.ones(40, 50, 12).double())  # equal scores: experts 0, 1 and 2
    kept = layer.train()(x, context(40)).y_BSD[..., :12]
    torch.testing.assert_close(kept.unique(), torch.tensor([0, 1 / 0.75], dtype=torch.float64))
    kept = (kept > 0).double().flatten(0, 1)
    spread = (0.25 * 0.75 / 2000) ** 0.5
    assert (kept.mean(0) - 0.75).abs().max() < 5 * spread
    assert (torch.corrcoef(kept.T) - torch.eye(12)).abs().max() < 5 / 2000**0.5, (
        "channels of all experts are independent"
    )


@pytest.mark.parametrize("change", [{"step": 1}, {"seed": 9}, {"depth": 2}])
def test_hidden_masks_change_with_step_seed_and_depth(change: dict[str, Any]):
    layer, x = sigma_moe(hidden_dropout=0.5, num_shared_experts=1).train(), normal(2, 6, 6)
    assert not torch.allclose(layer(x, context(2)).y_BSD, layer(x, context(2, **change)).y_BSD)


def test_hidden_dropout_also_acts_on_the_shared_experts():
    layer, x = sigma_moe(hidden_dropout=0.5, num_shared_experts=2), normal(2, 6, 6)
    with torch.no_grad():
        layer.experts.down.zero_()
    assert not torch.allclose(layer.train()(x, context(2)).y_BSD, layer.eval()(x, context(2)).y_BSD)


@pytest.mark.parametrize(
    ("settings", "fan_in", "scale"),
    [
        ({}, 16 * 32, 1.0),
        ({"initialisation": "standard"}, 32, 1.0),
        ({"num_shared_experts": 4}, 20 * 32, 1.0),
        ({"router": "switch", "top_k": 1, "initialisation": "standard", "init_scale": 0.1}, 32, 0.1),
    ],
)
def test_initial_scales_are_those_of_the_fan_in_that_the_setting_names(settings, fan_in: int, scale: float):
    sizes = {"num_experts": 16, "expert_dim": 32, "top_k": 4}
    layer: Any = SigmaMoEConfig.model_validate(sizes | settings).build(place("switchhead", d_model=64, num_layers=8))
    materialize(layer, seed=3)
    std_in, std_out = (math.sqrt(scale * 2 / 8 / size) for size in (64, fan_in))
    expected = {"experts.up": std_in, "experts.down": std_out, "router.weight": std_in}
    expected |= {"shared_up.weight": std_in, "shared_down.weight": std_out}
    for name, value in layer.named_parameters():
        tolerance = 5 / (2 * value.numel()) ** 0.5
        assert value.std().item() == pytest.approx(expected[name], rel=tolerance), name
