"""What a step waits for a save, behind the steps and not; host memory of a save; the time to resume against checkpoint size.

Owns: the two tables. One process and thread, PlainEngine, float32, random tokens; each row in a process of its own, because memory is
read from it. CPU seconds are the main thread's: what the wall clock would say on an idle machine, but for the disk.
The files are dropped from the page cache before a resume. Called by: anyone, from the root of the clone, `python -m
benchmarks.train.bench_save --folder DIR` (some GB there); prints Markdown.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data.loader import Batch
from model.parameters import count_parameters, materialize
from train import checkpoint
from train.backends import Backends, unmeasured_backend
from train.build import build_model
from train.checkpoint import TrainState
from train.checkpoint_config import CheckpointConfig
from train.config import Config, Layout, load_config
from train.engine import LocalMesh, PlainEngine
from train.optimizer import build_optimizer, parameter_groups
from train.saver import open_saver
from train.step import StepSettings, train_step
from train.works import bank_works

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 8000
SAVES = 2  # the first of them makes the host memory of the copy
RESUMED = ("tiny_cpu", "switchall_47m", "paper/switchhead_rope_243m")
CPU = torch.device("cpu")


def engine_of(name: str) -> tuple[Config, PlainEngine]:
    config = load_config(ROOT / "configs" / f"{name}.yaml", [f"model.vocab_size={VOCABULARY}", "run.dtype=float32"])
    model = build_model(config, vocab_size=VOCABULARY)
    works = bank_works(config, Layout(ep_size=1, node_size=1), {}, processes=1)
    Backends({bank: unmeasured_backend(config, bank, work, CPU) for bank, work in works.items()}).apply(model)
    materialize(model, seed=1, device=CPU)
    groups = parameter_groups(model, weight_decay=config.optim.weight_decay)
    settings = {"clip_grad_norm": config.optim.clip_grad_norm, "accumulation_steps": 1, "dtype": torch.float32}
    return config, PlainEngine(model, build_optimizer(groups, config.optim), **settings)


def batches(rows: int, length: int) -> Iterator[Batch]:
    drawn = torch.Generator().manual_seed(1)
    position = 0
    while True:
        text = torch.randint(0, VOCABULARY, (rows, length + 1), generator=drawn)
        positions = torch.arange(position, position + rows)
        no_documents, fresh = torch.zeros_like(text[:, 1:]), torch.zeros(rows, dtype=torch.bool)
        yield Batch(text[:, :-1], text[:, 1:], no_documents, positions, fresh, num_bytes=rows * length)
        position += rows


def memory(field: str) -> float:
    """GB of this process: VmRSS now, VmHWM at its peak since `forget_peak`."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024 / 1e9


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def steps_and_saves(folder: Path, *, rows: int, asynchronous: bool) -> dict[str, Any]:
    """A step alone, then a save before every step, which runs while it is written."""
    config, engine = engine_of("switchall_47m")
    world, settings = LocalMesh(CPU), StepSettings(1, seed=1, mask_documents=True)
    stream = batches(rows, config.data.sequence_length)
    number = 0

    def step() -> tuple[float, float]:
        nonlocal number
        began, busy = time.perf_counter(), time.thread_time()
        train_step(engine, stream, world, settings, step=number, lr=1e-4)
        number += 1
        return time.perf_counter() - began, time.thread_time() - busy

    step()
    alone, behind, waits, busy_waits, writes, grown = [step()], [], [], [], [], []
    chosen = CheckpointConfig(asynchronous=asynchronous, keep=1)
    with open_saver(folder, world, chosen, patience_s=60, say=print) as saver:
        for _ in range(SAVES):
            forget_peak()
            before = memory("VmRSS")
            state = TrainState(step=number, position=number * rows, config={}, extra={})
            busy = time.thread_time()
            saver.save(state, fragments=engine.owned_fragments(), tensors={})
            busy_waits.append(time.thread_time() - busy)
            peak = memory("VmHWM")  # before a step's activations come and go
            took = step()
            saver.finish()
            record = saver.take_record()["checkpoint"]
            waits.append(record["wait_seconds"])
            writes.append(record["write_seconds"])
            grown.append(peak - before)
            behind.append(took)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e9
    found = {
        "size": size,
        "alone": alone,
        "behind": behind,
        "waits": waits,
        "busy_waits": busy_waits,
        "writes": writes,
        "grown": grown,
    }
    return found | {"parameters": count_parameters(engine.model), "rss": memory("VmRSS")}


