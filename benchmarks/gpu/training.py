"""A training run of configs/switchall_47m.yaml and of its dense twin on one GPU: tokens/s, peak memory, MFU, held-out loss.

Owns the two runs, in a process each and through launcher/main.py's own entry, and the table. Does not own what a run logs
(train/metrics.py, whose records it reads) nor the FLOPs (model/cost.py). A run that is out of time counts with the steps that it made;
its row is printed as soon as it has ended.
Called by: anyone with a GPU and shards, from the root of the clone: `python -m benchmarks.gpu.training --shards DIR --runs DIR > FILE.md`;
--smoke needs no GPU.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.timing import (
    NOT_MEASURED,
    ROOT,
    Machine,
    Speeds,
    add_speed_arguments,
    find_machine,
    header,
    speeds_of,
)
from data.index import open_index
from model.cost_table import model_table
from model.parameters import count_parameters
from model.transformer import Transformer
from train.config import load_config

RUNS = ("switchall_47m", "dense_47m")
COLUMNS = (
    "run", "parameters", "FLOPs of a token", "steps", "tokens/s", "ms a step", "MFU", "peak", "loss", "held out", "ended",
)  # fmt: skip
LOG_EVERY, HELDOUT_TOKENS = 20, 262_144
TINY_SWITCHALL = ("model.switchhead.head_dim=8", "model.sigma_moe.expert_dim=8")
TINY_DENSE = ("model.attention.head_dim=8", "model.attention.num_heads=2", "model.dense_mlp.hidden_dim=32")
TINY = (
    "run.steps=3", "run.log_every_steps=1", "model.d_model=16", "model.num_layers=1", "data.sequence_length=16",
    "data.global_batch_size=4", "data.streams=4", "data.num_workers=0", "eval.max_tokens=256", "parallel.zero_stage=0",
)  # fmt: skip


def settings(name: str, args: argparse.Namespace) -> list[str]:
    """What is changed in the config: where, how long, and how often it tells."""
    found = {
        "run.dir": args.runs / name,
        "run.steps": args.steps,
        "run.log_every_steps": LOG_EVERY,
        "run.device": "cpu" if args.smoke else "cuda",
        "data.shards": args.shards / "train",
        "data.heldout": args.shards / "heldout",
        "checkpoint.every_steps": args.steps,
        "eval.every_steps": args.steps,
        "eval.max_tokens": HELDOUT_TOKENS,
    }
    tiny = (*TINY, *(TINY_DENSE if name.startswith("dense") else TINY_SWITCHALL)) if args.smoke else ()
    return [*(f"{key}={value}" for key, value in found.items()), *tiny, *args.set]


def train_one(name: str, args: argparse.Namespace) -> int:
    """In a process of its own: the run, then its peak memory into the run folder."""
    from launcher.main import main as launch

    sets = [part for one in settings(name, args) for part in ("--set", one)]
    code = launch(["--config", str(ROOT / f"configs/{name}.yaml"), *sets])
    if code == 0 and torch.cuda.is_available():
        (args.runs / name / "peak.json").write_text(json.dumps(torch.cuda.max_memory_allocated()))
    return code


def start(name: str, args: argparse.Namespace) -> str:
    """Runs `train_one` in a process, whose output goes to stderr; how it ended, in words ("" is well)."""
    command = [sys.executable, "-m", "benchmarks.gpu.training", *sys.argv[1:], "--one", name]
    try:
        ended = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, timeout=args.seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {args.seconds:.0f} s"
    return "" if ended.returncode == 0 else f"**failed** with status {ended.returncode}"


@dataclass(frozen=True)
class Result:
    """A run as its records tell it. tokens_per_second: of the records after the first; flops: of a token, forward and backward."""

    name: str
    parameters: int
    flops: float
    records: list[dict[str, Any]]
    peak: int | None
    ending: str

    @property
    def tokens_per_second(self) -> float | None:
        speeds = [record["tokens_per_second"] for record in self.records[1:]]
        return statistics.median(speeds) if speeds else None

    @property
    def tokens_per_step(self) -> float:
        return self.records[-1]["tokens"] / self.records[-1]["step"]

    def row(self, machine: Machine, speeds: Speeds) -> str:
        timed = self.tokens_per_second if machine.measures else None
        cells = [self.name, f"{self.parameters / 1e6:.1f} M", f"{self.flops / 1e6:,.0f} M"]
        if not self.records:
            return f"| {' | '.join([*cells, *['-'] * 7, self.ending])} |"
        cells += [str(self.records[-1]["step"])]
        if timed:
            step_ms = 1e3 * self.tokens_per_step / timed
            cells += [f"{timed:,.0f}", f"{step_ms:.1f}", f"{timed * self.flops / speeds.flops:.1%}"]
        else:
            cells += [NOT_MEASURED] * 3
        cells.append("-" if self.peak is None else f"{self.peak / 1e9:.2f} GB")
        heldout = [record["heldout_loss"] for record in self.records if "heldout_loss" in record]
        cells += [f"{self.records[-1]['loss']:.4f}", f"{heldout[-1]:.4f}" if heldout else "-", self.ending or "well"]
        return f"| {' | '.join(cells)} |"


def read(name: str, args: argparse.Namespace, ending: str) -> Result:
    folder: Path = args.runs / name
    config = load_config(ROOT / f"configs/{name}.yaml", settings(name, args))
    model = Transformer(
        config.model, vocab_size=open_index(config.data.sources[0].shards).vocab_size, backend="reference"
    )
    length = config.data.sequence_length
    costs = [line.cost for line in model_table(model, length=length)]
    macs = sum(cost.work.macs for cost in costs if cost is not None)
    metrics, peak = folder / "metrics.jsonl", folder / "peak.json"
    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return Result(
        name, count_parameters(model), 6 * macs / length, records, json.loads(peak.read_text()) if peak.exists() else None,
        ending,
    )  # fmt: skip


def head(machine: Machine, speeds: Speeds, args: argparse.Namespace) -> str:
    """What stands above the rows."""
    notes = (
        f"{args.steps} steps of the config's own batch; tokens/s: median over the records of {LOG_EVERY} steps but the first; the held-out "
        f"loss is over at most {HELDOUT_TOKENS:,} tokens",
        f"MFU: tokens/s x FLOPs of a token / {speeds.flops / 1e12:.0f} TFLOP/s; FLOPs: 6 x the multiply-accumulates of model/cost.py, "
        "masked pairs of attention included",
        "peak: torch's most allocated bytes of the whole process, with the measurement of backends before the first step",
    )
    return header(machine, title=f"Training on {machine.name}", notes=notes, columns=COLUMNS)


def ratio(results: Sequence[Result]) -> str:
    """Of the two speeds, "" where one is not known."""
    ours, dense = (result.tokens_per_second for result in results)
    return f"\n- {RUNS[0]} / {RUNS[1]} in tokens/s: {ours / dense:.2f}" if ours and dense else ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Training runs of SwitchAll 47M and its dense twin.")
    add = parser.add_argument
    add("--shards", type=Path, required=True, help="what data.prepare wrote, with a vocabulary of 8,000")
    add("--runs", type=Path, required=True, help="a new folder for the runs")
    add("--steps", type=int, default=300)
    add("--seconds", type=float, default=130.0, help="most time for a run")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change one value of both configs; repeatable")
    add("--smoke", action="store_true", help="three steps of tiny models on a CPU, without times")
    add_speed_arguments(parser)
    add("--one", choices=RUNS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return train_one(args.one, args)
    try:
        machine = find_machine(smoke=args.smoke)
        speeds = speeds_of(machine, args)
        for split in ("train", "heldout"):
            open_index(args.shards / split)
        print(head(machine, speeds, args), flush=True)
        results = []
        for name in RUNS:
            results.append(read(name, args, start(name, args)))
            print(results[-1].row(machine, speeds), flush=True)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    if machine.measures:
        print(ratio(results), flush=True)
    return int(any(result.ending for result in results))


if __name__ == "__main__":
    sys.exit(main())
