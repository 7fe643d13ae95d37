"""Times of GPU work, and what every GPU benchmark says about them: hardware, speeds, medians, met or missed, profiles.

Owns these and no benchmark. On a CPU nothing is timed: `Machine.measures` is false, and a benchmark then shows that it runs.
Called by: benchmarks/gpu/kernel_bench.py, benchmarks/gpu/layers.py and benchmarks/gpu/training.py. It does not import triton, so that
a benchmark can first choose the interpreter.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CALLS, WARM_UP = 30, 5
NOT_MEASURED = "not measured"
LEAST_QUEUED = 2.5  # milliseconds
CYCLES = 2_000_000  # of a millisecond; an H100 and an H200 run at no more than 1.98 GHz, so a sleep is never shorter than it is asked for
# A call that takes the host longer waits for the device, where a long sleep before it helps nothing: 30 calls behind twice their host
# time took a form of 0.2 s, which reads a flag back, 19 s for each row of a table.
WAITS, FEW_CALLS = 20.0, 10  # milliseconds; the calls of such a function
QUEUE_NOTE = (
    f"each call is launched while the GPU sleeps, for {LEAST_QUEUED} ms or twice the call's host time, whichever is longer, so that its "
    "kernels are timed and not their launches. host: milliseconds in which the host makes a call with nothing queued, median of the "
    f"{WARM_UP} warm-up calls; work that is not queued takes at least so long. A call of more than {WAITS:.0f} ms of the host, which as a "
    f"rule waits for the GPU, is made {FEW_CALLS} times, behind a sleep of {2 * WAITS:.0f} ms"
)


@dataclass(frozen=True)
class Speeds:
    """What a GPU could do: FLOP/s of bf16 products without sparsity, bytes/s of its memory."""

    flops: float
    bandwidth: float


# By the full names of torch, SXM parts all: H100 PCIe, H100 NVL and H200 NVL are slower.
KNOWN = {"NVIDIA H100 80GB HBM3": Speeds(989e12, 3.35e12), "NVIDIA H200": Speeds(989e12, 4.8e12)}


@dataclass(frozen=True)
class Machine:
    """Where a benchmark runs. measures: false for the small form on a CPU, whose times would mean nothing."""

    device: torch.device
    name: str

    @property
    def measures(self) -> bool:
        return self.device.type == "cuda"

    @property
    def cache_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).L2_cache_size if self.measures else 0


def find_machine(*, smoke: bool) -> Machine:
    """The CPU for `smoke`, else the GPU that is here; RuntimeError if there is none."""
    if smoke:
        return Machine(torch.device("cpu"), "no GPU: a small form on the CPU, which proves that it runs")
    if not torch.cuda.is_available():
        raise RuntimeError(
            "a GPU benchmark needs a GPU, but torch sees none: run it on a machine with one, or see its small form with --smoke"
        )
    return Machine(torch.device("cuda", 0), torch.cuda.get_device_name())


def add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    """What `speeds_of` is given."""
    parser.add_argument("--peak-tflops", type=float, help="of bf16 products, for a GPU that is not known here")
    parser.add_argument("--bandwidth-gb", type=float, help="of the GPU's memory, in GB/s")


def speeds_of(machine: Machine, args: argparse.Namespace) -> Speeds:
    """What is given, else what is known of a GPU of this name (of an H100 for the small form); ValueError if nothing is."""
    if args.peak_tflops and args.bandwidth_gb:
        return Speeds(args.peak_tflops * 1e12, args.bandwidth_gb * 1e9)
    name = machine.name if machine.measures else next(iter(KNOWN))
    if name not in KNOWN:
        raise ValueError(
            f"the speeds of the GPU must be known, but {name} is none of {', '.join(KNOWN)}: pass --peak-tflops and --bandwidth-gb"
        )
    return KNOWN[name]


def commit() -> str:
    """SWITCHYARD_COMMIT where it is set (a copy of the tree may have no .git), else what git says."""
    if named := os.environ.get("SWITCHYARD_COMMIT"):
        return named
    return _output("git", "describe", "--always", "--dirty") or "unknown"


def _output(*command: str) -> str:
    """What a program prints, "" where there is none."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def header(machine: Machine, *, title: str, notes: Sequence[str], columns: Sequence[str]) -> str:
    """What stands above the rows of a result: what, where, by which code and command, and the names of the columns."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    module = sys.modules["__main__"].__spec__
    command = " ".join(["python -m", module.name if module else Path(sys.argv[0]).name, *sys.argv[1:]])
    lines = [
        f"# {title}",
        "",
        f"- hardware: {machine.name}",
        f"- commit {commit()}, python {platform.python_version()}, torch {versions['torch']}, triton {versions['triton']}",
        f"- command: `{command}`",
        *(f"- {note}" for note in notes),
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    return "\n".join(lines)


def num_sets(bytes_of_one: int, machine: Machine, *, functions: int = 1) -> int:
    """So many input sets that a call finds nothing of its inputs in the L2 cache; a multiple of the functions that share them.

    Function i of n takes set (turn + i * count / n) % count: at least count - 2 calls lie between two uses of a set, on other sets.
    """
    enough = 3 + 2 * machine.cache_bytes // bytes_of_one
    return -(-enough // functions) * functions


@dataclass(frozen=True)
class Times:
    """Milliseconds of calls. gpu: of their kernels; host: of the warm-up calls, until the host had launched them."""

    gpu: Sequence[float]
    host: Sequence[float]


def time_all(functions: Mapping[str, Callable[[int], object]], *, calls: int = CALLS) -> dict[str, Times]:
    """All functions in turn, so that a slow moment of the GPU hits all of them.

    A function is given the number of its turn, by which it chooses among its input sets; warm-up calls have negative ones. One whose
    host time is above WAITS has FEW_CALLS turns.
    """
    host: dict[str, list[float]] = {name: [] for name in functions}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in functions}
    for turn in range(-WARM_UP, calls):
        for name, function in functions.items():
            if turn < 0:
                torch.cuda.synchronize()
                began = time.perf_counter()
                function(turn)
                host[name].append(1e3 * (time.perf_counter() - began))
                continue
            took = statistics.median(host[name])
            if took > WAITS and turn >= FEW_CALLS:
                continue
            # Work that is queued before, so that what is timed are the kernels and not their launches.
            torch.cuda._sleep(int(CYCLES * max(LEAST_QUEUED, 2 * min(took, WAITS))))
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            events[name].append((start, end))
            start.record()
            function(turn)
            end.record()
        torch.cuda.synchronize()
    return {
        name: Times([start.elapsed_time(end) for start, end in pairs], host[name]) for name, pairs in events.items()
    }


def run_once(functions: Mapping[str, Callable[[int], object]]) -> dict[str, Times]:
    """What stands for `time_all` on a CPU: each function is called, nothing is measured."""
    for function in functions.values():
        function(0)
    return {name: Times((), ()) for name in functions}


def hosts(times: Iterable[Times]) -> str:
    """The median of each, in one cell."""
    return " / ".join(f"{statistics.median(each.host):.2f}" if each.host else "-" for each in times)


def milliseconds(values: Sequence[float]) -> str:
    """Median ± half the distance of the quartiles."""
    if not values:
        return NOT_MEASURED
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.3f} ± {(high - low) / 2:.3f}"


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


@dataclass(frozen=True)
class Bar:
    """What a measured number must reach, the limit included. percent: how it is printed."""

    what: str
    kind: str  # "at least" or "at most"
    limit: float
    percent: bool = False

    def show(self, number: float) -> str:
        return f"{number:.0%}" if self.percent else f"{number:.2f}"

    def met(self, number: float) -> bool:
        return number >= self.limit if self.kind == "at least" else number <= self.limit

    def verdict(self, found: Mapping[str, float | None]) -> str:
        """One line: met or missed, how often, and every figure."""
        numbers = {name: number for name, number in found.items() if number is not None}
        start = f"- bar: {self.what} {self.kind} {self.show(self.limit)}"
        if not numbers:
            return f"{start}: {NOT_MEASURED}"
        good = sum(self.met(number) for number in numbers.values())
        word = "met" if good == len(numbers) else f"**missed** ({good} of {len(numbers)} reach it)"
        figures = "; ".join(f"{name} {self.show(number)}" for name, number in numbers.items())
        return f"{start}: {word}. {figures}"


def profile(function: Callable[[], object], machine: Machine, *, title: str, most: int = 15) -> str:
    """A table of the kernels of one call after a warm one: name, launches, microseconds, share of all. On a CPU: of operators."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if machine.measures else [])]
    function()
    with torch.profiler.profile(activities=activities) as recorded:
        function()
        if machine.measures:
            torch.cuda.synchronize()
    found = []
    for event in recorded.key_averages():
        if machine.measures and not str(event.device_type).endswith("CUDA"):
            continue
        time = event.self_device_time_total if machine.measures else event.self_cpu_time_total
        found.append((time, event.count, event.key))
    found.sort(reverse=True)
    total = sum(time for time, *_ in found) or 1.0
    lines = [
        f"## {title}",
        "",
        f"{total:,.0f} us in all",
        "",
        "| kernel | launches | us | share |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{name[:100]}` | {count} | {time:,.1f} | {time / total:.1%} |" for time, count, name in found[:most]]
    return "\n".join(lines) + "\n\n"


def describe() -> str:
    """What is here: GPU, driver, versions, commit."""
    lines = [f"commit {commit()}, python {platform.python_version()} ({sys.executable})"]
    for name in ("torch", "triton", "deepspeed", "megatron-core", "pydantic", "numpy"):
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name}: not installed")
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        lines.append(
            f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {facts.multi_processor_count} multiprocessors, L2 "
            f"{facts.L2_cache_size / 2**20:.0f} MiB, CUDA {torch.version.cuda}"
        )
        lines.append(_output("nvidia-smi", "--query-gpu=driver_version,clocks.sm,temperature.gpu", "--format=csv"))
    else:
        lines.append("no GPU that torch sees")
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe())
