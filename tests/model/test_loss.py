"""The summed cross-entropy against a loop."""

import math

import pytest
import torch

from model.loss import IGNORED, cross_entropy_sum
from tests.model.build import normal


def test_the_sum_equals_a_loop_over_the_targets_that_count():
    logits, targets = 3 * normal(2, 5, 7), torch.tensor([[0, IGNORED, 6, 3, 3], [IGNORED, IGNORED, 1, 2, 0]])
    expected = 0.0
    for row, row_targets in zip(logits.tolist(), targets.tolist(), strict=True):
        for scores, target in zip(row, row_targets, strict=True):
            if target != IGNORED:
                expected += math.log(sum(math.exp(score) for score in scores)) - scores[target]
    assert cross_entropy_sum(logits, targets).item() == pytest.approx(expected, rel=1e-13)


def test_ignored_targets_send_no_gradient_and_the_others_do():
    logits, targets = normal(1, 3, 7).requires_grad_(), torch.tensor([[4, IGNORED, 0]])
    cross_entropy_sum(logits, targets).backward()
    assert logits.grad is not None
    expected = logits.detach().softmax(-1)
    expected[0, 0, 4] -= 1
    expected[0, 2, 0] -= 1
    expected[0, 1] = 0
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_targets_the_loss_and_its_gradient_are_exactly_zero(dtype: torch.dtype):
    logits = normal(2, 3, 7, dtype=dtype).requires_grad_()
    loss = cross_entropy_sum(logits, torch.full((2, 3), IGNORED))
    assert loss.item() == 0.0
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_bfloat16_logits_are_summed_in_float32():
    logits, targets = normal(8, 100, 7, dtype=torch.float32).bfloat16(), torch.arange(800).view(8, 100) % 7
    loss = cross_entropy_sum(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(cross_entropy_sum(logits.double(), targets).item(), rel=1e-5)
