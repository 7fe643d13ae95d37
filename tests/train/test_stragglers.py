"""Who is slow: figures against numpy and plain medians over made-up windows; when it is said; what two processes tell each other."""

import socket
import statistics

import numpy as np
import pytest
import torch

from tests.parallel.two_steps import open_world
from train.engine import LocalMesh
from train.stragglers import LEAST_SPREAD, WINDOWS, Spent, Stragglers, compare


@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_z_is_the_distance_from_the_median_of_the_others_in_the_spread_of_all(ranks: int):
    times = np.random.default_rng(ranks).lognormal(0.0, 0.1, (WINDOWS, ranks))
    times[:, 1] *= 3.0
    times[-1, 1] = 9.0
    found = compare(torch.from_numpy(times))

    def others(window: np.ndarray, rank: int) -> float:
        return statistics.median_low(np.delete(window, rank).tolist())

    excess = np.array([[window[rank] / others(window, rank) - 1.0 for rank in range(ranks)] for window in times])
    level = np.median(excess, axis=0)
    in_time = np.median(np.abs(excess - level))
    among = statistics.median_low(np.abs(level - statistics.median_low(level.tolist())).tolist())
    spread = max(1.4826 * max(in_time, among), LEAST_SPREAD)
    np.testing.assert_allclose(found.z_R, level / spread)
    np.testing.assert_allclose(found.newest_R, excess[-1] / spread)
    assert found.seconds_R[1] == pytest.approx(np.median(times[:, 1]))
    assert found.others_R[1] == pytest.approx(np.median([others(window, 1) for window in times]))
    assert int(found.z_R.argmax()) == 1


def test_equal_ranks_are_not_slow_and_the_least_spread_is_two_per_cent():
    assert compare(torch.ones(WINDOWS, 10)).z_R.tolist() == [0.0] * 10
    times = torch.ones(WINDOWS, 10, dtype=torch.float64)
    times[:, 9] = 1.5
    assert compare(times).z_R.tolist() == pytest.approx([0.0] * 9 + [0.5 / 0.02])
    times[:, 9] = 1.09
    assert lines_of(times.repeat(4, 1)) == [], "below 5 times 2 %"
    times[:, 9] = 1.11
    assert len(lines_of(times.repeat(4, 1))) == 1


class ManyRanks(LocalMesh):
    """A world of as many ranks as a window has; what each worked is given. Four ranks are a node."""

    def __init__(self, world_size: int) -> None:
        super().__init__(torch.device("cpu"))
        self.world_size, self.window = world_size, torch.zeros(world_size)
        self.told = 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return self.window

    def all_gather_object(self, value: str) -> list[str]:
        self.told += 1
        return [f"node-{rank // 4}" for rank in range(self.world_size)]


def lines_of(times_TR: torch.Tensor) -> list[tuple[int, str]]:
    """The number of the window (0 is the first) and the line, of a run with these windows."""
    world = ManyRanks(times_TR.shape[1])
    stragglers, spent, said = Stragglers(world), Spent(world), []
    spent.steps = 1
    for number, window in enumerate(times_TR):
        world.window = window
        stragglers.record(spent, say=lambda line, number=number: said.append((number, line)))
    return said


def noisy(windows: int, ranks: int, *, noise: float, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).lognormal(0.0, noise, (windows, ranks)))


@pytest.mark.parametrize("noise", [0.05, 0.1])
@pytest.mark.parametrize("ranks", [2, 4, 8, 64])
def test_equal_ranks_are_left_alone_whatever_their_noise(ranks: int, noise: float):
    for seed in range(4):
        assert lines_of(noisy(100, ranks, noise=noise, seed=seed)) == []


@pytest.mark.parametrize(("slow", "ranks"), [(1, 2), (2, 4), (2, 8), (8, 16), (8, 32), (8, 64)])
def test_a_slow_node_is_found_once_as_soon_as_there_are_enough_windows(slow: int, ranks: int):
    times = noisy(40, ranks, noise=0.03)
    times[:, :slow] *= 2.0
    said = lines_of(times)
    assert [number for number, _ in said] == [11] * max(1, slow // 4), "the fifth with 8 windows behind it"
    named = [f"node-{rank // 4}" for rank in range(0, slow, 4)]
    assert [name in line for name, (_, line) in zip(named, said, strict=True)] == [True] * len(named)
    assert "ranks 0, 1" in said[0][1] or slow == 1


def test_paused_windows_are_no_slow_rank():
    times = noisy(60, 4, noise=0.01)
    times[20, 1] *= 30.0
    times[[30, 31, 32, 33], 2] *= 3.0
    assert lines_of(times) == []


def test_a_rank_that_was_slow_is_told_of_again_only_after_it_was_quick():
    times = noisy(90, 4, noise=0.01)
    times[10:40, 1] *= 2.0
    times[60:, 1] *= 2.0
    said = [number for number, _ in lines_of(times)]
    assert len(said) == 2
    assert said[0] < 40 < 60 < said[1]


def test_windows_that_are_long_past_do_not_count():
    """A rank that was quick for 50 windows is found within the next 12."""
    times = noisy(62, 4, noise=0.01)
    times[50:, 1] *= 2.0
    assert [line.startswith("rank 1 on node-0 is slow") for _, line in lines_of(times)] == [True]


def test_each_rank_has_its_own_count():
    """Two ranks take turns at being the slowest: both are slow all the time."""
    times = noisy(30, 8, noise=0.01)
    times[:, 1] *= 2.0
    times[:, 2] *= 2.0
    times[::2, 1] *= 1.1
    times[1::2, 2] *= 1.1
    assert [line.startswith("ranks 1, 2 on node-0 are slow") for _, line in lines_of(times)] == [True]


def windows_of_a_slow_rank(slow: int) -> tuple[list[str], list[dict], float]:
    with open_world(1) as mesh:
        said: list[str] = []
        records = []
        stragglers = Stragglers(mesh)
        sent = mesh.ledger.take()
        for _ in range(14):
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
        f"rank 1 on {socket.gethostname()} is slow: rank 1 works 3.000 s for a step where the others work 1.000 s"
    )
    assert [record["straggler"]["rank"] for record in records] == [1] * 14
    assert 0 < num_bytes < 14 * 32


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
