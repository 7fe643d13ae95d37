"""Compiles what the GPU benchmarks launch, in a pool of processes, so that their clocks find Triton's cache filled.

Owns the list of what is compiled. Each job is the check that its benchmark makes before it prints, at the sizes that it times: all tiles
of all kernels are launched, and a wrong kernel shows here first. What a process here measures is thrown away.
Called by: benchmarks/gpu_suite.sh, `python -m benchmarks.gpu.warm kernels|relatives|model`, from the root of the clone.
"""

import argparse
import importlib
import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from benchmarks.gpu.timing import ROOT, Machine, find_machine

OPS = {
    "kernels": ("expert_mlp", "grouped_matmul", "switchhead_project"),
    "relatives": ("peer_experts", "embedding_bag", "product_key_topk", "top_k_attention", "shift_mix"),
}
PROCESSES = 8  # the checks in float64 of all layers at once would need more than 80 GB
TRAINED = "switchall_47m"


@dataclass(frozen=True)
class Job:
    """kind: "op" (layer: of that bench), "attention" (name: of a config whose mixer is SwitchHead) or "config"."""

    kind: str
    name: str
    layer: str = ""


def jobs(part: str, *, smoke: bool) -> list[Job]:
    """Of a part of the suite; the last layers of a bench are its largest, so they come first."""
    if part in OPS:
        found = []
        for op in OPS[part][:1] if smoke else OPS[part]:
            try:
                bench = importlib.import_module(f"benchmarks.kernels.bench_{op}").BENCH
            except Exception:  # a bench that cannot be imported fails as a job, and the others go on
                found.append(Job("op", op))
                continue
            layers = bench.smoke_layers[:1] if smoke else bench.layers
            found += [Job("op", op, layer.name) for layer in reversed(layers)]
        return found
    from benchmarks.gpu.layers import PAIRS, SMOKE_PAIRS

    return [Job("config", TRAINED), *(Job("attention", ours) for ours, _ in (SMOKE_PAIRS if smoke else PAIRS))]


def work(job: Job, *, smoke: bool) -> tuple[float, str]:
    """Seconds, and what went wrong."""
    began, error = time.perf_counter(), ""
    try:
        _work(job, find_machine(smoke=smoke))
    except Exception:  # whatever it is: the others go on, and the benchmark will say it again
        error = traceback.format_exc()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return time.perf_counter() - began, error


def _work(job: Job, machine: Machine) -> None:
    if job.kind == "op":
        from benchmarks.gpu.kernel_bench import check

        bench = importlib.import_module(f"benchmarks.kernels.bench_{job.name}").BENCH
        layer = next(layer for layer in (*bench.layers, *bench.smoke_layers) if layer.name == job.layer)
        check(bench, layer, zipf=False, device=machine.device)
        return
    from benchmarks.gpu import layers
    from train.backends import choose_backends
    from train.config import Layout, load_config
    from train.engine import LocalMesh
    from train.works import bank_works

    if job.kind == "attention":
        of = layers.subject(job.name, machine)
        layers.choose(of, machine)
        for name in of.serving(machine)[: None if machine.measures else 1]:
            layers.check(of, dict.fromkeys(of.banks, name), machine)
        return
    sets = ["run.dir=/nonexistent", f"run.device={machine.device.type}"]
    config = load_config(ROOT / f"configs/{job.name}.yaml", sets)
    works = bank_works(config, Layout(ep_size=1, node_size=1), {}, processes=1)
    first = {path: of_bank for path, of_bank in works.items() if path.startswith("layers.0.")}
    choose_backends(config, first, LocalMesh(machine.device))


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile what the GPU benchmarks launch.")
    parser.add_argument("part", choices=(*OPS, "model"))
    parser.add_argument("--smoke", action="store_true", help="the tiny forms, on a CPU")
    args = parser.parse_args()
    found, failed, began = jobs(args.part, smoke=args.smoke), 0, time.perf_counter()
    processes = 1 if args.smoke else min(PROCESSES, os.cpu_count() or 1)
    # spawn: CUDA cannot be used in a fork
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(work, job, smoke=args.smoke): job for job in found}
        for done in as_completed(waiting):
            job, (seconds, error) = waiting[done], done.result()
            failed += bool(error)
            print(
                f"{job.kind} {job.name} {job.layer}: {seconds:.1f} s {'FAILED' if error else ''}".rstrip(), flush=True
            )
            print(error, end="", file=sys.stderr, flush=True)
    print(f"compiled and checked {len(found) - failed} of {len(found)} in {time.perf_counter() - began:.1f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
