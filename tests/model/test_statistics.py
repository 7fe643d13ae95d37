"""The one-process statistics: reductions over the rows, whatever shape a row has."""

import torch

from model.statistics import LocalStatistics
from tests.model.build import normal


def test_sum_and_mean_reduce_the_rows_and_pass_gradients():
    rows = normal(4, 2, 3).requires_grad_()
    total, mean = LocalStatistics().sum(rows), LocalStatistics().mean(rows)
    expected = rows[0] + rows[1] + rows[2] + rows[3]
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(mean, expected / 4)
    (total.sum() + 8 * mean.sum()).backward()
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad, torch.full((4, 2, 3), 3.0, dtype=torch.float64))
