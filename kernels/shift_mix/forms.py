"""The calls of shift_mix whose compiled code is watched: each dtype that computes differently, each boundary, with and without documents,
factors for all channels and for each.

Owns: that choice. Does not own: compiling and measuring (kernels/tools.py). Called by: benchmarks/kernels/compile_table.py.
"""

from functools import partial

import torch
from torch import Tensor

from kernels.shift_mix.kernel import launch_backward, launch_mix, launch_step
from kernels.tools import Form

B, S, SHIFT = 8, 1024, 16


def _tensors(
    dtype: torch.dtype, width: int, factors: int, documents: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    first_BS = torch.empty(B, S, dtype=torch.int32) if documents else None
    return torch.empty(B, S, width, dtype=dtype), torch.empty(factors), torch.empty(factors), first_BS


def launch_forward(dtype: torch.dtype, width: int, *, factors: int, boundary: str, documents: bool) -> None:
    launch_mix(*_tensors(dtype, width, factors, documents), shifts=[SHIFT], boundary=boundary)


def launch_both_gradients(dtype: torch.dtype, width: int, *, factors: int, boundary: str, documents: bool) -> None:
    tensors = _tensors(dtype, width, factors, documents)
    launch_backward(
        torch.empty_like(tensors[0]), *tensors, shifts=[SHIFT], boundary=boundary, of_u=True, of_factors=True
    )


def launch_decoding(dtype: torch.dtype, width: int) -> None:
    ring_BRW, factors_X = torch.empty(B, SHIFT, width, dtype=dtype), torch.empty(1)
    launch_step(torch.empty(B, width, dtype=dtype), ring_BRW, factors_X, factors_X, place=3, source=3, boundary="zero")


BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = {
    "fp32, D 412, zero": (FP32, 412, {"factors": 1, "boundary": "zero", "documents": True}),
    "bf16, D 1024, zero": (BF16, 1024, {"factors": 1, "boundary": "zero", "documents": False}),
    "bf16, D 412, self, a factor for each channel": (
        BF16,
        412,
        {"factors": 412, "boundary": "self", "documents": True},
    ),
    "fp16, D 412, clamp": (torch.float16, 412, {"factors": 1, "boundary": "clamp", "documents": True}),
}

FORMS = [
    *(
        Form(f"forward, {name}", partial(launch_forward, dtype, width, **options))
        for name, (dtype, width, options) in SHAPES.items()
    ),
    *(
        Form(f"backward, {name}", partial(launch_both_gradients, dtype, width, **options), can_spill=True)
        for name, (dtype, width, options) in SHAPES.items()
    ),
    Form("step, fp32, D 412", partial(launch_decoding, FP32, 412)),
    Form("step, bf16, D 1024", partial(launch_decoding, BF16, 1024)),
]
