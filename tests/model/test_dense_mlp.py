"""The dense feed-forward, twin of sigma-MoE."""

from typing import Any

import pytest
import torch

from model.dense_mlp import DenseMLP
from model.feedforward_config import DenseMLPConfig
from model.parameters import materialize
from tests.model.build import context, gradients_agree, normal, place


def dense_mlp(*, d_model: int = 6, dropout: float = 0.0) -> Any:
    """With biases that are not zero."""
    layer: Any = DenseMLP(DenseMLPConfig(hidden_dim=9), place("attention", d_model=d_model, dropout=dropout))
    materialize(layer, seed=5, dtype=torch.float64)
    with torch.no_grad():
        layer.up.bias += normal(9)
        layer.down.bias += normal(d_model)
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


def test_gradients_of_input_and_weights_equal_finite_differences():
    assert gradients_agree(dense_mlp(d_model=4), normal(1, 3, 4), context(1))


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
