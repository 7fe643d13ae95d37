"""The `sigma_moe` and `dense_mlp` sections: what null means, and settings that would have no effect are errors with a remedy."""

from typing import Any

import pytest
from pydantic import ValidationError

from model.feedforward_config import DenseMLPConfig, LossWeights, SigmaMoEConfig

SIZES = {"num_experts": 8, "expert_dim": 4, "top_k": 2}


def config(**settings: Any) -> SigmaMoEConfig:
    return SigmaMoEConfig.model_validate(SIZES | settings)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, (1e-4, 0.0)),
        ({"router": "sinkhorn"}, (1e-4, 0.0)),
        ({"router": "switch"}, (0.0, 0.01)),
        ({"router": "recurrent"}, (0.0, 1e-3)),
        ({"router": "average_keys"}, (0.0, 0.0)),
        ({"balance": "bias"}, (0.0, 0.0)),
        ({"router": "switch", "balance": "bias"}, (0.0, 0.0)),
        ({"num_experts": 1, "top_k": 1}, (0.0, 0.0)),
        ({"entropy_weight": 0.5}, (0.5, 0.0)),
        ({"router": "switch", "entropy_weight": 0.5}, (0.5, 0.01)),
        ({"router": "switch", "load_weight": 0.2}, (0.0, 0.2)),
        ({"router": "average_keys", "entropy_weight": 0.5, "load_weight": 0.25}, (0.5, 0.25)),
    ],
)
def test_null_weights_are_those_published_with_the_router(settings: dict[str, Any], weights: tuple[float, float]):
    assert config(**settings).loss_weights() == LossWeights(*weights)


def test_what_null_was_turned_into_is_noted_where_it_is_not_the_usual():
    (note,) = config(router="switch").notes()
    assert "entropy_weight is 0.0 and load_weight is 0.01" in note
    assert "router switch" in note
    assert config().notes() == []
    assert config(router="switch", entropy_weight=0.0, load_weight=0.01).notes() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router_dim": 64}, "router_dim needs router recurrent, but router_dim is 64, router sigmoid.*set router_dim to null"),
        (
            {"entropy_over": "batch", "router": "switch"},
            r"entropy_over needs an entropy_weight above 0, but entropy_over is batch.*entropy_weight 0\.0.*set entropy_over to null",
        ),
        ({"load_reading": "code"}, r"load_reading needs a load_weight above 0.*load_weight 0\.0.*set load_reading to null"),
        (
            {"bias_update_speed": 0.1},
            r"bias_update_speed needs balance bias, but bias_update_speed is 0\.1.*balance none.*set bias_update_speed to null",
        ),
        ({"num_experts": 1, "top_k": 1, "entropy_weight": 0.1}, r"entropy_weight is 0\.1 and num_experts is 1: set entropy_weight to 0"),
        ({"num_experts": 1, "top_k": 1, "load_weight": 0.1}, r"load_weight is 0\.1 and num_experts is 1: set load_weight to 0"),
        ({"balance": "bias", "entropy_weight": 0.1}, r"balance is bias and entropy_weight is 0\.1: set entropy_weight to 0 or balance"),
        ({"balance": "bias", "load_weight": 0.1}, r"balance is bias and load_weight is 0\.1: set load_weight to 0 or balance"),
        ({"balance": "bias", "router": "sinkhorn"}, "router is sinkhorn and balance is bias: set balance to none or router"),
        ({"balance": "bias", "top_k": 8}, "top_k and num_experts are both 8 and balance is bias: lower top_k"),
        *(
            ({"router": router, "top_k": 1}, f"router is {router} and top_k is 1.*raise top_k or set router")
            for router in ("softmax_after", "noisy", "recurrent")
        ),
    ],
)  # fmt: skip
def test_a_setting_without_an_effect_or_one_that_fights_another_is_an_error_with_a_remedy(settings, message: str):
    with pytest.raises(ValidationError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"init_scale": 0.0},
        {"bias_update_speed": 0.0, "balance": "bias"},
        {"hidden_dropout": 1.0},
        {"num_shared_experts": -1},
        {"router_dim": 0, "router": "recurrent"},
        {"load_weight": -0.1},
    ],
)
def test_values_out_of_range_are_errors(settings: dict[str, Any]):
    with pytest.raises(ValidationError):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "has_bias"),
    [
        ({}, True),
        ({"activation": "gelu"}, True),
        ({"activation": "swiglu"}, False),
        ({"activation": "swiglu", "bias": True}, True),
        ({"bias": False}, False),
    ],
)
def test_dense_biases_are_those_of_the_papers_baselines_and_none_with_swiglu(settings, has_bias: bool):
    assert DenseMLPConfig.model_validate({"hidden_dim": 9} | settings).has_bias() == has_bias


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"top_k": 3, "activation": "gelu"},
            "activation is gelu and top_k is 3: set top_k to null or activation to relu",
        ),
        ({"top_k": 3, "activation": "swiglu"}, "activation is swiglu and top_k is 3"),
        ({"top_k": 10}, "top_k is 10 and hidden_dim is 9: lower top_k"),
    ],
)
def test_a_top_k_that_ranks_nothing_or_keeps_more_than_all_is_an_error(settings: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        DenseMLPConfig.model_validate({"hidden_dim": 9} | settings)
