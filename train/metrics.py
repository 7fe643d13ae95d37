"""What a run tells: metrics.jsonl, TensorBoard, and the console of rank 0.

Owns the names of the metrics. A record is one JSON object for each logged step.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from data.mixture import Mixture
from data.order import Line
from data.split import TrainSplit
from model.router import RouterReport, load_spread
from train.engine import World
from train.evaluate import Evaluation, bits_per_byte
from train.run_folder import RunFolder, explained, keep_aside, replace_file
from train.step import StepResult
from train.together import on_rank_zero


def step_record(
    result: StepResult, *, step: int, position: int, lr: float, tokens: int, tokens_per_second: float
) -> dict[str, Any]:
    """The metrics of a step. step: steps done, those without an update too. loss: nats per target.

    tokens: rows * length consumed since the run began.
    """
    return {
        "step": step,
        "loss": result.loss,
        "bits_per_byte": bits_per_byte(result.nats, result.num_bytes),
        "auxiliary_loss": result.auxiliary_loss,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "position": position,
        "tokens": tokens,
        "tokens_per_second": tokens_per_second,
    }


def router_record(reports: dict[str, RouterReport]) -> dict[str, dict[str, float]]:
    """Per router, of one step over all ranks (reports already summed over them).

    load_max_over_mean: copies of the busiest expert over the mean of all (1 is balanced). dead_experts: experts without a copy.
    entropy: nats, of the mean softmax over the head's experts, averaged over heads (log E is uniform). load_spread: of the head where it
    is least, 0 where K experts take everything, 1 where all are used alike.
    """
    record = {}
    for name, report in reports.items():
        heads = round(float(report.probability_G.sum() / report.num_rows))  # each head's probabilities sum to 1 per row
        probability_HE = (report.probability_G / report.num_rows).view(heads, -1)
        entropy_H = -(probability_HE * probability_HE.clamp_min(1e-30).log()).sum(1)
        record[name] = {
            "load_max_over_mean": float(report.count_G.max() / report.count_G.mean()),
            "dead_experts": int((report.count_G == 0).sum()),
            "entropy": float(entropy_H.mean()),
            "load_spread": float(load_spread(report).min()),
        }
    return record


def source_record(
    split: TrainSplit, lines: Sequence[Line], mixture: Mixture, *, position: int
) -> dict[str, dict[str, float]]:
    """By source, the epochs done (1.5: half of the second) and the share of the rows so far. position: above 0."""
    rows = dict(zip((source.name for source in split.sources), mixture.rows_taken(position), strict=True))
    epochs = {name: rows[name] / line.rows_per_epoch for name, line in zip(rows, lines, strict=True)}
    return {"epochs": epochs, "shares": {name: taken / position for name, taken in rows.items()}}


def evaluation_record(evaluation: Evaluation) -> dict[str, float]:
    return {"heldout_loss": evaluation.loss, "heldout_bits_per_byte": evaluation.bits_per_byte}


class MetricsWriter:
    """metrics.jsonl and TensorBoard. Every rank calls it, rank 0 writes; if that fails, every rank raises its RuntimeError.

    `restored_step`: steps done that the run goes on from. Records of later steps are dropped, because those steps are done again; with
    no checkpoint to go on from (0) the records of an earlier attempt are kept, in a file beside the new one.
    """

    def __init__(self, folder: RunFolder, world: World, *, restored_step: int) -> None:
        self._folder, self._world = folder, world
        on_rank_zero(world, lambda: self._open(restored_step))

    def write(self, record: dict[str, Any]) -> None:
        on_rank_zero(self._world, lambda: self._write(record))

    def close(self) -> None:
        on_rank_zero(self._world, self._close)

    def _open(self, restored_step: int) -> None:
        with explained(self._folder.metrics):
            if restored_step == 0:
                keep_aside(self._folder.metrics)
            else:
                _drop_later(self._folder.metrics, restored_step)
            self._file = self._folder.metrics.open("a")
        with explained(self._folder.tensorboard):
            self._tensorboard = SummaryWriter(str(self._folder.tensorboard), purge_step=restored_step + 1)

    def _write(self, record: dict[str, Any]) -> None:
        record = _finite(record)
        with explained(self._folder.metrics):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        with explained(self._folder.tensorboard):
            for name, value in _flat(record):
                if value is not None:
                    self._tensorboard.add_scalar(name, value, record["step"])

    def _close(self) -> None:
        with explained(self._folder.metrics):
            self._file.close()
        with explained(self._folder.tensorboard):
            self._tensorboard.close()


def _finite(value: Any) -> Any:
    """JSON has no NaN: a skipped step's loss is null."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_later(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except json.JSONDecodeError:
            continue  # the line that a kill cut short; its step is done again
    replace_file(path, "".join(f"{line}\n" for line in kept))


def _flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float | None]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif not isinstance(value, str):  # TensorBoard's scalars are numbers; sentences are in metrics.jsonl
            yield prefix + name, value


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads any more, as after an ssh that was cut: the run goes on and saves. (rich would end the process.)"""
        self.quiet = True
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


class Reporter:
    """The console of rank 0: a live progress bar on a terminal, a line for each logged step elsewhere. Silent on other ranks."""

    def __init__(self, *, is_main: bool, total_steps: int) -> None:
        self._console = _Console(quiet=not is_main, highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=total_steps, status="")

    def __enter__(self) -> "Reporter":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def start(self, done: int) -> None:
        """The bar begins at `done` steps, so that the time left is that of the steps that are made now."""
        self._progress.reset(self._task, completed=done)

    def step(self, done: int) -> None:
        self._progress.update(self._task, completed=done)

    def record(self, record: dict[str, Any]) -> None:
        """Shows a logged step: loss, speed, the worst router's load, and the held-out figures when there are any."""
        loads = [router["load_max_over_mean"] for router in record.get("routers", {}).values()]
        status = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s"
        if loads:
            status += f"  expert load max/mean {max(loads):.2f}"
        self._progress.update(self._task, completed=record["step"], status=status)
        if not self._console.is_terminal:
            self.say(f"step {record['step']}  {status}")
        if "heldout_loss" in record:
            self.say(
                f"step {record['step']}  held out: loss {record['heldout_loss']:.4f}, "
                f"{record['heldout_bits_per_byte']:.4f} bits per byte"
            )
