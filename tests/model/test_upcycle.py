"""Upcycling: a model with experts that begins from a dense one computes the same, in float64, wherever the mathematics says so."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.parameters import logical_parameters
from model.upcycle import recipes, small_routers
from tests.model.build import context, model_config, tokens, transformer

HEADS, WIDTH, HIDDEN = 4, 6, 12
ATTENTION = {"num_heads": HEADS, "head_dim": WIDTH}


def dense_config(*, attention: dict[str, Any] | None = None, mlp: dict[str, Any] | None = None) -> ModelConfig:
    return model_config(
        mixers=["attention"],
        feedforwards=["dense_mlp"],
        switchhead=None,
        sigma_moe=None,
        attention=ATTENTION | (attention or {}),
        dense_mlp={"hidden_dim": HIDDEN, "bias": False} | (mlp or {}),
    )


def sparse_config(
    *, switchhead: dict[str, Any] | None = None, sigma_moe: dict[str, Any] | None = None, **changes: Any
) -> ModelConfig:
    """Experts that are copies, two of which are chosen."""
    fields = {
        "mixers": ["switchhead"],
        "feedforwards": ["sigma_moe"],
        "attention": None,
        "dense_mlp": None,
        "switchhead": ATTENTION | {"num_experts": 3, "top_k": 2} | (switchhead or {}),
        "sigma_moe": {"num_experts": 4, "expert_dim": HIDDEN, "top_k": 2} | (sigma_moe or {}),
    }
    return model_config(**(fields | changes))


def upcycled(dense: Any, config: ModelConfig, *, router_scale: float) -> Any:
    """The model of `config` with the weights that `dense` gives it, what was drawn for its routers times `router_scale`."""
    model, known = transformer(config, seed=9), dict(dense.named_parameters())
    made, small = recipes(dense.config, config), small_routers(config)
    for parameter in logical_parameters(model):
        name = parameter.name
        if name in made:
            parameter.tensor.data.copy_(made[name](known.__getitem__))
        elif name in known:
            parameter.tensor.data.copy_(known[name])
        elif any(name.startswith(path) for path in small):
            parameter.tensor.data.mul_(router_scale)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens(3, 9), context(3)).logits_BSV


def error(config: ModelConfig, *, router_scale: float, dense: ModelConfig | None = None) -> float:
    """The largest difference between the logits of the two, as a part of the largest logit."""
    before = transformer(dense or dense_config())
    expected = logits(before)
    found = logits(upcycled(before, config, router_scale=router_scale))
    return float((found - expected).abs().max() / expected.abs().max())


EXACT_AT_ZERO = {
    "two copies": {},
    "one copy chosen": {"switchhead": {"top_k": 1}, "sigma_moe": {"top_k": 1}},
    "three copies": {"switchhead": {"top_k": 3}, "sigma_moe": {"top_k": 3}},
    "a single expert": {"switchhead": {"num_experts": 1, "top_k": 1}, "sigma_moe": {"num_experts": 1, "top_k": 1}},
    "all projections": {"switchhead": {"experts": ["q", "k", "v", "o"], "routers": "separate"}},
    "values alone": {"switchhead": {"experts": ["v"]}},
    "outputs alone": {"switchhead": {"experts": ["o"]}},
    "softmax of all": {"sigma_moe": {"router": "softmax"}},
    "switch": {"sigma_moe": {"router": "switch", "top_k": 1}},
    "sinkhorn": {"sigma_moe": {"router": "sinkhorn"}},
    "all slices": {"sigma_moe": {"num_experts": 4, "expert_dim": 3, "top_k": 4}},
    "all slices, softmax": {"sigma_moe": {"num_experts": 4, "expert_dim": 3, "top_k": 4, "router": "softmax"}},
}


@pytest.mark.parametrize("case", EXACT_AT_ZERO)
def test_with_a_router_of_zero_the_outputs_are_those_of_the_dense_model(case: str):
    config = sparse_config(**EXACT_AT_ZERO[case])
    assert error(config, router_scale=0.0) < 1e-13
    assert error(config, router_scale=1.0) > 1e-3, "the router counts where it is not small"


EXACT = {
    "softmax_after": {"switchhead": {"gates": "softmax"}, "sigma_moe": {"router": "softmax_after", "top_k": 3}},
    "noisy": {"switchhead": {"gates": "softmax", "top_k": 3}, "sigma_moe": {"router": "noisy"}},
    "recurrent": {"switchhead": {"gates": "softmax"}, "sigma_moe": {"router": "recurrent", "router_dim": 5}},
    "open slices": {
        "switchhead": {"gates": "softmax"},
        "sigma_moe": {"router": "average_keys", "num_experts": 4, "expert_dim": 3, "top_k": 4},
    },
}


@pytest.mark.parametrize("case", EXACT)
def test_gates_that_sum_to_1_or_are_1_need_no_small_router(case: str):
    assert error(sparse_config(**EXACT[case]), router_scale=1.0) < 1e-13


def test_query_heads_that_share_keys_and_values_get_a_copy_each():
    dense = dense_config(attention={"num_kv_heads": 2})
    for experts in (["v", "o"], ["q", "k", "v", "o"]):
        config = sparse_config(switchhead={"experts": experts, "routers": "separate"})
        assert error(config, router_scale=0.0, dense=dense) < 1e-13


@pytest.mark.parametrize(("scale", "bound"), [(1e-2, 1e-2), (1e-4, 1e-4)])
def test_a_small_router_costs_in_proportion(scale: float, bound: float):
    found = error(sparse_config(), router_scale=scale)
    assert 1e-3 * bound < found < bound


def test_some_of_the_slices_are_a_part_of_the_sum():
    """The dense layer with the slices that were not chosen left out: here the last ones, because the scores are equal."""
    config = sparse_config(
        switchhead={"gates": "softmax"}, sigma_moe={"num_experts": 4, "expert_dim": 3, "top_k": 3, "router": "sigmoid"}
    )
    dense = transformer(dense_config())
    found = logits(upcycled(dense, config, router_scale=0.0))
    for layer in dense.layers:
        layer.feedforward.down.weight.data[:, 9:] = 0.0
    torch.testing.assert_close(found, logits(dense), rtol=0, atol=1e-13)


def test_layers_of_one_kind_in_both_are_taken_as_they_are():
    dense = model_config(
        mixers=["attention"], feedforwards=["dense_mlp"], switchhead=None, sigma_moe=None, attention=ATTENTION
    )
    config = model_config(
        mixers=["attention", "switchhead"],
        feedforwards=["dense_mlp"],
        sigma_moe=None,
        attention=ATTENTION,
        switchhead=ATTENTION | {"num_experts": 3, "top_k": 2},
    )
    assert error(config, router_scale=0.0, dense=dense) < 1e-13


REFUSED = [
    ({}, {"sigma_moe": {"expert_dim": 5}}, r"hidden_dim is 12 .*expert_dim 5: .*expert_dim 12 \(copies.* or expert_dim 3"),
    ({}, {"sigma_moe": {"num_experts": 5, "expert_dim": 3}}, r"num_experts x expert_dim = 12 \(slices\)"),
    ({}, {"sigma_moe": {"router": "average_keys"}}, r"router average_keys.*choose expert_dim 3 "),
    ({}, {"sigma_moe": {"router": "noisy", "expert_dim": 3}}, r"router noisy.*choose expert_dim 12 \(copies of the dense layer\)$"),
    ({"mlp": {"bias": True}}, {}, r"model.dense_mlp.bias must be False to upcycle, but it is True"),
    ({"mlp": {"activation": "gelu"}}, {}, r"model.dense_mlp.activation must be relu to upcycle, but it is gelu"),
    ({"mlp": {"top_k": 3}}, {}, r"model.dense_mlp.top_k must be None to upcycle, but it is 3"),
    ({}, {"sigma_moe": {"num_shared_experts": 1}}, r"num_shared_experts must be 0 to upcycle, but it is 1"),
    ({}, {"switchhead": {"num_heads": 2}}, r"num_heads must be equal, but the dense model has 4 and this model 2"),
    ({}, {"switchhead": {"head_dim": 4}}, r"head_dim must be equal, but the dense model has 6 and this model 4"),
    ({}, {"switchhead": {"rotary_dim": 4}}, r"rotary_dim.* must be equal, but the dense model has 2 and this model 4"),
    ({}, {"switchhead": {"positions": "none"}}, r"positions must be equal, but the dense model has rope and this model none"),
    ({"attention": {"positions": "xl"}}, {"switchhead": {"positions": "xl"}}, r"learned biases.*positions is xl"),
    ({}, {"switchhead": {"num_experts": 1, "top_k": 1, "single_expert": "gate_output"}}, r"gate_output: set it to gate_both"),
    ({}, {"d_model": 6}, r"model.d_model must be equal, but the dense model has 8 and this model 6"),
    ({}, {"num_layers": 3}, r"model.num_layers must be equal, but the dense model has 2 and this model 3"),
]  # fmt: skip


@pytest.mark.parametrize(("dense", "sparse", "sentence"), REFUSED, ids=[case[2][:40] for case in REFUSED])
def test_what_does_not_fit_is_an_error_that_says_what_would(dense: dict, sparse: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        recipes(dense_config(**dense), sparse_config(**sparse))


def test_layers_that_are_no_twins_are_an_error_that_names_both():
    shifting = {"mixers": ["hsm"], "switchhead": None, "attention": None, "hsm": {"variant": "matrix"}}
    with pytest.raises(ValueError, match=r"a layer of model.mixers is Attention .* and HSM"):
        recipes(dense_config(), model_config(**shifting))
    wider = {"feedforwards": ["dense_mlp"], "sigma_moe": None, "dense_mlp": {"hidden_dim": HIDDEN + 1, "bias": False}}
    with pytest.raises(ValueError, match=r"hidden_dim was 12 and is 13"):
        recipes(dense_config(), model_config(mixers=["attention"], switchhead=None, attention=ATTENTION, **wider))
