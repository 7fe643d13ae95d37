"""Work whose backend is chosen by a clock: which backends could do it, and how long each takes on this device.

Owns: the clock. Does not own: the work of expert banks (expert_choice.py) and of the other parts (part_choice.py), when it is measured
and what is kept (train/backends.py).
"""

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from kernels.tuning import measuring

PASSES, WARM_UP = 5, 2
Exchange = Literal[
    "tokens", "weights"
]  # what comes from other ranks: rows to the experts here, or all weights; None: nothing does


class Work(ABC):
    """What a part of a network does on one rank in a micro-step. `str` of it tells all that the time depends on."""

    @abstractmethod
    def candidates(self, device_type: str) -> Sequence[str]:
        """The backends that can do it, at least one, the likely fastest first."""

    @abstractmethod
    def work(self, backend: str, *, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
        """Each call is a forward and a backward pass: the output, and the gradients of what has some."""

    def seconds(self, backend: str, *, device: torch.device) -> float:
        """The median time of a forward and backward pass. The tiles of kernels are chosen in the first."""
        work = self.work(backend, device=device)
        with measuring():
            for _ in range(WARM_UP):
                work()
        times = []
        for _ in range(PASSES):
            _wait(device)
            began = time.perf_counter()
            work()
            _wait(device)
            times.append(time.perf_counter() - began)
        return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
