"""The warm pools of tests/pool.py: what a job gets, what a failed, late or dead one leaves behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.pool import ROOT, Pool, RankError

GetPool = Callable[[int], Pool]


@dataclass(frozen=True)
class Report:
    """A class of a test module, as a result and as an argument."""

    rank: int
    total: float


def rank_and_pid() -> tuple[int, int]:
    return dist.get_rank(), os.getpid()


def reduced(values: list[float]) -> Report:
    total = torch.tensor(values[dist.get_rank()])
    dist.all_reduce(total)
    return Report(rank=dist.get_rank(), total=total.item())


def total_of(report: Report) -> float:
    return report.total


def doubled(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor * 2).requires_grad_()


def file_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def surroundings() -> tuple[int, list[str | None]]:
    names = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "RANK", "WORLD_SIZE", "LEAKED_BY_A_TEST")
    return torch.get_num_threads(), [os.environ.get(name) for name in names]


def flip_every_switch() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_grad_enabled(False)
    torch.rand(3)


def switches() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.is_grad_enabled(),
        torch.rand(1).item(),
    )


def import_is_kept() -> bool:
    """True when an earlier job of this worker has left its mark in this module."""
    seen = globals().get("_was_here", False)
    globals()["_was_here"] = True
    return seen


def fail_on(ranks: list[int]) -> None:
    print("about to look at the rank")
    assert dist.get_rank() not in ranks


def fail_while_others_wait() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 leaves the others waiting")
    dist.barrier()


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def exit_on(rank: int, *, code: int = 7) -> None:
    if dist.get_rank() == rank:
        os._exit(code)
    dist.barrier()


def make_a_group(fate: str) -> None:
    """kept: never destroyed. held: destroyed, but a global holds it. cycle: destroyed, only a cycle holds it."""
    group: Any = dist.new_group()
    dist.barrier(group=group)
    if fate != "kept":
        dist.destroy_process_group(group)
    if fate == "held":
        globals()["_held"] = group
    if fate == "cycle":
        cycle: list[object] = [group]
        cycle.append(cycle)


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def give_a_lambda_or_destroy_the_group() -> Callable[[], None] | None:
    if dist.get_rank() == 0:
        return lambda: None
    return dist.destroy_process_group()


def test_results_come_in_rank_order_from_one_world(pool: GetPool) -> None:
    answers = pool(2).run(rank_and_pid)
    assert [rank for rank, _ in answers] == [0, 1]
    assert [pid for _, pid in answers] == pool(2).pids
    assert pool(2).run(reduced, [1.0, 10.0]) == [Report(rank=0, total=11.0), Report(rank=1, total=11.0)]


def test_one_start_serves_different_functions_and_keeps_imports(pool: GetPool) -> None:
    pids = pool(2).run(rank_and_pid)
    pool(2).run(import_is_kept)
    assert pool(2).run(import_is_kept) == [True, True]
    assert pool(2).run(total_of, Report(rank=0, total=3.0)) == [3.0, 3.0]
    assert pool(2).run(os.getpid) == [pid for _, pid in pids]


def test_tensors_travel_by_value(pool: GetPool) -> None:
    before = pool(2).run(file_descriptors), file_descriptors()
    for result in [result for _ in range(5) for result in pool(2).run(doubled, torch.arange(3.0))]:
        torch.testing.assert_close(result.detach(), torch.tensor([0.0, 2.0, 4.0]))
        assert result.requires_grad
    assert (pool(2).run(file_descriptors), file_descriptors()) == before


def test_workers_see_one_thread_and_no_environment_of_a_test(pool: GetPool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool(1).stop()
    monkeypatch.setenv("LEAKED_BY_A_TEST", "yes")
    monkeypatch.setenv("RANK", "5")
    assert pool(1).run(surroundings) == [(1, ["1", "cpu", "0", "1", None])]


def test_switches_of_torch_are_put_back_between_jobs(pool: GetPool) -> None:
    before = pool(1).run(switches)
    pool(1).run(flip_every_switch)
    assert pool(1).run(switches) == before


def test_a_changed_file_is_loaded_again(pool: GetPool, tmp_path: Path) -> None:
    file = tmp_path / "changing.py"
    module = type(sys)("changing_module_of_the_pool_test")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module
    try:
        for number in (1, 2):
            file.write_text(f"def answer():\n    return {number}\n")
            os.utime(file, ns=(number, number))
            exec(compile(file.read_text(), file, "exec"), module.__dict__)
            assert pool(1).run(module.answer) == [number]
    finally:
        del sys.modules[module.__name__]


def test_a_failure_shows_every_failing_rank_and_the_next_job_runs(pool: GetPool) -> None:
    pids = [pid for _, pid in pool(2).run(rank_and_pid)]
    pool(2).run(print, "from an earlier job")
    with pytest.raises(RankError) as error:
        pool(2).run(fail_on, [0, 1])
    message = str(error.value)
    assert "fail_on on 2 process(es): failed on rank(s) 0, 1." in message
    assert message.index("assert 0 not in [0, 1]") < message.index("assert 1 not in [0, 1]")
    assert "test_pool.py" in message, "the traceback names the file"
    assert "about to look at the rank" in message, "what the rank printed is shown"
    assert "from an earlier job" not in message
    assert all(map(is_gone, pids))
    assert [rank for rank, _ in pool(2).run(rank_and_pid)] == [0, 1]


def test_a_failure_does_not_wait_for_ranks_in_a_collective(pool: GetPool) -> None:
    pool(2).run(rank_and_pid)
    start = time.monotonic()
    with pytest.raises(RankError, match=r"failed on rank\(s\) 1, rank\(s\) 0 still running 2 s later") as error:
        pool(2).run(fail_while_others_wait)
    assert time.monotonic() - start < 30
    assert "in barrier" in str(error.value), "the stack of the waiting rank names its collective"


def test_a_late_job_shows_the_stack_of_the_late_rank(pool: GetPool) -> None:
    pool(2).run(rank_and_pid)
    with pytest.raises(RankError, match=r"rank\(s\) 1 still running after 1\.5 s") as error:
        pool(2).run(sleep_on, 1, timeout=1.5)
    assert "in sleep_on" in str(error.value)
    assert "--- rank 0 ---" not in str(error.value)


def test_a_worker_that_exits_is_named_with_its_code(pool: GetPool) -> None:
    with pytest.raises(RankError, match=r"process\(es\): rank 1 died in this job or just before it with exit code 7, "):
        pool(2).run(exit_on, 1)


def test_a_worker_killed_between_jobs_is_named_with_its_signal(pool: GetPool) -> None:
    pool(1).run(rank_and_pid)
    os.kill(pool(1).pids[0], signal.SIGKILL)
    with pytest.raises(RankError, match=r"rank 0 died .* exit code -9 \(SIGKILL\)\."):
        pool(1).run(rank_and_pid)


def test_a_job_without_an_answer_fails_with_the_reason(pool: GetPool) -> None:
    with pytest.raises(RankError, match=r"(?s)rank\(s\) 0, 1\..*pickle.*destroyed the process group"):
        pool(2).run(give_a_lambda_or_destroy_the_group)


@pytest.mark.parametrize(
    ("fate", "why"),
    [
        ("kept", r"leaves 1 \(not destroyed: \w+\)"),
        ("held", r"leaves 1 \(destroyed, but something refers to them still\)"),
    ],
)
def test_a_job_that_leaves_a_group_alive_fails_by_its_name(pool: GetPool, fate: str, why: str) -> None:
    with pytest.raises(RankError, match=f"make_a_group must leave no process group alive, but it {why}"):
        pool(2).run(make_a_group, fate)


def test_no_thread_of_a_group_in_a_cycle_outlives_its_job(pool: GetPool) -> None:
    counts = []
    for _ in range(2):
        pool(2).run(make_a_group, "cycle")
        counts.append(pool(2).run(num_threads))
    assert counts[0] == counts[1]


def test_functions_that_workers_cannot_find_are_refused(pool: GetPool) -> None:
    with pytest.raises(ValueError, match="define it at module level"):
        pool(2).run(lambda: None)
    with pytest.raises(ValueError, match=r"the sizes are \(1, 2, 4\)"):
        pool(3)


def test_workers_die_with_a_killed_pytest_whether_busy_or_idle(tmp_path: Path) -> None:
    lines = [
        "import pathlib",
        "from tests.pool import Pool",
        "from tests.test_pool import rank_and_pid, sleep_on",
        f"pool = Pool(2, folder=pathlib.Path({str(tmp_path)!r}))",
        "print(*(pid for _, pid in pool.run(rank_and_pid)), flush=True)",
        "pool.run(sleep_on, 1)",
    ]
    process = subprocess.Popen([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    time.sleep(0.3)  # into the job
    assert len(pids) == 2
    assert not any(map(is_gone, pids))
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while not all(map(is_gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(is_gone, pids))


def is_gone(pid: int) -> bool:
    """No such process, or only its entry in the table (an init that does not reap leaves it there)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"
