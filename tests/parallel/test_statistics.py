"""AllRankStatistics: values and gradients of the whole micro-step, wherever the result is used."""

import numpy as np
import torch

from parallel.statistics import AllRankStatistics

ROWS = [3, 0, 5, 1]


def rows_of(rank: int) -> torch.Tensor:
    return torch.randn(ROWS[rank], 4, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def standardise() -> tuple[np.ndarray, np.ndarray]:
    """Each rank uses the shared mean and sum on rows of its own, as batch-normed queries will: the uses differ between ranks."""
    statistics = AllRankStatistics(torch.distributed.distributed_c10d._get_default_group())
    rank = torch.distributed.get_rank()
    rows = rows_of(rank).requires_grad_()
    mean, total = statistics.mean(rows), statistics.sum(rows.square())
    result = ((rows - mean) / total.sqrt() * (rank + 1)).square().sum() + mean.sum()
    (gradient,) = torch.autograd.grad(result, rows)
    return result.detach().numpy(), gradient.numpy()


def test_values_and_gradients_equal_those_of_all_rows_in_one_process(pool):
    found = pool(4).run(standardise)

    rows = [rows_of(rank).requires_grad_() for rank in range(4)]
    together = torch.cat(rows)
    mean, total = together.mean(0), together.square().sum(0)
    results = [((own - mean) / total.sqrt() * (rank + 1)).square().sum() + mean.sum() for rank, own in enumerate(rows)]
    gradients = torch.autograd.grad(torch.stack(results).sum(), rows)
    for rank, (value, gradient) in enumerate(found):
        np.testing.assert_allclose(value, results[rank].detach().numpy(), rtol=1e-12)
        np.testing.assert_allclose(gradient, gradients[rank].numpy(), rtol=1e-12, atol=1e-14)
