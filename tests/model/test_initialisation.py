"""The distribution of every weight of a new model (sections 4 and 5 of the specifications)."""

import math
import re

import pytest
import torch

from model.parameters import logical_parameters, materialize
from model.transformer import Transformer
from tests.model.build import VOCABULARY, model_config

D_MODEL, NUM_LAYERS, HEADS, HEAD_DIM, EXPERTS, EXPERT_DIM, HIDDEN = 48, 3, 2, 20, 4, 24, 80
SCALE = math.sqrt(2 / NUM_LAYERS)
MODEL = {
    "d_model": D_MODEL,
    "num_layers": NUM_LAYERS,
    "switchhead": {"num_heads": HEADS, "head_dim": HEAD_DIM, "num_experts": EXPERTS, "top_k": 2},
    "sigma_moe": {"num_experts": 6, "expert_dim": EXPERT_DIM, "top_k": 2},
    "attention": {"num_heads": HEADS, "head_dim": HEAD_DIM},
    "dense_mlp": {"hidden_dim": HIDDEN},
}
# Standard deviations by the specifications: W_O by the fan-in of all heads, W2 by that of all experts; never by one expert or by k.
STDS = {
    r"embedding\.weight": 1 / math.sqrt(D_MODEL),
    r"output\.weight": 1 / math.sqrt(D_MODEL),
    r"layers\.[02]\.mixer\.(query|key|value_router|output_router|value_experts)\.weight": SCALE / math.sqrt(D_MODEL),
    r"layers\.[02]\.mixer\.output_experts\.weight": SCALE / math.sqrt(HEADS * HEAD_DIM),
    r"layers\.1\.mixer\.(query|key|value)\.weight": SCALE / math.sqrt(D_MODEL),
    r"layers\.1\.mixer\.output\.weight": SCALE / math.sqrt(HEADS * HEAD_DIM),
    r"layers\.[02]\.feedforward\.router\.weight": SCALE / math.sqrt(D_MODEL),
    r"layers\.[02]\.feedforward\.experts\.up": SCALE / math.sqrt(D_MODEL),
    r"layers\.[02]\.feedforward\.experts\.down": SCALE / math.sqrt(6 * EXPERT_DIM),
    r"layers\.1\.feedforward\.up\.weight": SCALE / math.sqrt(D_MODEL),
    r"layers\.1\.feedforward\.down\.weight": SCALE / math.sqrt(HIDDEN),
}
CONSTANTS = {r"(.*_norm)\.weight": 1.0, r"(.*_norm|output|.*\.feedforward\.(up|down))\.bias": 0.0}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    model = Transformer(model_config(**MODEL), vocab_size=VOCABULARY * 20, backend="reference")
    materialize(model, seed=11)
    return {parameter.name: parameter.tensor.detach().double() for parameter in logical_parameters(model)}


def test_every_parameter_is_covered_by_one_line_of_the_tables(weights):
    for name in weights:
        assert sum(re.fullmatch(pattern, name) is not None for pattern in {**STDS, **CONSTANTS}) == 1, name


@pytest.mark.parametrize("pattern", STDS)
def test_weights_have_mean_zero_and_the_specified_standard_deviation(weights, pattern: str):
    matching = {name: weight for name, weight in weights.items() if re.fullmatch(pattern, name)}
    assert matching
    for name, weight in matching.items():
        sigma = STDS[pattern]
        assert abs(weight.mean()) < 5 * sigma / weight.numel() ** 0.5, name
        assert weight.std().item() == pytest.approx(sigma, rel=5 / (2 * weight.numel()) ** 0.5), name


@pytest.mark.parametrize("pattern", CONSTANTS)
def test_gains_are_one_and_biases_zero(weights, pattern: str):
    matching = {name: weight for name, weight in weights.items() if re.fullmatch(pattern, name)}
    assert matching
    assert all((weight == CONSTANTS[pattern]).all() for weight in matching.values())


def test_normal_weights_have_the_tails_of_a_normal_and_dense_ones_are_cut(weights):
    def kurtosis(weight: torch.Tensor) -> float:
        return float(((weight - weight.mean()) ** 4).mean() / weight.var() ** 2)

    for name in ("layers.0.mixer.query.weight", "layers.0.feedforward.experts.up", "embedding.weight"):
        spread = math.sqrt(24 / weights[name].numel())
        assert kurtosis(weights[name]) == pytest.approx(3.0, abs=5 * spread), name
    for name in ("layers.1.mixer.query.weight", "layers.1.feedforward.up.weight"):
        assert kurtosis(weights[name]) == pytest.approx(2.37, abs=0.15), name  # a normal cut at two sigma


def test_sigma_moe_routers_have_rows_of_equal_norm_and_switchhead_routers_have_not(weights):
    equal = weights["layers.0.feedforward.router.weight"].norm(dim=1)
    torch.testing.assert_close(equal, equal[:1].expand_as(equal), rtol=1e-6, atol=0)
    for name in ("layers.0.mixer.value_router.weight", "layers.0.mixer.output_router.weight"):
        norms = weights[name].norm(dim=1)
        assert norms.std() / norms.mean() > 0.3 / math.sqrt(2 * D_MODEL), name
