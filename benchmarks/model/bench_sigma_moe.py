"""A whole sigma-MoE layer on a CPU beside a dense MLP of the same active FLOPs: forward and backward, 4,096 tokens, 2 threads.

Owns: the three shapes, their bars (time of the layer / time of the dense MLP) and the check that comes first. The two layers take steps in
turn, so that whatever else the machine does falls on both. Called by: anyone, from the root of the clone, `python -m
benchmarks.model.bench_sigma_moe` with the malloc settings of the Makefile in the environment: MALLOC_MMAP_MAX_=0,
MALLOC_TRIM_THRESHOLD_=1000000000000, MALLOC_TOP_PAD_=67108864. (Without them the pages of temporaries come from the system in every pass,
which falls on the layer alone.) It exits with 1 if a bar is missed, and prints nothing on stdout if the layer is wrong.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from model.context import BatchContext
from model.feedforward_config import DenseMLPConfig, SigmaMoEConfig
from model.parameters import materialize
from model.section import LayerSection, Place

ROWS, LENGTH, THREADS, WARM_UP, TURNS = 8, 512, 2, 2, 5


@dataclass(frozen=True)
class Case:
    """bar: at most this many times the dense layer's time."""

    d_model: int
    num_experts: int
    top_k: int
    dtype: torch.dtype
    bar: float
    expert_dim: int = 128

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name}, d {self.d_model}, {self.num_experts} experts of {self.expert_dim}, k {self.top_k}"


CASES = (
    Case(412, 16, 2, torch.float32, 1.6),
    Case(412, 64, 4, torch.float32, 2.4),
    Case(512, 16, 4, torch.bfloat16, 2.8),
)


def build(section: LayerSection, d_model: int, backend: str) -> Any:
    layer = section.build(Place(d_model, 16, 0, ("switchhead",) * 16, backend, 0.0))
    materialize(layer, seed=1)
    return layer


def sections(case: Case) -> tuple[LayerSection, LayerSection]:
    """The layer and its dense twin, whose hidden width is that of the active experts."""
    sizes = {"num_experts": case.num_experts, "expert_dim": case.expert_dim, "top_k": case.top_k}
    dense = DenseMLPConfig.model_validate({"hidden_dim": case.top_k * case.expert_dim})
    return SigmaMoEConfig.model_validate(sizes | {"entropy_weight": 0.0}), dense


def step_of(layer: Any, case: Case) -> Callable[[], torch.Tensor]:
    x = torch.randn(ROWS, LENGTH, case.d_model, generator=torch.Generator().manual_seed(2)).requires_grad_()
    context = BatchContext(torch.arange(ROWS), None, 1, 0)

    def step() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == torch.bfloat16):
            y = layer(x, context).y_BSD
        y.backward(torch.ones_like(y))
        return y.detach().float()

    return step


def seconds(step: Callable[[], torch.Tensor]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def ratio(case: Case) -> tuple[float, float, float]:
    """Medians: the layer's time over its neighbour's, the layer's milliseconds, the dense layer's."""
    moe, dense = sections(case)
    steps = [step_of(build(section, case.d_model, "torch"), case) for section in (moe, dense)]
    wanted, found = step_of(build(moe, case.d_model, "reference"), case)(), steps[0]()
    error = float((found - wanted).abs().max() / wanted.abs().max())
    if error > (1e-5 if case.dtype == torch.float32 else 2e-2):
        raise RuntimeError(
            f"{case}: the layer must equal its reference, but is off by {error:.1e} of the largest value"
        )
    for step in steps * WARM_UP:
        step()
    turns = [(seconds(steps[0]), seconds(steps[1])) for _ in range(TURNS)]
    ours, theirs = (statistics.median(column) * 1000 for column in zip(*turns, strict=True))
    return statistics.median(one / other for one, other in turns), ours, theirs


def main() -> int:
    torch.set_num_threads(THREADS)
    found = [(case, *ratio(case)) for case in CASES]
    print(f"# sigma-MoE on a CPU: {ROWS * LENGTH:,} tokens, {THREADS} threads, torch {torch.__version__}\n")
    print("| layer | ms | dense MLP, ms | ratio | bar | |\n|---|---|---|---|---|---|")
    for case, times, ours, theirs in found:
        met = "met" if times <= case.bar else "**missed**"
        print(f"| {case} | {ours:.1f} | {theirs:.1f} | {times:.2f} | at most {case.bar} | {met} |")
    return int(any(times > case.bar for case, times, *_ in found))


if __name__ == "__main__":
    sys.exit(main())
