"""The calls of top_k_attention whose compiled code is watched: each dtype that computes differently, narrow and wide heads with few and
with the most keys kept, whose search holds the most, a mask of ranges, and heads that share keys and values.

Owns: that choice. Does not own: compiling and measuring (kernels/tools.py). Called by: benchmarks/kernels/compile_table.py.

The backward pass may spill: it holds two accumulators of a tile beside the scores and their gradient.
"""

from functools import partial

import torch
from torch import Tensor

from kernels.tools import Form
from kernels.top_k_attention.kernel import Chosen, backward, forward

LENGTH = 4096
OPTIONS = {"scale": 0.125, "precision": "ieee"}


def _inputs(dtype: torch.dtype, width: int, sharing: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = (4, 4 // sharing, 4 // sharing)
    return tuple(torch.empty(2, each, LENGTH, width, dtype=dtype) for each in heads)  # type: ignore[return-value]


def _first(ranges: bool) -> Tensor | None:
    return torch.zeros(2, LENGTH, dtype=torch.int32) if ranges else None


def launch_forward(dtype: torch.dtype, width: int, *, ranges: bool = False, sharing: int = 1, top_k: int = 64) -> None:
    forward(*_inputs(dtype, width, sharing), _first(ranges), top_k=top_k, **OPTIONS)


def launch_backward(dtype: torch.dtype, width: int, *, ranges: bool = False, sharing: int = 1) -> None:
    numbers = torch.empty(2, 4, LENGTH)
    chosen = Chosen(numbers, numbers, numbers.int())
    given = _inputs(dtype, width, sharing)
    output = torch.empty_like(given[0])
    backward(output, *given, output, chosen, _first(ranges), **OPTIONS)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDE = {"dtype": BF16, "width": 128, "ranges": True, "sharing": 4}
FORMS = [
    Form("forward, bf16, C 64, top 64", partial(launch_forward, BF16, 64)),
    Form("forward, fp16, C 76, top 64", partial(launch_forward, FP16, 76)),
    Form("forward, bf16, C 128, ranges, shared, top 256", partial(launch_forward, **WIDE, top_k=256)),
    Form("forward, fp32, C 128, ranges, top 256", partial(launch_forward, FP32, 128, ranges=True, top_k=256)),
    Form("backward, bf16, C 64", partial(launch_backward, BF16, 64), can_spill=True),
    Form("backward, fp16, C 76", partial(launch_backward, FP16, 76), can_spill=True),
    Form("backward, bf16, C 128, ranges, shared", partial(launch_backward, **WIDE), can_spill=True),
    Form("backward, fp32, C 64", partial(launch_backward, FP32, 64), can_spill=True),
]
