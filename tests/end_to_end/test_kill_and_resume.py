"""Promise 2 with the real launchers: a run that is killed and started again repeats the losses that it would have had, bit for bit.

Kills at every kind of instant are in test_kills.py, at starts that take a second instead of ten.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.end_to_end.conftest import MAIN, ConfigFile, Processes, free_port, records
from tests.end_to_end.warm import Job

DEADLINE_S = 120
FIGURES = ("loss", "auxiliary_loss", "grad_norm", "lr", "position", "routers", "heldout_loss")
PYTHON = Path(sys.executable)
Ranks = Callable[..., Job]


def assert_equal_runs(folder: Path, expected_folder: Path) -> None:
    found, expected = records(folder), records(expected_folder)
    assert sorted(found) == sorted(expected)
    for step in expected:
        for figure in FIGURES:
            assert found[step].get(figure) == expected[step].get(figure), f"{figure} at step {step}"


def deepspeed(arguments: Sequence[str]) -> list[str]:
    command = [str(PYTHON.parent / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
    return [*command, str(MAIN), *arguments]


def torchrun(arguments: Sequence[str]) -> list[str]:
    command = [str(PYTHON), "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    return [*command, str(MAIN), *arguments]


def wait_for_step(processes: Processes, folder: Path, step: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while max(records(folder), default=0) < step:
        assert time.monotonic() < deadline, processes.log(0)
        time.sleep(0.01)


def ranks_of(folder: Path) -> list[int]:
    """The processes that run launcher/main.py on this test's config, not their launcher."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().decode().split("\0")
        except OSError:  # it has just ended
            continue
        if str(MAIN) in words[:4] and str(folder / "config.yaml") in words:
            found.append(int(place.name))
    return found


def wait_until_all_are_gone(launcher: "subprocess.Popen[bytes]", folder: Path) -> int:
    """The launcher's exit code. Nothing of a run may be left behind, or the next start finds the folder in use."""
    code = launcher.wait(90)
    deadline = time.monotonic() + 60
    while ranks_of(folder):
        assert time.monotonic() < deadline, f"the launcher has ended and {ranks_of(folder)} have not"
        time.sleep(0.1)
    return code


@pytest.mark.timeout(400)
@pytest.mark.parametrize("is_alone", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_deepspeed_and_torchrun_are_killed_and_the_same_run_goes_on(
    config: ConfigFile, processes: Processes, ranks: Ranks, tmp_path: Path, is_alone: bool
):
    """is_alone: the deepspeed command alone gets the signal, as from a user's kill; else all that it started, as from a scheduler."""
    whole, steps = tmp_path / "uninterrupted", 32  # many more than are made until a rank looks for its launcher
    arguments = config.arguments(f"run.steps={steps}")
    reference = ranks(2, [*arguments, "--set", f"run.dir={whole}"])

    launcher = processes.start(deepspeed(arguments))
    wait_for_step(processes, config.folder, 5)
    (os.kill if is_alone else os.killpg)(launcher.pid, signal.SIGTERM)
    assert wait_until_all_are_gone(launcher, tmp_path) != 0
    if is_alone:
        assert "the launcher has ended: so does the run" in processes.log(0)
        assert f"asked to end: the checkpoint of step {max(records(config.folder))} of {steps} is written" in " ".join(
            processes.log(0).split()
        )

    launcher = processes.start(torchrun(arguments))
    wait_for_step(processes, config.folder, max(records(config.folder)) + 3)
    os.kill(max(ranks_of(tmp_path)), signal.SIGKILL)
    assert wait_until_all_are_gone(launcher, tmp_path) != 0
    assert "resumed from" in processes.log(1)
    assert 8 <= max(records(config.folder)) < steps

    last = ranks(2, arguments)
    last.finish()
    assert "resumed from" in last.ranks[0].said()
    reference.finish()
    assert sorted(records(whole)) == list(range(1, steps + 1))
    assert_equal_runs(config.folder, whole)


def test_the_command_of_a_finished_run_does_nothing_and_more_steps_go_on(config: ConfigFile, ranks: Ranks):
    def said(*settings: str) -> str:
        job = ranks(1, config.arguments("parallel.zero_stage=0", *settings))
        job.finish()
        return job.ranks[0].said()

    said()
    before = records(config.folder)
    assert "nothing to do" in said()
    assert records(config.folder) == before
    assert "run.steps was 12 and is 14" in said("run.steps=14")
    assert sorted(records(config.folder)) == list(range(1, 15))
