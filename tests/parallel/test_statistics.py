"""AllRankStatistics: values and gradients of the whole micro-step, wherever the result is used."""

import numpy as np
import torch

from parallel.ledger import Ledger, Sent
from parallel.peers import peers_of
from parallel.statistics import AllRankStatistics

ROWS = [3, 0, 5, 1]


def rows_of(rank: int) -> torch.Tensor:
    return torch.randn(ROWS[rank], 4, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def standardise() -> tuple[np.ndarray, np.ndarray, dict[tuple[str, bool], Sent]]:
    """Each rank uses the shared mean and sum on rows of its own, as batch-normed queries will: the uses differ between ranks."""
    world, ledger = torch.distributed.distributed_c10d._get_default_group(), Ledger()
    statistics = AllRankStatistics(peers_of(world, node_size=2, ledger=ledger), layer="layers.1.mixer")
    rank = torch.distributed.get_rank()
    rows = rows_of(rank).requires_grad_()
    mean, total = statistics.mean(rows), statistics.sum(rows.square())
    result = ((rows - mean) / total.sqrt() * (rank + 1)).square().sum() + mean.sum()
    (gradient,) = torch.autograd.grad(result, rows)
    sent = {(where.verb, where.backward): sent for where, sent in ledger.take().sent.items()}
    return result.detach().numpy(), gradient.numpy(), sent


def test_values_and_gradients_equal_those_of_all_rows_in_one_process(pool):
    found = pool(4).run(standardise)

    rows = [rows_of(rank).requires_grad_() for rank in range(4)]
    together = torch.cat(rows)
    mean, total = together.mean(0), together.square().sum(0)
    results = [((own - mean) / total.sqrt() * (rank + 1)).square().sum() + mean.sum() for rank, own in enumerate(rows)]
    gradients = torch.autograd.grad(torch.stack(results).sum(), rows)
    for rank, (value, gradient, sent) in enumerate(found):
        np.testing.assert_allclose(value, results[rank].detach().numpy(), rtol=1e-12)
        np.testing.assert_allclose(gradient, gradients[rank].numpy(), rtol=1e-12, atol=1e-14)
        # 4 + 1 and 4 float64 around a ring of 4 ranks, of which 1 and 3 have the next one on the other node
        once = Sent(near=108) if rank in (0, 2) else Sent(far=108)
        assert sent == {("statistics", False): once, ("statistics", True): once}
