"""The dense feed-forward, twin of sigma-MoE: its activations, and the top-K activation."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model.dense_mlp import DenseMLP, keep_largest
from model.feedforward_config import DenseMLPConfig
from model.parameters import materialize
from tests.model.build import context, gradients_agree, normal, place


def dense_mlp(*, d_model: int = 6, dropout: float = 0.0, **settings: Any) -> Any:
    """With biases, where there are any, that are not zero."""
    config = DenseMLPConfig.model_validate({"hidden_dim": 9} | settings)
    layer: Any = DenseMLP(config, place("attention", d_model=d_model, dropout=dropout))
    materialize(layer, seed=5, dtype=torch.float64)
    with torch.no_grad():
        for number, (name, value) in enumerate(layer.named_parameters()):
            if name.endswith("bias"):
                value += normal(*value.shape, seed=number)
    return layer.eval()


def test_the_forward_is_two_affine_maps_with_a_relu_between():
    layer, x = dense_mlp(), normal(2, 3, 6)
    up, up_bias, down, down_bias = (value.detach() for value in layer.parameters())
    expected = torch.stack(
        [
            torch.stack([down @ torch.where((h := up @ token + up_bias) > 0, h, 0.0) + down_bias for token in row])
            for row in x
        ]
    )
    torch.testing.assert_close(layer(x, context(2)).y_BSD, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_other_activations_equal_their_formulas_number_by_number(activation: str, bias: bool):
    layer, x = dense_mlp(activation=activation, bias=bias), normal(2, 3, 6)
    weights = {name: value.detach() for name, value in layer.named_parameters()}
    assert sum(name.endswith("bias") for name in weights) == bias * (3 if activation == "swiglu" else 2)

    def affine(name: str, row: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ row + weights.get(f"{name}.bias", 0.0)

    for found, token in zip(layer(x, context(2)).y_BSD.flatten(0, 1), x.flatten(0, 1), strict=True):
        hidden = affine("up", token)
        if activation == "gelu":
            factors = [0.5 * (1 + math.erf(h / math.sqrt(2))) for h in hidden.tolist()]
        else:
            factors = [g / (1 + math.exp(-g)) for g in affine("gate", token).tolist()]
        hidden = hidden * torch.tensor(factors, dtype=torch.float64)
        torch.testing.assert_close(found, affine("down", hidden), rtol=0, atol=1e-13)


@pytest.mark.parametrize("settings", [{}, {"activation": "gelu"}, {"activation": "swiglu"}, {"top_k": 4}])
def test_gradients_of_input_and_weights_equal_finite_differences(settings: dict[str, Any]):
    assert gradients_agree(dense_mlp(d_model=4, **settings), normal(1, 3, 4), context(1))


def test_top_k_keeps_the_k_largest_activations_of_each_token():
    layer, x = dense_mlp(top_k=2), normal(2, 3, 6)
    up, up_bias, down, down_bias = (value.detach() for value in layer.parameters())
    for found, token in zip(layer(x, context(2)).y_BSD.flatten(0, 1), x.flatten(0, 1), strict=True):
        hidden = (up @ token + up_bias).clamp(min=0)
        largest = sorted(range(9), key=lambda i: -hidden[i].item())[:2]
        expected = down_bias + sum(hidden[i] * down[:, i] for i in largest)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_top_k_of_all_hidden_activations_is_the_dense_layer():
    x = normal(2, 3, 6)
    assert torch.equal(dense_mlp(top_k=9)(x, context(2)).y_BSD, dense_mlp()(x, context(2)).y_BSD)


def test_at_the_threshold_ties_survive_and_only_survivors_get_gradient():
    hidden = torch.tensor([[[0.5, 2.0, 1.0, 1.0, 0.25]]], requires_grad=True)
    kept = keep_largest(hidden, 2)
    assert kept.tolist() == [[[0.0, 2.0, 1.0, 1.0, 0.0]]]
    (gradient,) = torch.autograd.grad(kept.sum(), hidden)
    assert gradient.tolist() == [[[0.0, 1.0, 1.0, 1.0, 0.0]]]


def test_top_k_ranks_what_dropout_leaves():
    """With a constant hidden layer nothing but dropout tells its channels apart: what is dropped is never kept."""
    layer, x = dense_mlp(d_model=9, dropout=0.5, top_k=2), normal(2, 30, 9)
    with torch.no_grad():
        layer.up.weight.zero_()
        layer.up.bias.fill_(1.0)
        layer.down.weight.copy_(torch.eye(9))
        layer.down.bias.zero_()
    kept = (layer.train()(x, context(2)).y_BSD > 0).sum(-1)
    assert (kept >= 2).sum() > 55
    assert 3.5 < kept.double().mean() < 5.5, "ties at the threshold survive, so all that dropout leaves does"


def test_the_carry_of_another_kind_of_feed_forward_passes_through():
    carry = normal(6, 3)
    assert dense_mlp()(normal(2, 3, 6), context(2), carry).carry_TX is carry


def test_dropout_acts_on_the_hidden_layer_in_training_only():
    """With the hidden layer a constant 1, what is left of it is read off the output: all of 1 / (1 - p) or 0."""
    layer, x = dense_mlp(d_model=9, dropout=0.25), normal(2, 3, 9)
    with torch.no_grad():
        layer.up.weight.zero_()
        layer.up.bias.fill_(1.0)
        layer.down.weight.copy_(torch.eye(9))
        layer.down.bias.zero_()
    assert torch.equal(layer(x, context(2)).y_BSD, torch.ones_like(x))
    values = layer.train()(x, context(2)).y_BSD.unique()
    torch.testing.assert_close(values, torch.tensor([0, 1 / 0.75], dtype=torch.float64))


@pytest.mark.parametrize("change", [{"step": 1}, {"seed": 9}])
def test_hidden_masks_change_with_step_and_seed(change):
    layer, x = dense_mlp(dropout=0.5).train(), normal(1, 3, 6)
    assert not torch.equal(layer(x, context(1)).y_BSD, layer(x, context(1, **change)).y_BSD)
