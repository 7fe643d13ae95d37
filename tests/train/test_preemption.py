"""A signal in the middle of a run: every rank ends after the same step, with a checkpoint from which the run goes on bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from parallel.config import ProcessInfo
from tests.train.poison import assert_same_tensors
from tests.train.saver_ranks import fail_to_write
from tests.train.tiny_job import ALONE, records, tiny_config, write_shards
from train import run, step
from train.checkpoint_folder import candidates
from train.config import Config
from train.preemption import SIGNALS, Preemption

pytestmark = pytest.mark.usefixtures("torch_as_it_was")
MAIN = Path(__file__).resolve().parents[2] / "launcher" / "main.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", seed=1)
    return tmp_path


def config_of(
    folder: Path, name: str, *, steps: int = 6, stage: int = 0, num_workers: int = 0, **checkpoint: Any
) -> Config:
    run_section = {"dir": str(folder / name / "run"), "steps": steps, "log_every_steps": 1}
    return tiny_config(
        folder,
        run=run_section,
        parallel={"zero_stage": stage, "ep_size": 1},
        data={"num_workers": num_workers},
        checkpoint={"every_steps": 4, "keep": 20} | checkpoint,
    )


def run_and_signal(config: Config, at: dict[int, tuple[int, int]], processes: int = 1) -> str:
    """How the run ended; at: by step (0 is the first), the rank that gets a signal in it, and which."""
    rank = int(os.environ.get("RANK", "0")) if processes == 1 else step.torch.distributed.get_rank()
    info = ALONE
    if processes > 1:
        place: dict[str, Any] = {
            "rank": rank,
            "world_size": processes,
            "local_rank": rank,
            "local_world_size": processes,
        }
        info = ProcessInfo(**place, master_addr="", master_port=0, launcher="test")
    forward = step.forward

    def signalled(engine: Any, *args: Any, step: int, **kwargs: Any) -> Any:
        if engine.model.training and at.get(step, (None, 0))[0] == rank:
            os.kill(os.getpid(), at[step][1])
        return forward(engine, *args, step=step, **kwargs)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    preemption = Preemption()
    preemption.listen()
    try:
        with mock.patch.object(step, "forward", signalled):
            return run.run(config, info, preemption)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_end_saves_after_the_step_and_goes_on_from_there(folder: Path, number: int):
    assert run_and_signal(config_of(folder, "parts"), {2: (0, number)}) == "preempted"
    assert candidates(folder / "parts" / "run" / "checkpoints") == ["step_000003"]
    assert run_and_signal(config_of(folder, "parts"), {}) == "done"
    assert run_and_signal(config_of(folder, "whole"), {}) == "done"
    assert_same_tensors(folder / "parts" / "run", folder / "whole" / "run", step=6)
    assert [r["loss"] for r in records(folder / "parts")] == [r["loss"] for r in records(folder / "whole")]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_fails_when_the_run_is_asked_to_end_costs_the_steps_since_the_one_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asynchronous: bool
):
    assert (
        run_and_signal(config_of(folder, "parts", asynchronous=asynchronous), {2: (0, signal.SIGTERM)}) == "preempted"
    )
    with monkeypatch.context() as full:
        fail_to_write(full, "manifest.json")
        config = config_of(folder, "parts", asynchronous=asynchronous)
        assert run_and_signal(config, {4: (0, signal.SIGTERM)}) == "preempted"
    told = " ".join(capsys.readouterr().out.split())
    assert "the checkpoint of step 5 was not written" in told
    assert "No space left on device" in told
    assert "asked to end: the checkpoint of step 5 of 6 is missing, see above; the same command goes on from" in told
    assert not (folder / "parts" / "run" / "crash.json").exists()
    assert candidates(folder / "parts" / "run" / "checkpoints") == ["step_000003"]
    assert run_and_signal(config, {}) == "done"
    assert run_and_signal(config_of(folder, "whole"), {}) == "done"
    assert [r["loss"] for r in records(folder / "parts")] == [r["loss"] for r in records(folder / "whole")]


def test_a_user_who_wants_no_failed_save_gets_an_error_when_the_run_is_asked_to_end_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    fail_to_write(monkeypatch, "manifest.json")
    with pytest.raises(RuntimeError, match="the checkpoint of step 3 was not written"):
        run_and_signal(config_of(folder, "run", on_failure="stop"), {2: (0, signal.SIGTERM)})


def test_a_signal_in_the_last_step_ends_a_run_that_is_done(folder: Path):
    assert run_and_signal(config_of(folder, "run", steps=3), {2: (0, signal.SIGTERM)}) == "done"


def test_reader_processes_go_on_when_the_whole_group_is_signalled(folder: Path):
    """As SLURM does it."""
    folder.joinpath("config.yaml").write_text(
        yaml.safe_dump(config_of(folder, "run", steps=2000, num_workers=1).model_dump(mode="json"))
    )
    command = [
        sys.executable,
        str(MAIN),
        "--config",
        str(folder / "config.yaml"),
        "--set",
        "checkpoint.every_steps=5000",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        metrics = folder / "run" / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_bytes(), process)
        told = metrics.read_bytes().count(b"\n")
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGTERM)
        wait_for(lambda: metrics.read_bytes().count(b"\n") > told + 20, process)  # more than what was read ahead
        os.killpg(process.pid, signal.SIGTERM)
        code = process.wait(timeout=60)
    finally:
        process.kill()
    assert code == 85, (folder / "log").read_text()
    (name,) = candidates(folder / "run" / "run" / "checkpoints")
    assert (
        f"asked to end: the checkpoint of step {int(name.removeprefix('step_'))} of 2000"
        in (folder / "log").read_text()
    )


def wait_for(condition: Any, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_all_ranks_end_after_the_same_step_when_one_is_asked(folder: Path, pool: Any, stage: int):
    config = config_of(folder, "run", stage=stage)
    assert pool(2).run(run_and_signal, config, {2: (1, signal.SIGTERM)}, 2, timeout=100) == ["preempted"] * 2
    assert candidates(folder / "run" / "run" / "checkpoints") == ["step_000003"]
