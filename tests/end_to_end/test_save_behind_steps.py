"""Saves behind the steps (and one that a step waits for) on two real ranks: a death, a disk that hangs or is full in the middle of a write.
Kills: test_kills.py."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ConfigFile, records
from tests.end_to_end.warm import Job
from train.manifest import read_manifest
from train.storage import check_files

SLOW_DISK = Path(__file__).with_name("slow_disk_main.py")
Ranks = Callable[..., Job]


def start(ranks: Ranks, arguments: list[str], fault: str, *, step: int, rank: int = 1) -> Job:
    """Two ranks; the fault strikes when `rank` writes the checkpoint of `step`."""
    return ranks(2, [fault, str(step), str(rank), *arguments], script=SLOW_DISK)


def checkpoints(config: ConfigFile) -> list[str]:
    """All names but that of the lock, which a killed process leaves behind."""
    return sorted(path.name for path in (config.folder / "checkpoints").iterdir() if path.name != "lock")


def test_a_disk_that_is_full_on_one_rank_is_told_with_the_rank_and_the_run_goes_on(config: ConfigFile, ranks: Ranks):
    job = start(ranks, config.arguments("checkpoint.every_steps=3"), "full", step=6)
    job.finish()
    said = " ".join(job.ranks[0].said().split())
    assert "the checkpoint of step 6 was not written:" in said
    assert "No space left on device" in said
    assert "(rank 1 of 2); failure 1 in a row" in said
    assert "was not written" not in job.ranks[1].said()
    failed = [step for step, record in records(config.folder).items() if "failure" in record.get("checkpoint", {})]
    assert len(failed) == 1
    assert 7 <= failed[0] <= 10
    assert checkpoints(config) == ["latest", "step_000009", "step_000012"]


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_disk_that_hangs_ends_the_run_in_limited_time_with_a_sentence(
    config: ConfigFile, ranks: Ranks, asynchronous: str
):
    settings = config.arguments("checkpoint.timeout_s=4", f"checkpoint.asynchronous={asynchronous}")
    job = start(ranks, settings, "hang", step=8)
    assert job.wait(60) == [1, 1]
    for rank in job.ranks:
        said = rank.said()
        assert "the checkpoint of step 8 must be written in 4 s, but on rank" in said, said
    assert [name for name in checkpoints(config) if ".partial" not in name] == ["latest", "step_000004"]


def test_ctrl_c_during_a_save_that_the_steps_wait_for_ends_the_run_at_once_and_harms_no_checkpoint(
    config: ConfigFile, ranks: Ranks
):
    job = start(ranks, config.arguments("checkpoint.asynchronous=false"), "hang", step=8)
    deadline = time.monotonic() + 60
    while not (config.folder / "checkpoints" / "step_000008.partial").exists():
        assert time.monotonic() < deadline, job.ranks[0].said()
        time.sleep(0.05)
    time.sleep(0.5)  # rank 1 hangs, and both wait
    for rank in job.ranks:
        rank.signal(signal.SIGINT)
    assert job.wait(15) == [-signal.SIGINT] * 2
    for rank, said in zip(
        job.ranks, ("error: interrupted: the same", "error (rank 1): interrupted: the same"), strict=True
    ):
        assert rank.said().splitlines()[-1] == f"{said} command goes on from the last whole checkpoint"
    folder = config.folder / "checkpoints"
    assert (folder / "latest").read_text().split()[-1].startswith("step_000004")
    check_files(folder / "step_000004", read_manifest(folder / "step_000004").files, share=0, shares=1)


def test_a_rank_that_dies_during_a_write_does_not_hang_the_other(config: ConfigFile, ranks: Ranks):
    job = start(ranks, config.arguments(), "die", step=8)
    assert job.wait(60) == [1, 9]
    assert "rank 1" in job.ranks[0].said()
    assert not (config.folder / "checkpoints" / "step_000008").exists()
