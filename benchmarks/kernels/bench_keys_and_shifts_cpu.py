"""How long the torch backends of product_key_topk and shift_mix take on one thread of this CPU, beside the plain forms.

Owns: sizes, timing and the table. It checks output and gradients against the reference in float64 first, and prints no number if one is
wrong. Does not own: inputs and plain forms (bench_product_key_topk.py, bench_shift_mix.py).
Called by: those two, where there is no GPU; `python -m benchmarks.kernels.bench_keys_and_shifts_cpu`.
"""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.gpu.kernel_bench import Bench, check, with_gradients
from benchmarks.gpu.timing import commit
from benchmarks.kernels import bench_product_key_topk, bench_shift_mix
from benchmarks.kernels.bench_product_key_topk import Layer as Choice
from benchmarks.kernels.bench_shift_mix import Layer as Mix

CALLS, WARM_UP = 7, 1
CASES: list[tuple[Bench, Choice | Mix, str, str]] = [
    (bench_product_key_topk.BENCH, Choice("4 heads, K 8 of 256^2, 2,048 tokens", 2048, 4, 8, 256, 64, True), "whole", "chunks"),
    (bench_product_key_topk.BENCH, Choice("8 heads, K 16 of 1024^2, 2,048 tokens", 2048, 8, 16, 1024, 64, True), "whole", "chunks"),
    (bench_shift_mix.BENCH, Mix("8 x 256 x 412, shift 16", 8, 256, 412, 16), "operators", "blocks"),
    (bench_shift_mix.BENCH, Mix("8 x 1,024 x 1,024, shift 16", 8, 1024, 1024, 16), "operators", "blocks"),
]  # fmt: skip
HEADER = """# product_key_topk and shift_mix on a CPU

- command: `python -m benchmarks.kernels.bench_keys_and_shifts_cpu`; commit {commit}, python {python}, torch {torch}, one thread, float32
- milliseconds of CPU time: median of {calls} calls ± half the distance of the quartiles, both forms in turn

| op | case | pass | plain | backend torch | plain / torch |
|---|---|---|---|---|---|"""


def milliseconds(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return 1e3 * (time.process_time() - began)


def row(bench: Bench, layer: Choice | Mix, names: tuple[str, str], *, backward: bool) -> str:
    inputs = bench.make(layer, zipf=False, seed=0, device=torch.device("cpu")).to(torch.float32)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(WARM_UP + CALLS):
        for name in names:
            function = bench.functions[name]
            call = (lambda f=function: with_gradients(f, inputs)) if backward else (lambda f=function: f(inputs))
            times[name].append(milliseconds(call))
    cells = []
    for name in names:
        low, middle, high = statistics.quantiles(times[name][WARM_UP:], n=4)
        cells.append(f"{middle:.1f} ± {(high - low) / 2:.1f}")
    plain, ours = (statistics.median(times[name][WARM_UP:]) for name in names)
    return (
        f"| {bench.op} | {layer.name} | {'fwd+bwd' if backward else 'fwd'} | {' | '.join(cells)} | {plain / ours:.2f} |"
    )


def main() -> None:
    torch.set_num_threads(1)
    for bench, layer, _, ours in CASES:
        only = replace(bench, ours=(ours,))
        few = replace(layer, tokens=64) if isinstance(layer, Choice) else replace(layer, batch=1)
        check(only, few, zipf=False, device=torch.device("cpu"))
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    print(HEADER.format(commit=commit(), calls=CALLS, **versions), flush=True)
    for bench, layer, *names in CASES:
        for backward in (False, True):
            print(row(bench, layer, (names[0], names[1]), backward=backward), flush=True)


if __name__ == "__main__":
    main()
