"""Experts left out of the ranking in training, alike in sigma-MoE and SwitchHead; their own claims are in the tests of the layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.model.build import context, losses_of, normal, sigma_moe, switchhead

each_layer = pytest.mark.parametrize("build", [sigma_moe, switchhead])
Build = Callable[..., Any]


@each_layer
def test_evaluation_is_deterministic_and_free_of_expert_dropout(build: Build):
    plain, dropping, x = build(), build(expert_dropout=0.9), normal(2, 6, 6)
    y = dropping(x, context(2)).y_BSD
    assert torch.equal(y, dropping(x, context(2, step=1)).y_BSD)
    assert torch.equal(y, plain(x, context(2)).y_BSD)


@each_layer
def test_with_fewer_survivors_than_k_everything_stays_finite(build: Build):
    layer, x = build(expert_dropout=0.9).train(), normal(2, 6, 6)
    result = layer(x, context(2))
    (result.y_BSD.sum() + sum(losses_of(result))).backward()
    assert result.y_BSD.isfinite().all()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in layer.parameters())


@each_layer
def test_masks_do_not_depend_on_the_batch_and_do_on_step_and_depth(build: Build):
    layer, x, positions = build(expert_dropout=0.5).train(), normal(4, 5, 6), [9, 2**35, 1, 4]
    together = layer(x, context(positions)).y_BSD
    order = [2, 0, 3, 1]
    shuffled = layer(x[order], context([positions[i] for i in order])).y_BSD
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-13)
    alone = [layer(x[i : i + 1], context(positions[i : i + 1])).y_BSD[0] for i in range(4)]
    torch.testing.assert_close(torch.stack(alone), together, rtol=0, atol=1e-13)
    for other in (layer(x, context(positions, step=1)), layer(x, context(positions, depth=1))):
        assert not torch.allclose(other.y_BSD, together)
