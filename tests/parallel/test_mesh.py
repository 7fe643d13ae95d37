"""The mesh: groups where megatron and DeepSpeed expect them, agreement, and errors that every rank hears of."""

import os
import random
import threading
import time

import pytest
import torch
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


def different_sizes() -> str:
    with pytest.raises(ValueError, match="must be the same on all ranks") as caught:
        groups(2 if dist.get_rank() == 3 else 4)
    return str(caught.value)


def test_ranks_that_want_different_groups_say_so_and_do_not_wait_for_each_other(pool):
    """As on nodes with different numbers of processes, where each works out another ep_size."""
    for said in pool(4).run(different_sizes):
        assert said.startswith("ep_size must be the same on all ranks, but it is 2 on some and 4 on others: ")


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


def open_and_close(node_size: int) -> None:
    with open_world(2, node_size=node_size) as mesh, mesh.beside(timeout_s=60) as other:
        mesh.barrier()
        other.barrier()


def threads_and_groups(node_size: int) -> list[int]:
    """Threads of this process, gloo's too (Python does not count them), and groups that torch knows, around each of two meshes."""
    counts = []
    for _ in range(3):
        counts.append(len(os.listdir("/proc/self/task")) + len(dist.distributed_c10d._world.pg_map))
        open_and_close(node_size)
    return counts


@pytest.mark.parametrize("node_size", [2, 1])  # 1: the expert group spans two nodes
def test_a_closed_mesh_leaves_no_group_and_no_thread_behind(pool, node_size):
    for before, after_one, after_two in pool(2).run(threads_and_groups, node_size):
        assert before == after_one == after_two


def two_threads(rounds: int) -> tuple[list[float], list[object], int]:
    """The main thread sums while another gathers, each at its own pace; what both got, and the bytes that the run's ledger counted."""
    draw = random.Random(dist.get_rank())
    gathered: list[object] = []
    with open_world(1) as mesh, mesh.beside(timeout_s=60) as other:

        def gather() -> None:
            for number in range(rounds):
                time.sleep(draw.uniform(0.0, 0.004))
                gathered.append(other.all_gather_object([number, other.rank]))

        thread = threading.Thread(target=gather)
        mesh.ledger.take()
        thread.start()
        sums = []
        for number in range(rounds):
            sums.append(mesh.sum(torch.tensor([float(number + mesh.rank)])).item())
            time.sleep(draw.uniform(0.0, 0.004))
        thread.join()
        counted = sum(sent.near for sent in mesh.ledger.take().sent.values())
    return sums, gathered, counted


def test_the_collectives_of_a_thread_beside_do_not_mix_with_the_runs(pool):
    rounds = 50
    for sums, gathered, counted in pool(2).run(two_threads, rounds):
        assert sums == [2.0 * number + 1 for number in range(rounds)]
        assert gathered == [[[number, 0], [number, 1]] for number in range(rounds)]
        assert counted == rounds * 4  # an all-reduce of 4 bytes on two ranks sends 4; nothing of the thread's


def wait_in_vain() -> tuple[float, str]:
    with open_world(1) as mesh, mesh.beside(timeout_s=1) as other:
        began = time.monotonic()
        try:
            if other.rank == 0:
                other.barrier()
        except RuntimeError as error:
            return time.monotonic() - began, str(error)
        finally:
            time.sleep(0 if other.rank == 0 else 3)  # there, but not in the collective
        return 0.0, ""


def test_a_collective_beside_gives_up_after_its_own_limit(pool):
    seconds, sentence = pool(2).run(wait_in_vain)[0]
    assert 0.5 < seconds < 3
    assert sentence
