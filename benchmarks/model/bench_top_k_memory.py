"""How the memory of one causal attention layer grows with the length: forward and backward at S and at 2 S, each in a process of its own.

Owns: the processes, the measure and the bar (memory(2 S) / memory(S) <= 2.1 for attention in chunks, with and without top-k). Dense
softmax, which keeps its S x S matrices, and torch's fused attention stand beside them for comparison and have no bar.
With --gib it also looks for the longest S at which dense softmax stays within so much memory, and then shows that top-k attention at 8
times that length does (the second bar): minutes for --gib 0.5, 17 for --gib 8.
Called by: anyone, from the root of the clone: `python -m benchmarks.model.bench_top_k_memory`; it exits with 1 if a bar is missed. Linux.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.mask import KeyMask
from model.top_k_attention import top_k_attend

BAR = 2.1  # of memory(2 S) / memory(S)
TIMES_LONGER = 8  # than the longest row of dense softmax in the same memory
STEP = 64  # positions, in which a longest row is looked for
CASES = ("top_k", "chunks", "fused", "dense")
CASES_WITH_BAR = ("top_k", "chunks")
WARM_UP_LENGTH = 64  # loads the libraries and starts the threads before the baseline is read


@dataclass(frozen=True)
class Sizes:
    """One layer: `rows` sequences of `heads` heads, `width` channels each; chunks of `chunk` queries, `top_k` kept keys."""

    rows: int
    heads: int
    width: int
    chunk: int
    top_k: int


@dataclass(frozen=True)
class Measured:
    """Peak of forward and backward above the process before them (operands and gradients included), and how long they took."""

    mebibytes: float
    seconds: float


def attend(q: Tensor, k: Tensor, v: Tensor, *, case: str, sizes: Sizes) -> Tensor:
    length, scale = q.shape[2], sizes.width**-0.5
    mask = KeyMask(num_queries=length, num_keys=length, device=q.device)
    if case == "fused":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if case == "dense":
        return (q @ k.mT * scale).masked_fill(~mask.rows(0, length), -torch.inf).softmax(-1) @ v
    top_k = sizes.top_k if case == "top_k" else None
    return top_k_attend(q, k, v, mask=mask, top_k=top_k, chunk=sizes.chunk, scale=scale)


def forward_and_backward(case: str, length: int, sizes: Sizes) -> None:
    q, k, v = (torch.randn(sizes.rows, sizes.heads, length, sizes.width, requires_grad=True) for _ in range(3))
    y = attend(q, k, v, case=case, sizes=sizes)
    y.backward(torch.randn_like(y))


def resident(field: str) -> float:
    """MiB of this process from /proc: VmRSS now, VmHWM at its peak. (getrusage would also count the parent's peak.)"""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status must have a line {field}, but has none: run this on Linux")
    return int(found[1]) / 1024


def measure_here(case: str, length: int, sizes: Sizes) -> Measured:
    forward_and_backward(case, WARM_UP_LENGTH, sizes)
    before, start = resident("VmRSS"), time.perf_counter()
    forward_and_backward(case, length, sizes)
    return Measured(resident("VmHWM") - before, time.perf_counter() - start)


def measure(case: str, length: int, sizes: Sizes) -> Measured:
    """In a fresh process, whose large tensors go back to the system when they are freed, whatever this one's malloc was told."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(2**17)
    job = json.dumps({"case": case, "length": length, "sizes": asdict(sizes)})
    command = [sys.executable, "-m", "benchmarks.model.bench_top_k_memory", "--job", job]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Measured(**json.loads(done.stdout))


def longest_dense(sizes: Sizes, *, length: int, limit: float) -> tuple[int, Measured]:
    """The longest row, a multiple of STEP, that dense softmax does within `limit` MiB, and what it took; from a guess at `length`.

    Its memory is quadratic, so each measurement tells where to look next; one step more is measured to be too long.
    """
    measured: dict[int, Measured] = {}

    def fits(length: int) -> bool:
        if length not in measured:
            measured[length] = measure("dense", length, sizes)
        return measured[length].mebibytes <= limit

    for _ in range(3):
        fits(length)
        length = int(length * (limit / measured[length].mebibytes) ** 0.5) // STEP * STEP
    while fits(length + STEP):
        length += STEP
    while not fits(length):
        length -= STEP
    return length, measured[length]


def compare_lengths(sizes: Sizes, *, length: int, gib: float) -> bool:
    """Prints both and says whether top-k attention stays within `gib` GiB at TIMES_LONGER times the longest dense row."""
    dense_length, dense = longest_dense(sizes, length=length, limit=1024 * gib)
    longer = measure("top_k", TIMES_LONGER * dense_length, sizes)
    print(f"\nwithin {gib:g} GiB\n\n| case | S | MiB | seconds |\n|---|---|---|---|")
    print(f"| dense, its longest | {dense_length} | {dense.mebibytes:.0f} | {dense.seconds:.1f} |")
    print(
        f"| top_k, {TIMES_LONGER} times as long | {TIMES_LONGER * dense_length} | {longer.mebibytes:.0f} | {longer.seconds:.1f} |"
    )
    if met := longer.mebibytes <= 1024 * gib:
        times = TIMES_LONGER * 1024 * gib / longer.mebibytes
        print(
            f"\nby its memory, which is linear in S, top-k attention could do {times:.0f} times the longest dense row"
        )
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="S; 2 S is measured too")
    for name, default in asdict(Sizes(rows=1, heads=4, width=64, chunk=256, top_k=64)).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--gib", type=float, help="also compare the longest rows within so much memory")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    if given["job"]:
        job = json.loads(given["job"])
        print(json.dumps(asdict(measure_here(job["case"], job["length"], Sizes(**job["sizes"])))))
        return 0

    sizes, length = Sizes(**{name: given[name] for name in Sizes.__annotations__}), given["length"]
    print(f"one causal layer, float32, {sizes}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print(f"| case | MiB at {length} | MiB at {2 * length} | ratio | seconds |\n|---|---|---|---|---|")
    missed = []
    for case in given["cases"]:
        short, long = (measure(case, n, sizes) for n in (length, 2 * length))
        ratio = long.mebibytes / short.mebibytes
        seconds = f"{short.seconds:.2f}, {long.seconds:.2f}"
        print(f"| {case} | {short.mebibytes:.1f} | {long.mebibytes:.1f} | {ratio:.2f} | {seconds} |", flush=True)
        if case in CASES_WITH_BAR and ratio > BAR:
            missed.append(case)
    if missed:
        print(f"\nmemory(2 S) / memory(S) must be at most {BAR}, but is not for: {', '.join(missed)}", file=sys.stderr)
    if given["gib"] and not compare_lengths(sizes, length=2 * length, gib=given["gib"]):
        missed.append("top_k")
        print(
            f"\ntop-k attention must do {TIMES_LONGER} times the longest dense row, but needs more memory",
            file=sys.stderr,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
