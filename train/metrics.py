"""What a run tells: metrics.jsonl, TensorBoard, and the console of rank 0.

Owns the names of the metrics. A record is one JSON object for each logged step; on resume the records after the restored step are
dropped, because those steps are done again.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from model.router import RouterReport
from train.evaluate import Evaluation, bits_per_byte
from train.run_folder import RunFolder
from train.step import StepResult


def step_record(
    result: StepResult, *, step: int, position: int, lr: float, tokens: int, tokens_per_second: float
) -> dict[str, Any]:
    """The metrics of a step. step: updates done. tokens: rows * length consumed since the run began. loss: nats per target."""
    nats = result.loss * result.num_targets
    return {
        "step": step,
        "loss": result.loss,
        "bits_per_byte": bits_per_byte(nats, result.num_bytes),
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
    entropy: nats, of the mean softmax over the head's experts, averaged over heads (log E is uniform).
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
        }
    return record


def evaluation_record(evaluation: Evaluation) -> dict[str, float]:
    return {"heldout_loss": evaluation.loss, "heldout_bits_per_byte": evaluation.bits_per_byte}


class MetricsWriter:
    """metrics.jsonl and TensorBoard of rank 0. `restored_step`: records of later steps are dropped first."""

    def __init__(self, folder: RunFolder, *, restored_step: int) -> None:
        _drop_later(folder.metrics, restored_step)
        self._file = folder.metrics.open("a")
        self._tensorboard = SummaryWriter(str(folder.tensorboard), purge_step=restored_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in _flat(record):
            self._tensorboard.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


def _drop_later(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except json.JSONDecodeError:
            continue  # the line that a kill cut short; its step is done again
    aside = path.with_suffix(".partial")
    aside.write_text("".join(f"{line}\n" for line in kept))
    os.replace(aside, path)


def _flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


class Reporter:
    """The console of rank 0: a live progress bar on a terminal, a line for each logged step elsewhere. Silent on other ranks."""

    def __init__(self, *, is_main: bool, total_steps: int) -> None:
        self._console = Console(quiet=not is_main, highlight=False, soft_wrap=True)
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
