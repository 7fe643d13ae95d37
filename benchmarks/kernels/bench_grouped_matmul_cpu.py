"""How fast each backend of grouped_matmul is on this CPU, beside one dense matmul of the same FLOPs.

Owns: shapes, timing and the table. It checks every backend against the reference in float64 first (output, gradients),
and prints no number if one is wrong. Does not own: what "auto" means (`choose_backend`, which follows this table).
Called by: anyone, from the root of the clone: `python -m benchmarks.kernels.bench_grouped_matmul_cpu > FILE.md`;
bench_grouped_matmul.py calls it where there is no GPU.
"""

import argparse
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.kernel_bench import Function, Inputs, with_gradients
from kernels.grouped_matmul import grouped_matmul
from kernels.grouped_matmul.cpu import why_not_torch
from kernels.grouped_matmul.reference import reference

BACKENDS = ("torch", "loop")
DTYPES = (torch.float32, torch.bfloat16)
WARM_UP = 2  # calls that are not counted
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the largest element of the reference


@dataclass(frozen=True)
class Shape:
    """`rows` routed copies over `groups` experts, each width_in x width_out."""

    name: str
    rows: int
    width_in: int
    width_out: int
    groups: int


HEADER = """# grouped_matmul on CPU

- command: `python -m benchmarks.kernels.bench_grouped_matmul_cpu{arguments}`
- python {python}, torch {torch}, {cores} cores, {capability}
- load of the machine before and after: {before:.1f} and {after:.1f} (processes that want a core)
- milliseconds: median ± half the distance of the quartiles; in brackets the ratio to the dense matmul of the same FLOPs
  (median of the ratios of neighbouring calls), and TFLOP/s

| case | rows x in -> out | dtype | threads | pass | calls | dense | torch | loop |
|---|---|---|---|---|---|---|---|---|"""

