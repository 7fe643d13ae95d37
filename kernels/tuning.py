"""The fastest of a few configurations of a kernel, measured once for each class of sizes.

Owns: the measurement and its cache. Does not own: the configurations (each kernel.py).
Called by: the launching functions of kernel.py.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar, cast

import torch

from kernels.availability import interpreted

Config = TypeVar("Config")
MAX_CONFIGS = 4  # each one is compiled and timed at its first use: about half a second
_BEST: dict[Hashable, object] = {}


def fastest(
    configs: Sequence[Config], launch: Callable[[Config], object], *, key: Hashable, device: torch.device
) -> Config:
    """The configuration whose `launch` takes the least time on this device; the first one where none can be measured.

    key: the kernel and its sizes, rounded by `rounded`: a new sequence length must not measure again. Launching twice
    must be harmless. Nothing is measured without a GPU, while a CUDA graph is recorded, and under
    torch.use_deterministic_algorithms: a clock would decide in which order a kernel adds.
    """
    if len(configs) > MAX_CONFIGS:
        raise ValueError(f"a kernel may have {MAX_CONFIGS} configurations, got {len(configs)}: leave some out")
    if device.type != "cuda" or interpreted() or torch.are_deterministic_algorithms_enabled():
        return configs[0]
    full_key = (key, torch.cuda.get_device_name(device))
    if full_key not in _BEST:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        from triton.testing import do_bench

        times = [cast(float, do_bench(lambda config=config: launch(config), warmup=5, rep=20)) for config in configs]
        _BEST[full_key] = configs[times.index(min(times))]
    return _BEST[full_key]  # type: ignore[return-value]


def rounded(size: int) -> int:
    """The power of two at or above a size, at least 16: what a tuning key holds instead of a number of rows."""
    return max(16, 1 << (size - 1).bit_length())
