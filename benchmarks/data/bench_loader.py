"""Tokens per second of one loader process beside what one H100 eats while it trains configs/switchall_1b.yaml.

Owns the shards (random ids; lengths of documents log-normal, as on the web, with two means), the cases and the bar: 20 times the GPU. The
files are in the page cache, as with a disk that keeps up. Wall time is that of whoever takes the batches; CPU time is that of the process
that makes them, which is the figure to read on a machine where other work runs. Called by: anyone, from the root of the clone, `python -m
benchmarks.data.bench_loader`; prints a table, and exits with 1 if the CPU figure of a case misses the bar.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.config import DataConfig
from data.loader import train_batches
from data.split import open_train
from data.tokenizer import bytes_tokenizer
from data.writer import ShardSetWriter
from model.cost_table import model_table
from train.build import build_model
from train.config import load_config

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "switchall_1b.yaml"
PEAK_FLOPS, MFU, BAR = (
    989e12,
    0.4,
    20.0,
)  # dense bf16 of an H100 SXM; forward and backward are 6 FLOPs for each MAC of a forward
STREAMS, ROWS, TURNS = 128, 8, 5
SHARD_TOKENS = 4_000_000


@dataclass(frozen=True)
class Case:
    """mean: tokens of a document. sources: of equal weights, each with shards of its own."""

    mean: int
    sources: int
    num_workers: int


CASES = (Case(500, 1, 0), Case(500, 1, 1), Case(5000, 1, 0), Case(5000, 1, 1), Case(500, 3, 0), Case(500, 3, 1))


@dataclass(frozen=True)
class Speed:
    """Tokens per second by the wall's clock, and by the CPU time of the process that makes the batches and of the one that takes them."""

    wall: float
    maker: float
    taker: float


def write_shards(folder: Path, *, mean: int, tokens: int, seed: int) -> Path:
    """Shards of about `tokens` tokens."""
    generator = np.random.default_rng(seed)
    tokenizer = bytes_tokenizer()
    writer = ShardSetWriter(folder, tokenizer=tokenizer, shard_tokens=SHARD_TOKENS)
    written = 0
    while written < tokens:
        length = int(generator.lognormal(np.log(mean) - 0.5, 1.0)) + 2  # of sigma 1, the mean is exp(mu + 1/2)
        ids = generator.integers(1, 257, length).astype(tokenizer.dtype)
        ids[-1] = tokenizer.end_token
        writer.add(ids, num_bytes=length - 1)
        written += length
    writer.close()
    return folder


def tokens_of_a_gpu() -> float:
    """Tokens per second of one H100 at MFU in training the 1B model."""
    config = load_config(CONFIG)
    with torch.device("meta"):
        model = build_model(config, vocab_size=config.model.vocab_size or 0)
    length = config.data.sequence_length
    macs = sum(line.cost.work.macs for line in model_table(model, length=length) if line.cost is not None) / length
    return PEAK_FLOPS * MFU / (6 * macs)


def measure(case: Case, folders: Sequence[Path], *, length: int, seconds: float) -> Speed:
    """Medians of TURNS spells of `seconds`, after every stream has read its first rows twice."""
    shards = [{"name": path.name, "shards": str(path), "weight": 1.0} for path in folders[: case.sources]]
    values = {
        "shards": shards,
        "heldout": "none",
        "sequence_length": length,
        "global_batch_size": ROWS,
        "streams": STREAMS,
    }
    config = DataConfig.model_validate(values | {"num_workers": case.num_workers})
    batches = train_batches(config, open_train(config), seed=1, accumulation_steps=1, rank=0, num_ranks=1, position=0)
    for _ in range(2 * STREAMS // ROWS):
        next(batches)
    makers = [child.pid for child in multiprocessing.active_children()] or [os.getpid()]
    spells = []
    for _ in range(TURNS):
        tokens, began, maker, taker = 0, time.perf_counter(), cpu_seconds(makers[0]), time.process_time()
        while time.perf_counter() - began < seconds:
            tokens += next(batches).tokens_BS.numel()
        wall = time.perf_counter() - began
        spells.append(
            (tokens / wall, tokens / (cpu_seconds(makers[0]) - maker), tokens / (time.process_time() - taker))
        )
    return Speed(*(statistics.median(values) for values in zip(*spells, strict=True)))


def cpu_seconds(pid: int | None) -> float:
    """CPU time of a process, its threads included (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(command_line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data.bench_loader", description=__doc__)
    parser.add_argument("--tokens", type=int, default=30_000_000, help="of each set of shards")
    parser.add_argument("--length", type=int, default=1024, help="data.sequence_length")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each of the five spells of a case")
    args = parser.parse_args(command_line)
    torch.set_num_threads(1)
    gpu = tokens_of_a_gpu()
    print(
        f"One H100 at {MFU:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s eats {gpu / 1e3:,.0f} thousand tokens/s of {CONFIG.name}; the bar is "
        f"{BAR:.0f} times that, {BAR * gpu / 1e6:.2f} million. Rows of {args.length} tokens, {STREAMS} streams, {ROWS} rows a batch; load "
        f"of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.\n"
    )
    print(
        "| documents, mean tokens | sources | num_workers | wall, M tokens/s | maker, M tokens per CPU s | taker | times an H100 | |"
    )
    print("|---|---|---|---|---|---|---|---|")
    missed = False
    with tempfile.TemporaryDirectory() as scratch:
        for mean in dict.fromkeys(case.mean for case in CASES):
            count = max(case.sources for case in CASES if case.mean == mean)
            names = [Path(scratch) / f"mean_{mean}_{number}" for number in range(count)]
            folders = [write_shards(path, mean=mean, tokens=args.tokens, seed=i) for i, path in enumerate(names)]
            for case in (case for case in CASES if case.mean == mean):
                speed = measure(case, folders, length=args.length, seconds=args.seconds)
                times = speed.maker / gpu
                missed |= times < BAR
                print(
                    f"| {mean:,} | {case.sources} | {case.num_workers} | {speed.wall / 1e6:.1f} | {speed.maker / 1e6:.1f} | "
                    f"{speed.taker / 1e6:.1f} | {times:.0f} | {'missed' if times < BAR else 'met'} |",
                    flush=True,
                )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