SHAPES = (
    Shape("tiny_cpu, MLP up", 8192, 128, 64, 16),
    Shape("tiny_cpu, MLP down", 8192, 64, 128, 16),
    Shape("tiny_cpu, V", 8192, 128, 32, 8),
    Shape("tiny_cpu, O", 8192, 32, 128, 8),
    Shape("d 412, 16 experts, k 2", 8192, 412, 128, 16),
    Shape("d 412, 64 experts, k 4", 16384, 412, 128, 64),
    Shape("d 512, 16 experts, k 4", 16384, 512, 128, 16),
    Shape("d 512, 64 experts, k 4", 16384, 512, 128, 64),
)


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median, and half the distance between the quartiles; and the ratio to the dense matmul."""

    median: float
    spread: float
    ratio: float
    calls: int


def serving(shape: Shape, dtype: torch.dtype) -> list[str]:
    """The backends that can compute this shape in this dtype."""
    reason = why_not_torch(dtype, device_type="cpu", widths=(shape.width_in, shape.width_out))
    return [backend for backend in BACKENDS if backend != "torch" or reason is None]


def make_inputs(shape: Shape, dtype: torch.dtype) -> Inputs:
    """Groups of unequal size: the chance of the most likely expert is 4 times that of the least likely one."""
    generator = torch.Generator().manual_seed(0)
    chances_G = torch.linspace(0.4, 1.6, shape.groups)
    groups_R = torch.multinomial(chances_G, shape.rows, replacement=True, generator=generator)
    counts_G = torch.bincount(groups_R, minlength=shape.groups)
    rows_RM = torch.randn(shape.rows, shape.width_in, generator=generator)
    weights_GMN = torch.randn(shape.groups, shape.width_in, shape.width_out, generator=generator) / 8
    gradient_RN = torch.randn(shape.rows, shape.width_out, generator=generator)
    return Inputs((rows_RM, weights_GMN), gradient_RN, counts_G.cumsum(0, dtype=torch.int32)).to(dtype)


def by(backend: str) -> Function:
    return lambda inputs: grouped_matmul(*inputs.leaves, offsets_G=inputs.rest, backend=backend)


def dense(inputs: Inputs) -> Tensor:
    rows_RM, weights_1MN = inputs.leaves
    return rows_RM @ weights_1MN[0]


def check(shape: Shape, dtype: torch.dtype, backend: str) -> None:
    """Raises RuntimeError unless output and both gradients are those of the reference in float64."""
    inputs = make_inputs(shape, dtype)
    actual = with_gradients(by(backend), inputs)
    expected = with_gradients(lambda wide: reference(*wide.leaves, offsets_G=wide.rest), inputs.to(torch.float64))
    for name, tensor, wanted in zip(
        ("output", "gradient of rows", "gradient of weights"), actual, expected, strict=True
    ):
        error = ((tensor.double() - wanted).abs().max() / wanted.abs().max()).item()
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(
                f"the {backend} backend is wrong, so its time means nothing: {name} of {shape} in {dtype} is off by "
                f"{error:.1e} of the largest element, allowed is {TOLERANCE[dtype]:.0e}; run tests/kernels first"
            )


def candidates(shape: Shape, dtype: torch.dtype, *, backward: bool) -> dict[str, Callable[[], object]]:
    """What is timed, by name: a dense matmul of as many FLOPs, and each backend that serves this shape."""
    inputs = make_inputs(shape, dtype)
    rows_RM, weights_GMN = inputs.leaves
    one_matrix = replace(inputs, leaves=(rows_RM, weights_GMN.detach()[:1].clone().requires_grad_()))
    timed: dict[str, tuple[Function, Inputs]] = {"dense": (dense, one_matrix)}
    timed |= {backend: (by(backend), inputs) for backend in serving(shape, dtype)}
    if backward:
        return {name: partial(with_gradients, function, given) for name, (function, given) in timed.items()}
    return {name: torch.no_grad()(partial(function, given)) for name, (function, given) in timed.items()}


def time_all(functions: dict[str, Callable[[], object]], *, seconds: float) -> dict[str, Timing]:
    """Call every function in turn, so that a busy moment of the machine hits all of them, until the time is over."""
    durations: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(durations["dense"]) < WARM_UP + 5:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            durations[name].append(time.perf_counter() - start)
    timings = {}
    for name, all_values in durations.items():
        values = all_values[WARM_UP:]
        low, median, high = statistics.quantiles(values, n=4)
        ratio = statistics.median(
            value / dense for value, dense in zip(values, durations["dense"][WARM_UP:], strict=True)
        )
        timings[name] = Timing(median=median * 1e3, spread=(high - low) / 2 * 1e3, ratio=ratio, calls=len(values))
    return timings


def row(shape: Shape, dtype: torch.dtype, *, threads: int, backward: bool, seconds: float) -> str:
    torch.set_num_threads(threads)
    timings = time_all(candidates(shape, dtype, backward=backward), seconds=seconds)
    flops = 2 * shape.rows * shape.width_in * shape.width_out * (3 if backward else 1)
    dense = timings["dense"]
    cells = [shape.name, f"{shape.rows} x {shape.width_in} -> {shape.width_out}, G {shape.groups}"]
    cells += [str(dtype).removeprefix("torch."), str(threads), "fwd+bwd" if backward else "fwd"]
    cells.append(str(dense.calls))
    cells.append(f"{dense.median:.2f} ± {dense.spread:.2f}")
    for backend in BACKENDS:
        if timing := timings.get(backend):
            rate = flops / timing.median * 1e-9
            cells.append(f"{timing.median:.2f} ± {timing.spread:.2f} ({timing.ratio:.2f}x, {rate:.3f})")
        else:
            cells.append("width not a multiple of 16 bytes")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each line of the table (default 1.5)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()

    before = os.getloadavg()[0]
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        for backend in serving(shape, dtype):
            check(shape, dtype, backend)
    lines = []
    for threads, dtype, backward, shape in itertools.product(args.threads, DTYPES, (False, True), SHAPES):
        print(f"{threads} thread(s), {dtype}, {shape.name}", file=sys.stderr)
        lines.append(row(shape, dtype, threads=threads, backward=backward, seconds=args.seconds))
    load = {"before": before, "after": os.getloadavg()[0]}
    print(HEADER.format(arguments=" ".join(["", *sys.argv[1:]]), **versions(), **load))
    print("\n".join(lines))


def versions() -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


if __name__ == "__main__":
    main()
