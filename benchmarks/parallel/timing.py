"""Steps of several processes, timed in turn, and what is said of the times.

A step is one forward and backward pass; a rank's clock starts when all ranks are there, and the slowest rank counts. Owns neither what is
timed nor the table. `Step` and `in_turn` run on the workers, the rest in the script.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn

WARM_UP = 2  # steps of each that are not counted


@dataclass(frozen=True)
class Step:
    """forward(x) of `layer`, then its backward from `cotangent`; gradients begin as None, as after an optimizer step."""

    layer: nn.Module
    forward: Callable[[Tensor], Tensor]
    x: Tensor
    cotangent: Tensor

    def __call__(self) -> float:
        """Seconds on this rank."""
        self.x.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None
        dist.barrier()
        began = time.perf_counter()
        self.forward(self.x).backward(self.cotangent)
        return time.perf_counter() - began


def in_turn(steps: Mapping[str, Callable[[], float]], *, repetitions: int) -> dict[str, list[float]]:
    """Each step once, then each again: a busy moment of the machine hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(WARM_UP + repetitions):
        for name, step in steps.items():
            taken = step()
            if repetition >= WARM_UP:
                seconds[name].append(taken)
    return seconds


def slowest(of_ranks: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """The seconds of each repetition on the rank that took longest."""
    return {name: [max(one) for one in zip(*(rank[name] for rank in of_ranks), strict=True)] for name in of_ranks[0]}


def median_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """How many times longer the others took: the median over neighbours in time."""
    return statistics.median(other / mine for mine, other in zip(seconds, others, strict=True))


def as_milliseconds(seconds: Sequence[float]) -> str:
    """Median, and half the distance of the quartiles."""
    low, median, high = statistics.quantiles(seconds, n=4)
    return f"{median * 1e3:.1f} ± {(high - low) / 2 * 1e3:.1f} ms"