def resume(folder: Path, name: str) -> dict[str, Any]:
    """Writes a checkpoint of the model, forgets it, and reads it as a run does that goes on."""
    _, engine = engine_of(name)
    world = LocalMesh(CPU)
    state = TrainState(step=1, position=1, config={}, extra={})
    forget_peak()
    before = memory("VmRSS")
    path = checkpoint.save(folder, state=state, fragments=engine.owned_fragments(), mesh=world, keep=1)
    saving = memory("VmHWM") - before
    size = 0
    for file in path.iterdir():
        size += file.stat().st_size
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    newest = checkpoint.latest(folder, mesh=world)
    checked = time.perf_counter()
    assert newest is not None
    checkpoint.load(newest, fragments=engine.fragments(), mesh=world, verify=False)
    return {
        "size": size / 1e9,
        "check": checked - began,
        "read": time.perf_counter() - checked,
        "saving": saving,
        "parameters": count_parameters(engine.model),
    }


def in_a_process(folder: Path, *arguments: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        command = [sys.executable, "-m", "benchmarks.train.bench_save", "--folder", place, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def table_of_steps(folder: Path, rows: int) -> Iterator[str]:
    names = ("a step alone, s (CPU s)", "with a write behind it, s", "a step waits, s (CPU s): first save, second")
    names += ("of a step, by CPU s", "write, s", "memory grows, GB: first save, second")
    yield f"| save | {' | '.join(names)} |"
    yield "|---" * (len(names) + 1) + "|"
    size = 0.0
    for name, flag in (("waited for", "--wait"), ("behind the steps", "--behind")):
        found = in_a_process(folder, "--rows", str(rows), flag)
        size = found["size"]
        ((seconds, busy),) = found["alone"]
        waits = ", ".join(
            f"{wait:.2f} ({of_cpu:.3f})" for wait, of_cpu in zip(found["waits"], found["busy_waits"], strict=True)
        )
        behind = ", ".join(f"{one:.2f}" for one, _ in found["behind"]) if flag == "--behind" else "-"
        writes = ", ".join(f"{write:.2f}" for write in found["writes"])
        grown = ", ".join(f"{max(0.0, more):.3f}" for more in found["grown"])
        share = 100 * found["busy_waits"][-1] / busy
        yield f"| {name} | {seconds:.2f} ({busy:.2f}) | {behind} | {waits} | {share:.1f} % | {writes} | {grown} |"
    yield ""
    yield f"switchall_47m, {rows} rows of 256 tokens to a step (the config has 64), a checkpoint of {size:.3f} GB."


def table_of_resumes(folder: Path) -> Iterator[str]:
    yield "| config | parameters | GB | checksums, s | reading, s | in all, s | GB/s | memory of a save that is waited for, GB |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in RESUMED:
        found = in_a_process(folder, "--resume", name)
        total = found["check"] + found["read"]
        yield (
            f"| {name} | {found['parameters']:,} | {found['size']:.3f} | {found['check']:.2f} | {found['read']:.2f} | {total:.2f} | "
            f"{found['size'] / total:.2f} | {found['saving']:.3f} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="What a save costs a run, and a resume.")
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--rows", type=int, default=4, help="of a step; the config has 64")
    parser.add_argument("--resume", help=argparse.SUPPRESS)  # these three: one part, in this process
    parser.add_argument("--wait", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--behind", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as `make train` does; CPU seconds then are those of one thread
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    if args.resume:
        print(json.dumps(resume(args.folder, args.resume)))
    elif args.wait or args.behind:
        print(json.dumps(steps_and_saves(args.folder, rows=args.rows, asynchronous=args.behind)))
    else:
        args.folder.mkdir(parents=True, exist_ok=True)
        for line in itertools.chain(table_of_steps(args.folder, args.rows), [""], table_of_resumes(args.folder)):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
