"""Saves behind the steps (and one that a step waits for) on two real ranks: a death, a disk that hangs or is full in the middle of a write.
Kills: test_kills.py."""

import signal
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ConfigFile, Processes, free_port, records
from train.manifest import read_manifest
from train.storage import check_files

SLOW_DISK = Path(__file__).with_name("slow_disk_main.py")


def start(processes: Processes, arguments: list[str], fault: str, *, step: int, rank: int = 1) -> None:
    """Two ranks; the fault strikes when `rank` writes the checkpoint of `step`."""
    port = free_port()
    for number in range(2):
        processes.start(
            [sys.executable, str(SLOW_DISK), fault, str(step), str(rank), *arguments],
            RANK=str(number),
            LOCAL_RANK=str(number),
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )


def checkpoints(config: ConfigFile) -> list[str]:
    """All names but that of the lock, which a killed process leaves behind."""
    return sorted(path.name for path in (config.folder / "checkpoints").iterdir() if path.name != "lock")


def test_a_disk_that_is_full_on_one_rank_is_told_with_the_rank_and_the_run_goes_on(
    config: ConfigFile, processes: Processes
):
    start(processes, config.arguments("checkpoint.every_steps=3"), "full", step=6)
    processes.wait()
    said = " ".join(processes.log(0).split())
    assert "the checkpoint of step 6 was not written:" in said
    assert "No space left on device" in said
    assert "(rank 1 of 2); failure 1 in a row" in said
    assert "was not written" not in processes.log(1)
    failed = [step for step, record in records(config.folder).items() if "failure" in record.get("checkpoint", {})]
    assert len(failed) == 1
    assert 7 <= failed[0] <= 10
    assert checkpoints(config) == ["latest", "step_000009", "step_000012"]


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_disk_that_hangs_ends_the_run_in_limited_time_with_a_sentence(
    config: ConfigFile, processes: Processes, asynchronous: str
):
    settings = config.arguments("checkpoint.timeout_s=4", f"checkpoint.asynchronous={asynchronous}")
    start(processes, settings, "hang", step=8)
    assert [process.wait(60) for process in processes.running] == [1, 1]
    for rank in range(2):
        said = processes.log(rank)
        assert "the checkpoint of step 8 must be written in 4 s, but on rank" in said, said
    assert [name for name in checkpoints(config) if ".partial" not in name] == ["latest", "step_000004"]


def test_ctrl_c_during_a_save_that_the_steps_wait_for_ends_the_run_at_once_and_harms_no_checkpoint(
    config: ConfigFile, processes: Processes
):
    start(processes, config.arguments("checkpoint.asynchronous=false"), "hang", step=8)
    deadline = time.monotonic() + 60
    while not (config.folder / "checkpoints" / "step_000008.partial").exists():
        assert time.monotonic() < deadline, processes.log(0)
        time.sleep(0.05)
    time.sleep(0.5)  # rank 1 hangs, and both wait
    for process in processes.running:
        process.send_signal(signal.SIGINT)
    assert [process.wait(15) for process in processes.running] == [-signal.SIGINT] * 2
    for rank, said in ((0, "error: interrupted: the same"), (1, "error (rank 1): interrupted: the same")):
        assert processes.log(rank).splitlines()[-1] == f"{said} command goes on from the last whole checkpoint"
    folder = config.folder / "checkpoints"
    assert (folder / "latest").read_text().split()[-1].startswith("step_000004")
    check_files(folder / "step_000004", read_manifest(folder / "step_000004").files, share=0, shares=1)


def test_a_rank_that_dies_during_a_write_does_not_hang_the_other(config: ConfigFile, processes: Processes):
    start(processes, config.arguments(), "die", step=8)
    assert [process.wait(60) for process in processes.running] == [1, 9]
    assert "rank 1" in processes.log(0)
    assert not (config.folder / "checkpoints" / "step_000008").exists()
