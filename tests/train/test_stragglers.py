"""Who is slow: figures against numpy over made-up windows; when it is said; what two processes tell each other."""

import random
import socket
import statistics

import numpy as np
import pytest
import torch

from tests.parallel.two_steps import open_world
from train.engine import LocalMesh
from train.stragglers import LEAST_SPREAD, WINDOWS, Slowest, Spent, Stragglers, slowest_of


@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_z_is_the_distance_from_the_others_in_their_standard_deviations(ranks: int):
    draw = random.Random(ranks)
    windows = [[draw.gauss(1.0, 0.1) for _ in range(ranks)] for _ in range(WINDOWS)]
    windows[-1][1] = 9.0
    found = slowest_of(windows, before=None)
    times = np.array(windows)
    others = np.delete(times, 1, axis=1)
    assert found.rank == 1
    assert found.z == pytest.approx((times[:, 1].mean() - others.mean()) / others.std())
    assert (found.seconds, found.others) == pytest.approx((times[:, 1].mean(), others.mean()))


def test_equal_ranks_have_no_straggler_and_one_of_ten_can_be_far_out():
    """With its own time in the spread no rank of ten could be more than 3 deviations away."""
    assert slowest_of([[1.0] * 10], before=None).z == 0.0
    found = slowest_of([[1.0] * 9 + [1.5]], before=None)
    assert found.rank == 9
    assert found.z == pytest.approx(0.5 / LEAST_SPREAD)
    assert found.z > max(abs(z) for z in [(1.5 - 1.05) / statistics.pstdev([1.0] * 9 + [1.5])])


def test_the_count_grows_only_while_the_same_rank_is_slow():
    before: Slowest | None = None
    counts = []
    for slow in (2, 2, 2, 1, 1, None, 1):
        window = [1.0 + 0.001 * rank for rank in range(4)]
        if slow is not None:
            window[slow] = 2.0
        before = slowest_of([window], before=before)
        counts.append(before.in_a_row)
    assert counts == [1, 2, 3, 1, 2, 0, 1]


def windows_of_a_slow_rank(slow: int) -> tuple[list[str], list[dict], float]:
    with open_world(1) as mesh:
        said: list[str] = []
        records = []
        stragglers = Stragglers(mesh)
        sent = mesh.ledger.take()
        for _ in range(5):
            spent = Spent(mesh)
            spent.begin(100.0)
            spent.end(103.0 if mesh.rank == slow else 101.0)
            records.append(stragglers.record(spent, say=said.append))
        sent = mesh.ledger.take()
        return said, records, sum(one.near + one.far for where, one in sent.sent.items() if where.verb == "sum")


def test_the_slow_rank_is_named_once_with_its_host_and_in_every_record(pool):
    first, second = pool(2).run(windows_of_a_slow_rank, 1)
    assert first == second
    said, records, num_bytes = first
    assert len(said) == 1
    assert said[0].startswith(
        f"rank 1 on {socket.gethostname()} is slow: it works 3.000 s for a step where the others work 1.000 s"
    )
    assert [record["straggler"]["rank"] for record in records] == [1] * 5
    assert 0 < num_bytes < 200


class WaitingWorld(LocalMesh):
    waits = 0.0

    def waited(self) -> float:
        return self.waits


def test_what_a_rank_waits_for_others_is_not_its_work():
    world = WaitingWorld(torch.device("cpu"))
    spent = Spent(world)
    for step in range(3):
        spent.begin(10.0 * step)
        world.waits += 1.5
        spent.end(10.0 * step + 4.0)
        world.waits += 50.0  # an evaluation between the steps
    assert (spent.steps, spent.seconds, spent.worked) == (3, 12.0, 7.5)
    assert Stragglers(world).record(spent, say=print) == {}
