"""A full disk, a read-only one, a wall clock that jumps, two runs on one folder: nothing is lost, and the user is told."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.disks import Disk, may_mount, open_disk
from tests.end_to_end.drilled_run import (
    SAVE_EVERY,
    Place,
    Run,
    assert_same_curve,
    files_of,
    resumed_step,
    wait_until,
)
from tests.end_to_end.one_token_each import STEPS_PER_EPOCH, assert_nothing_twice_or_left_out
from tests.end_to_end.warm import Job

ALONE, EXPERTS = Place(1, 1, 0), Place(2, 2, 1)
STEPS = 2 * STEPS_PER_EPOCH
CHECKPOINT_BYTES = 400_000


pytestmark = pytest.mark.timeout(400)


@pytest.fixture(params=["a disk of its own", "limits of the process"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """Where namespaces are forbidden, the limits stand in for both."""
    mounted = request.param == "a disk of its own" and may_mount()
    print(f"{request.param}: {'a tmpfs in a mount namespace' if mounted else 'limits of the process'}")
    with open_disk(tmp_path / "disk", mounted=mounted) as opened:
        yield opened


def begin(run: Run) -> None:
    """Takes the first 7 steps and is killed: the checkpoint of step 6 is there."""
    job = run.start()
    wait_until(lambda: run.told() >= 7 and run.latest_step() == 6, job)
    job.kill()


def test_a_full_disk_costs_no_checkpoint_and_with_space_the_run_goes_on(
    disk: Disk, drilled: Callable[..., Run], untouched, token_shards
):
    run: Run = drilled(ALONE, STEPS, run_dir=disk.folder / "run")
    begin(run)
    saved = run.latest_step()
    checkpoint = files_of(run.checkpoints / f"step_{saved:06d}")
    assert sum(map(len, checkpoint.values())) > CHECKPOINT_BYTES

    for but_bytes in (0, CHECKPOINT_BYTES // 2):  # not a byte, then room for everything but a checkpoint
        with disk.full(but_bytes=but_bytes) as options:
            job = run.start(**options)
            assert job.wait(120) == [1], job.ranks[0].said()
            said = " ".join(job.ranks[0].said().split())
            assert "(No space left on device)" in said or "(File too large)" in said, said
            assert resumed_step(job) == saved
            assert run.latest_step() == saved
            assert files_of(run.checkpoints / f"step_{saved:06d}") == checkpoint
    failures = f"the checkpoint of step {saved + 3 * SAVE_EVERY} was not written"
    assert failures in said, said
    assert "it is failure 3 in a row, after which a run stops" in said

    run.start().finish()
    assert_same_curve(run, untouched(ALONE, STEPS))
    assert_nothing_twice_or_left_out(run.folder / "journal", token_shards, steps=STEPS)


def test_a_read_only_folder_is_refused_and_left_as_it_is(disk: Disk, drilled: Callable[..., Run], untouched):
    run: Run = drilled(ALONE, STEPS, run_dir=disk.folder / "run")
    begin(run)
    before = files_of(run.run)
    with disk.read_only() as options:
        job = run.start(**options)
        assert job.wait(120) == [1], job.ranks[0].said()
        (line,) = [line for line in job.ranks[0].said().splitlines() if line.startswith("error: ")]
        assert "cannot be written (Read-only file system)" in line or "cannot be written (Permission denied)" in line
        assert "choose another run.dir" in line
        assert files_of(run.run) == before
    run.start().finish()
    assert_same_curve(run, untouched(ALONE, STEPS))


def test_a_wall_clock_that_jumps_by_decades_changes_nothing(drilled: Callable[..., Run], untouched, draw, token_shards):
    run: Run = drilled(EXPERTS, STEPS)
    clocks = {rank: {"clock": draw.random()} for rank in range(2)}

    def start_and_wait(point: str, *, folder: Path, told: int, seconds: float) -> Job:
        """Rank 1 waits at the point for so many seconds after that step is told."""
        folder.mkdir()
        waits = {"point": point, "time": 1, "folder": str(folder)}
        job = run.start(faults=clocks | {1: clocks[1] | waits})
        wait_until(lambda: (folder / "reached").exists() and run.told() >= told, job)
        time.sleep(seconds)
        (folder / "go").touch()
        return job

    # a save waits for the save before it
    job = start_and_wait(
        "between a rank's file and its fsync", folder=run.folder / "save", told=2 * SAVE_EVERY, seconds=1.0
    )
    wait_until(lambda: run.told() >= 10, job)
    job.kill()
    saved = run.latest_step()
    # a rank waits for another for longer than the 5 s that the watchdog needs to call it a hang
    job = start_and_wait("while a checkpoint is read", folder=run.folder / "resume", told=0, seconds=6.0)
    job.finish()
    assert resumed_step(job) == saved
    assert run.latest_step() == STEPS
    assert_same_curve(run, untouched(EXPERTS, STEPS))
    assert all(0 < record["tokens_per_second"] < 1e6 for record in run.records().values())
    assert not (run.run / "hang").exists()


def test_a_second_run_on_a_folder_is_refused_and_the_first_goes_on(drilled: Callable[..., Run], untouched):
    run: Run = drilled(EXPERTS, STEPS)
    waits = {"point": "between a rank's file and its fsync", "time": 2, "folder": str(run.folder)}
    first = run.start(faults={1: waits})
    wait_until((run.folder / "reached").exists, first)  # in the middle of a save
    second = run.start()
    assert second.wait(120) == [1, 1]
    for rank in second.ranks:
        said = " ".join(rank.said().split())
        assert f"must be used by one process at a time, but process {first.ranks[0].pid} on" in said, said
    (run.folder / "go").touch()
    first.finish()
    assert_same_curve(run, untouched(EXPERTS, STEPS))
