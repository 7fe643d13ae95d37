"""BatchNorm against torch's, and what it leaves to the end of the micro-step."""

import torch
import torch.nn.functional as F

from model.batch_norm import BatchNorm
from model.parameters import add_updates, materialize
from tests.model.build import normal


def norm() -> BatchNorm:
    built = BatchNorm(4)
    materialize(built, seed=1, dtype=torch.float64)
    with torch.no_grad():
        built.weight.copy_(normal(4, seed=1))
        built.bias.copy_(normal(4, seed=2))
    return built


def test_training_normalises_by_the_rows_and_gives_torchs_gradients():
    built, x, cotangent = norm(), (3 * normal(9, 4) + 5).requires_grad_(), normal(9, 4, seed=3)
    expected = F.batch_norm(x, None, None, built.weight, built.bias, training=True, eps=1e-5)
    wanted = torch.autograd.grad((expected * cotangent).sum(), [x, built.weight, built.bias])
    found = built(x).y_TX
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    for left, right in zip(
        torch.autograd.grad((found * cotangent).sum(), [x, built.weight, built.bias]), wanted, strict=True
    ):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


def test_running_statistics_move_a_tenth_of_the_way_and_only_when_the_updates_are_added():
    built, x = norm(), 3 * normal(9, 4) + 5
    updates = built(x).updates
    assert not built.mean.any()
    assert torch.equal(built.variance, torch.ones(4, dtype=torch.float64))
    add_updates(built, updates)
    torch.testing.assert_close(built.mean, 0.1 * x.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(built.variance, 0.9 + 0.1 * x.var(0, correction=0), rtol=1e-14, atol=0)
    assert all(not update.requires_grad for update in built(x.requires_grad_()).updates.values())


def test_evaluation_uses_the_running_statistics_row_by_row_and_changes_nothing():
    built, x = norm(), normal(9, 4)
    add_updates(built, built(3 * x + 5).updates)
    built.eval()
    result = built(x)
    expected = (x - built.mean) / (built.variance + 1e-5).sqrt() * built.weight + built.bias
    torch.testing.assert_close(result.y_TX, expected, rtol=0, atol=1e-13)
    assert not result.updates
    torch.testing.assert_close(built(x[3:5]).y_TX, result.y_TX[3:5], rtol=0, atol=1e-15)


def test_no_rows_give_no_rows():
    built, x = norm(), torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    y = built(x).y_TX
    y.sum().backward()
    assert y.shape == (0, 4)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in built.parameters())
