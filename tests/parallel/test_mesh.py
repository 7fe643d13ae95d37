"""The mesh: groups where megatron and DeepSpeed expect them, agreement, and errors that every rank hears of."""

import threading

import pytest
import torch.distributed as dist

from tests.parallel.two_steps import open_world


def groups(ep_size: int) -> list[list[int]]:
    with open_world(ep_size) as mesh:
        return [dist.get_process_group_ranks(g) for g in (mesh.world_group, mesh.expert_group, mesh.expert_data_group)]


@pytest.mark.parametrize(
    ("ep_size", "expert", "expert_data"),
    [
        (1, [[0], [1], [2], [3]], [[0, 1, 2, 3]] * 4),
        (2, [[0, 1], [0, 1], [2, 3], [2, 3]], [[0, 2], [1, 3], [0, 2], [1, 3]]),
        (4, [[0, 1, 2, 3]] * 4, [[0], [1], [2], [3]]),
    ],
)
def test_expert_groups_are_consecutive_and_expert_data_groups_strided(pool, ep_size, expert, expert_data):
    found = pool(4).run(groups, ep_size)
    assert found == [[[0, 1, 2, 3], expert[rank], expert_data[rank]] for rank in range(4)]


def exchanges() -> tuple[list[object], bool, bool, str | None]:
    with open_world(1) as mesh:
        gathered = mesh.all_gather_object({"rank": mesh.rank, "text": "é" * mesh.rank})
        one, none = mesh.agree(mesh.rank == 2), mesh.agree(False)
        try:
            mesh.raise_together(OSError("no space left") if mesh.rank in (1, 3) else None)
        except RuntimeError as error:
            return gathered, one, none, str(error)
        return gathered, one, none, None


def test_values_of_every_rank_arrive_on_every_rank_and_an_error_of_one_is_raised_on_all(pool):
    values = [{"rank": rank, "text": "é" * rank} for rank in range(4)]
    for gathered, one, none, message in pool(4).run(exchanges):
        assert gathered == values
        assert one
        assert not none
        assert message == "no space left (rank 1 of 4)"


def two_failures(first: str, second: str) -> tuple[str, str, bool]:
    """Ranks 1 and 3 fail, each with the error of the given class name."""
    own = {1: first, 3: second}
    with open_world(1) as mesh:
        name = own.get(mesh.rank)
        error = (
            None
            if name is None
            else {"ValueError": ValueError, "OSError": OSError}[name](f"rank {mesh.rank} says {name}")
        )
        try:
            mesh.raise_together(error)
        except (RuntimeError, ValueError) as raised:
            return type(raised).__name__, str(raised), raised.__cause__ is error
        return "nothing", "", False


@pytest.mark.parametrize(("first", "raised"), [("ValueError", "ValueError"), ("OSError", "RuntimeError")])
def test_the_first_failing_rank_decides_whether_the_user_must_change_something(pool, first, raised):
    second = "OSError" if first == "ValueError" else "ValueError"
    assert pool(4).run(two_failures, first, second) == [(raised, f"rank 1 says {first} (rank 1 of 4)", True)] * 4


def fail_alone() -> str:
    with open_world(1) as mesh:
        try:
            mesh.raise_together(ValueError("streams must be even"))
        except ValueError as error:
            return str(error)
        return ""


def test_one_process_names_no_rank(pool):
    assert pool(1).run(fail_alone) == ["streams must be even"]


def open_often(node_size: int) -> tuple[int, int]:
    counts = []
    for _ in range(3):
        with open_world(2, node_size=node_size) as mesh:
            mesh.barrier()
        counts.append(threading.active_count() + len(dist.distributed_c10d._world.pg_map))
    return counts[0], counts[-1]


@pytest.mark.parametrize("node_size", [2, 1])  # 1: the expert group spans two nodes
def test_a_closed_mesh_leaves_no_group_behind(pool, node_size):
    for first, last in pool(2).run(open_often, node_size):
        assert first == last
