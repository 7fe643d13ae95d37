"""The loop of a run: what its figures of speed count, with a clock that only the stand-ins move."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.train.tiny_job import ALONE
from train import measure, run
from train.config import load_config
from train.crash import CrashFile
from train.engine import LocalMesh
from train.evaluate import Evaluation
from train.job import Job
from train.metrics import Reporter
from train.preemption import Preemption
from train.progress import Progress
from train.run_folder import RunFolder
from train.step import StepResult

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_cpu.yaml"
SETTINGS = [
    "run.steps=6",
    "optim.warmup_steps=1",
    "run.log_every_steps=2",
    "eval.every_steps=3",
    "checkpoint.every_steps=2",
]


STEP = StepResult(loss=1.0, auxiliary_loss=0.0, grad_norm=1.0, nats=10.0, num_targets=10, num_bytes=10, reports={})


class Clock:
    """Seconds, moved on by whatever takes time."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_tokens_per_second_are_those_of_the_steps_without_evaluations_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clock = Clock()

    def take(seconds: float, result: Any = None) -> Any:
        clock.now += seconds
        return result

    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    monkeypatch.setattr(run, "train_step", lambda *_, step, **__: take(2.0 + step, STEP))
    monkeypatch.setattr(measure, "evaluate", lambda *_, **__: take(1000.0, Evaluation(1.0, 1.0, 10, 10)))
    monkeypatch.setattr(Job, "heldout_batches", lambda job: iter(()))
    monkeypatch.setattr(run, "save", lambda *_: take(5000.0))
    config = load_config(TINY, [f"run.dir={tmp_path}", *SETTINGS])
    job = Job(
        config,
        layout=cast(Any, None),
        data=cast(Any, None),
        world=LocalMesh(torch.device("cpu")),
        engine=cast(Any, SimpleNamespace(model=torch.nn.Module())),
        memory=None,
        reporter=Reporter(is_main=False, total_steps=6),
        saver=cast(Any, SimpleNamespace(look=lambda: None, take_record=dict, finish=lambda **_: True)),
        crash=CrashFile(RunFolder(tmp_path), ALONE),
        preemption=Preemption(),
    )
    run.train(job, Progress(step=0, position=0), cast(Any, iter(())))

    speeds = {
        record["step"]: record["tokens_per_second"]
        for record in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    }
    tokens = (
        config.data.global_batch_size * config.data.sequence_length
    )  # of a step; the steps take 2, 3, ... 7 seconds
    assert speeds == pytest.approx({2: 2 * tokens / 5, 3: tokens / 4, 4: tokens / 5, 6: 2 * tokens / 13})
