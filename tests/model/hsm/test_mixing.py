"""The mixing functions: equal to their equations, to each other where one contains another, counted and drawn as specified."""

import math
from typing import Any

import pytest
import torch

from model.hsm.config import HSMConfig
from model.hsm.mixing import mixing
from model.parameters import count_parameters, materialize
from tests.model.build import normal
from tests.model.hsm import by_hand
from tests.model.hsm.build import VARIANTS, WIDTH, hsm, stirred
from train.optimizer import parameter_groups

D, H, F = 12, 3, 7  # all different, so that a mistaken size shows


def built(settings: dict[str, Any], *, d_model: int = WIDTH) -> Any:
    """A mixing function in float64, as it starts."""
    module = mixing(HSMConfig.model_validate(settings), d_model=d_model, num_layers=4)
    materialize(module, seed=5, dtype=torch.float64)
    return module


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_mixing_function_equals_its_equation_channel_by_channel(variant: str, bias: bool):
    has_bias = variant not in ("constant", "vector", "multihead")
    module = stirred(built(VARIANTS[variant] | ({"bias": bias} if has_bias else {})))
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    assert any(name.endswith("bias") for name in weights) == (has_bias and bias)
    u, v = normal(2, 3, WIDTH, seed=1), normal(2, 3, WIDTH, seed=2)
    m = module(u, v)
    for row in range(2):
        for t in range(3):
            expected = by_hand.mix(variant, u[row, t].tolist(), v[row, t].tolist(), weights)
            torch.testing.assert_close(m[row, t], m.new_tensor(expected), rtol=0, atol=1e-13)


def test_fusion_may_have_a_relu():
    module = stirred(built(VARIANTS["fusion"] | {"activation": "relu"}))
    u, v = normal(1, 1, WIDTH, seed=1), normal(1, 1, WIDTH, seed=2)
    hidden = torch.cat([u, v], dim=-1)[0, 0] @ module.up.weight.T + module.up.bias
    expected = torch.where(hidden > 0, hidden, 0) @ module.down.weight.T + module.down.bias
    assert 0 < (hidden > 0).sum() < len(hidden)
    torch.testing.assert_close(module(u, v)[0, 0], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("settings", "weights", "biases"),
    [
        ({"variant": "constant"}, 2, 0),
        ({"variant": "vector"}, 2 * D, 0),
        ({"variant": "multihead", "num_heads": H}, 2 * H, 0),
        ({"variant": "matrix_scalar"}, D**2 + 1, D),
        ({"variant": "matrix"}, 2 * D**2, D),
        ({"variant": "multihead_matrix", "num_heads": H}, 2 * D**2 // H, D),
        ({"variant": "single_gate"}, 2 * D**2, D),
        ({"variant": "double_gate"}, 4 * D**2, 2 * D),
        ({"variant": "fusion", "hidden_dim": F}, 3 * D * F, F + D),
        ({"variant": "fusion", "hidden_dim": D}, 3 * D**2, 2 * D),
        ({"variant": "fusion", "hidden_dim": 2 * D}, 6 * D**2, 3 * D),
    ],
    ids=lambda value: "_".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_the_parameter_counts_are_those_of_the_table(settings: dict[str, Any], weights: int, biases: int):
    assert count_parameters(hsm(settings, d_model=D)) == weights + biases
    if biases:
        assert count_parameters(hsm(settings | {"bias": False}, d_model=D)) == weights


def test_constant_equals_vector_equals_equal_heads_equals_matrices():
    a, b = -1.25, 0.75
    u, v = normal(2, 5, WIDTH, seed=1), normal(2, 5, WIDTH, seed=2)
    eye, small = torch.eye(WIDTH), torch.eye(2).expand(3, 2, 2)
    for variant in ("constant", "vector", "multihead"):
        module = built(VARIANTS[variant] | {"initial_a": a, "initial_b": b})
        assert torch.equal(module(u, v), a * u + b * v), variant
    for variant, of_token, of_shifted in (
        ("matrix_scalar", eye, torch.ones(1)),
        ("matrix", eye, eye),
        ("multihead_matrix", small, small),
    ):
        module = built(VARIANTS[variant])
        with torch.no_grad():
            module.of_token.weight.copy_(a * of_token)
            module.of_shifted.weight.copy_(b * of_shifted)
        assert torch.equal(module(u, v), a * u + b * v), variant


@pytest.mark.parametrize("variant", ["single_gate", "double_gate"])
def test_a_gate_of_zeros_equals_one_half_of_each(variant: str):
    module, half = built(VARIANTS[variant]), built({"variant": "constant", "initial_a": 0.5, "initial_b": 0.5})
    with torch.no_grad():
        module.gate.weight.zero_()
    u, v = normal(2, 5, WIDTH, seed=1), normal(2, 5, WIDTH, seed=2)
    assert torch.equal(module(u, v), half(u, v))


def test_factors_start_at_one_half_or_where_the_config_says():
    assert {name: p.tolist() for name, p in built(VARIANTS["multihead"]).named_parameters()} == {
        "of_token.weight": [0.5] * 3,
        "of_shifted.weight": [0.5] * 3,
    }
    previous = built({"variant": "constant", "initial_a": 0.0, "initial_b": 1.0})
    assert [p.item() for p in previous.parameters()] == [0.0, 1.0]
    assert built(VARIANTS["matrix_scalar"]).of_shifted.weight.tolist() == [0.5]


@pytest.mark.parametrize(
    ("variant", "scaled", "plain"),
    [
        ("matrix_scalar", ["of_token"], []),
        ("matrix", ["of_token", "of_shifted"], []),
        ("multihead_matrix", ["of_token", "of_shifted"], []),
        ("single_gate", [], ["gate"]),
        ("double_gate", [], ["gate"]),
        ("fusion", ["down"], ["up"]),
    ],
)
def test_matrices_start_at_one_fiftieth_and_those_into_the_residual_at_that_over_the_root_of_twice_the_depth(
    variant: str, scaled: list[str], plain: list[str]
):
    settings = VARIANTS[variant] | ({"hidden_dim": 90} if variant == "fusion" else {})
    module = built(settings, d_model=90)
    for names, std in ((scaled, 0.02 / math.sqrt(2 * 4)), (plain, 0.02)):
        for name in names:
            weight = module.get_submodule(name).weight
            assert weight.std().item() == pytest.approx(std, rel=0.05)
            assert abs(weight.mean().item()) < 0.05 * std
    biases = [p for name, p in module.named_parameters() if name.endswith("bias")]
    assert biases
    assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize(
    ("variant", "decaying"),
    [
        ("constant", set()),
        ("vector", set()),
        ("multihead", set()),
        ("matrix_scalar", {"of_token.weight"}),
        ("matrix", {"of_token.weight", "of_shifted.weight"}),
        ("multihead_matrix", {"of_token.weight", "of_shifted.weight"}),
        ("single_gate", {"gate.weight"}),
        ("double_gate", {"gate.weight"}),
        ("fusion", {"up.weight", "down.weight"}),
    ],
)
def test_factors_and_biases_never_decay_and_matrices_do(variant: str, decaying: set[str]):
    module = built(VARIANTS[variant])
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = parameter_groups(module, weight_decay=0.1)
    found = {group["name"]: {names[parameter] for parameter in group["params"]} for group in groups}
    assert found.get("decay", set()) == decaying
    assert found.get("no_decay", set()) == set(names.values()) - decaying
