"""The fastest of a few configurations of a kernel, measured once for each class of sizes, and kept.

Owns: the measurement, what was decided, and when a clock may decide at all. Does not own: the configurations (each kernel.py), where
decisions are kept between runs (train/kernels_file.py).
Called by: the launching functions of kernel.py; train/backends.py, train/kernels_file.py.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TypeVar, cast

import torch

from kernels.availability import interpreted

Config = TypeVar("Config", bound=Hashable)
MAX_CONFIGS = 4  # each one is compiled and timed at its first use: about half a second
_decided: dict[str, int] = {}  # by device, compilers, configurations, kernel and sizes: the number of the configuration
_measuring = False


def fastest(
    configs: Sequence[Config], launch: Callable[[Config], object], *, key: Hashable, device: torch.device
) -> Config:
    """The configuration whose `launch` takes the least time on this device; the first one where none can be measured.

    key: the kernel and its sizes, rounded by `rounded`: a new sequence length must not measure again. Launching twice must be harmless.
    Nothing is measured without a GPU, while a CUDA graph is recorded, and under torch.use_deterministic_algorithms outside `measuring`:
    a clock would decide in which order a kernel adds, in the middle of a run that is to be repeated. What was decided before holds,
    for the same device, configurations and `compilers`: others measure again. A number that was taken from elsewhere
    (`decide`) and is none of these is a RuntimeError.
    """
    if len(configs) > MAX_CONFIGS:
        raise ValueError(f"a kernel may have {MAX_CONFIGS} configurations, got {len(configs)}: leave some out")
    if device.type != "cuda" or interpreted():
        return configs[0]
    name = f"{torch.cuda.get_device_name(device)}, {compilers()}, tiles {_digest(tuple(configs))}: {key}"
    if name in _decided:
        if _decided[name] not in range(len(configs)):
            raise RuntimeError(
                f"the number of a configuration of {name} must be below {len(configs)}, but {_decided[name]} was kept: remove it where it "
                "is kept (a run's kernels.json), to have it measured again"
            )
        return configs[_decided[name]]
    must_repeat = torch.are_deterministic_algorithms_enabled() and not _measuring
    if must_repeat or torch.cuda.is_current_stream_capturing():
        return configs[0]
    from triton.testing import do_bench

    times = [cast(float, do_bench(lambda config=config: launch(config), warmup=5, rep=20)) for config in configs]
    _decided[name] = times.index(min(times))
    return configs[_decided[name]]


def compilers() -> str:
    """What beside the device changes a time or a tile on a GPU, for the names of both: torch, Triton, and whether fp32 products round to
    TF32, by torch's own switch. Not the driver: the kernels and torch's libraries come compiled for the device, whatever it is.
    """
    try:
        from triton import __version__ as triton
    except ModuleNotFoundError:
        triton = "missing"
    return f"torch {torch.__version__}, triton {triton}{', tf32' if torch.backends.cuda.matmul.allow_tf32 else ''}"


@cache
def _digest(configs: tuple[Hashable, ...]) -> str:
    """The same in every process, as a hash of Python's is not; kept, since every launch asks."""
    return hashlib.sha256(repr(configs).encode()).hexdigest()[:8]


@contextmanager
def measuring() -> Iterator[None]:
    """Inside, configurations are measured also where results must repeat: before a run's first step."""
    global _measuring
    before, _measuring = _measuring, True
    try:
        yield
    finally:
        _measuring = before


def decisions() -> dict[str, int]:
    """What was decided so far, to be kept; JSON takes it."""
    return dict(_decided)


def decide(kept: Mapping[str, int]) -> None:
    """Takes decisions of another process, or of an earlier one, in the place of all that were made here."""
    _decided.clear()
    _decided.update(kept)


def rounded(size: int) -> int:
    """The power of two nearest to a size by their ratio, at least 16: what a tuning key holds instead of a number of rows.

    Nearest, because most sizes are powers of two, and the copies that other ranks send are a little more or less than one: they have
    its tiles up to 41 % above and 29 % below. Rounded up, every other step would find no tiles for its size.
    """
    return max(16, 1 << (size * size).bit_length() // 2)
