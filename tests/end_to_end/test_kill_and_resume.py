"""Promise 2: a run that is killed and started again repeats the losses that it would have had, bit for bit."""

import random
import time
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ConfigFile, Processes, records

DEADLINE_S = 120
FIGURES = ("loss", "auxiliary_loss", "grad_norm", "lr", "position", "routers", "heldout_loss")


def run_to_the_end(processes: Processes, arguments: list[str], *, ranks: int = 2) -> None:
    processes.start_ranks(ranks, arguments)
    processes.wait()


def kill_after_step(
    processes: Processes, arguments: list[str], folder: Path, *, step: int, delay_s: float = 0.0
) -> None:
    """kill -9 of all ranks, `delay_s` after the step's record is on disk."""
    processes.start_ranks(2, arguments)
    deadline = time.monotonic() + DEADLINE_S
    while max(records(folder), default=0) < step:
        assert time.monotonic() < deadline, processes.log(0)
        time.sleep(0.005)
    time.sleep(delay_s)
    processes.kill()


def assert_equal_runs(folder: Path, expected_folder: Path) -> None:
    found, expected = records(folder), records(expected_folder)
    assert sorted(found) == sorted(expected)
    for step in expected:
        for figure in FIGURES:
            assert found[step].get(figure) == expected[step].get(figure), f"{figure} at step {step}"


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_kill_9_then_the_same_command_repeats_the_losses_bit_for_bit(
    config: ConfigFile, processes: Processes, zero_stage: int
):
    stage = f"parallel.zero_stage={zero_stage}"
    whole = config.folder.parent / "uninterrupted"
    run_to_the_end(processes, config.arguments(stage, f"run.dir={whole}"))
    assert sorted(records(whole)) == list(range(1, 13))

    seed = time.time_ns()
    kill_at = random.Random(seed).randint(5, 11)  # past the first checkpoint, before the end
    print(f"seed {seed}: killed after step {kill_at}")
    kill_after_step(processes, config.arguments(stage), config.folder, step=kill_at)
    run_to_the_end(processes, config.arguments(stage))
    assert "resumed from" in processes.log(0)
    assert_equal_runs(config.folder, whole)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kills_at_random_instants_until_the_run_is_done(config: ConfigFile, processes: Processes):
    long = ("run.steps=80", "checkpoint.every_steps=3")
    whole = config.folder.parent / "uninterrupted"
    run_to_the_end(processes, config.arguments(*long, f"run.dir={whole}"))
    seed = time.time_ns()
    draw = random.Random(seed)
    print(f"seed {seed}")
    kills = 0
    while (step := max(records(config.folder), default=0) + draw.randint(3, 12)) < 80:
        delay_s = draw.uniform(0.0, 0.3)  # a step and a save take about a tenth each: some fall into a save
        kill_after_step(processes, config.arguments(*long), config.folder, step=step, delay_s=delay_s)
        kills += 1
    run_to_the_end(processes, config.arguments(*long))
    print(f"{kills} kills")
    assert_equal_runs(config.folder, whole)


def test_the_command_of_a_finished_run_does_nothing_and_more_steps_go_on(config: ConfigFile, processes: Processes):
    run_to_the_end(processes, config.arguments("parallel.zero_stage=0"), ranks=1)
    before = records(config.folder)
    run_to_the_end(processes, config.arguments("parallel.zero_stage=0"), ranks=1)
    assert "nothing to do" in processes.log(0)
    assert records(config.folder) == before
    run_to_the_end(processes, config.arguments("parallel.zero_stage=0", "run.steps=14"), ranks=1)
    assert "run.steps was 12 and is 14" in processes.log(0)
    assert sorted(records(config.folder)) == list(range(1, 15))
