"""Router reports of several ranks: the loads that metrics show are those of all rows."""

import torch

from model.router import RouterReport
from tests.parallel.two_steps import open_world
from train.step import total_reports

COUNTS = {"mlp": ([3.0, 0.0, 1.0], [0.0, 5.0, 1.0]), "value": ([2.0, 2.0], [4.0, 0.0])}  # of rank 0 and of rank 1


def totals() -> dict[str, list[list[float]]]:
    with open_world(1) as mesh:
        reports = {
            name: RouterReport(
                torch.tensor(counts[mesh.rank]), torch.tensor(counts[mesh.rank]) / 8, torch.tensor(float(mesh.rank + 1))
            )
            for name, counts in COUNTS.items()
        }
        return {name: [part.tolist() for part in report] for name, report in total_reports(reports, mesh).items()}


def test_every_rank_has_the_sum_over_ranks_of_each_report(pool):
    expected = {
        "mlp": [[3.0, 5.0, 2.0], [0.375, 0.625, 0.25], 3.0],
        "value": [[6.0, 2.0], [0.75, 0.25], 3.0],
    }
    assert pool(2).run(totals) == [expected, expected]
