"""The calls of top_k_attention whose compiled code is watched: each dtype that computes differently, narrow and wide heads, and a mask
of ranges.

Owns: that choice. Does not own: compiling and measuring (kernels/tools.py). Called by: benchmarks/kernels/compile_table.py.

The backward pass may spill: it holds two accumulators of a tile beside the scores and their gradient.
"""

import torch
from torch import Tensor

from kernels.tools import Form
from kernels.top_k_attention.kernel import Chosen, backward, forward

LENGTH, TOP_K = 4096, 64
OPTIONS = {"scale": 0.125, "precision": "ieee"}


def _inputs(dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(2, 4, LENGTH, width, dtype=dtype) for _ in range(3))  # type: ignore[return-value]


def _first(ranges: bool) -> Tensor | None:
    return torch.zeros(2, LENGTH, dtype=torch.int32) if ranges else None


def launch_forward(dtype: torch.dtype, width: int, *, ranges: bool = False) -> None:
    forward(*_inputs(dtype, width), _first(ranges), top_k=TOP_K, **OPTIONS)


def launch_backward(dtype: torch.dtype, width: int, *, ranges: bool = False) -> None:
    numbers = torch.empty(2, 4, LENGTH)
    chosen = Chosen(numbers, numbers, numbers.int())
    given = _inputs(dtype, width)
    backward(torch.empty_like(given[2]), *given, torch.empty_like(given[2]), chosen, _first(ranges), **OPTIONS)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = {
    "bf16, C 64": {"dtype": BF16, "width": 64},
    "bf16, C 64, ranges": {"dtype": BF16, "width": 64, "ranges": True},
    "bf16, C 128": {"dtype": BF16, "width": 128},
    "fp16, C 76": {"dtype": FP16, "width": 76},
    "fp32, C 64": {"dtype": FP32, "width": 64},
}

FORMS = [
    *(Form(f"forward, {name}", lambda shape=shape: launch_forward(**shape)) for name, shape in SHAPES.items()),
    *(Form(f"backward, {name}", lambda shape=shape: launch_backward(**shape), can_spill=True) for name, shape in SHAPES.items()),
]  # fmt: skip
