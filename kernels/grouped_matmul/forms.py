"""The calls of grouped_matmul whose compiled code is watched: every tile of the forward pass, the first one of the backward.

Owns: that choice. Does not own: compiling and measuring (kernels/tools.py). Called by: benchmarks/kernels/compile_table.py.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.grouped_matmul.kernel import Rows, Tiles, backward, forward, launch_multiply, tiles_for
from kernels.tools import Form

C, R, P, G, M, N = 4096, 1024, 1024, 64, 512, 128  # an expert layer of published size, K = 4
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # fp16 is bf16 with another instruction


def _tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "rows": torch.empty(R, M, dtype=dtype),
        "weights": torch.empty(G, M, N, dtype=dtype),
        "gates": torch.empty(C),
        "offsets": torch.empty(G, dtype=torch.int32),
        "row_index": torch.empty(C, dtype=torch.int64),
        "output_index": torch.zeros(C, dtype=torch.int64),
        "gradient": torch.empty(P, N, dtype=dtype),
    }


def _forward(dtype: torch.dtype, tiles: Tiles) -> None:
    given = _tensors(dtype)
    rows = Rows(given["rows"], given["row_index"])
    launch_multiply(rows, given["weights"], given["offsets"], given["gates"], relu=True, tiles=tiles)


def _sum(dtype: torch.dtype) -> None:
    given = _tensors(dtype)
    forward(
        given["rows"], given["weights"], None, given["offsets"], None, given["output_index"][:R], P, False, False
    )  # the plainest matmul, and the sum


def _backward(dtype: torch.dtype, relu: bool) -> None:
    given = _tensors(dtype)
    given["row_index"].zero_()
    indices = given["row_index"], given["output_index"]
    options = (relu, False, True, True, True)
    backward(given["gradient"], given["rows"], given["weights"], given["gates"], given["offsets"], *indices, *options)


def _forms(name: str, dtype: torch.dtype) -> list[Form]:
    forms = [
        Form(f"{name} forward {tiles.rows} x {tiles.columns}", partial(_forward, dtype, tiles))
        for tiles in tiles_for(dtype)
    ]
    calls: dict[str, Callable[[], None]] = {
        f"{name} backward": partial(_backward, dtype, False),
        f"{name} backward, relu": partial(_backward, dtype, True),
    }
    backwards = [Form(each, launch, can_spill=True) for each, launch in calls.items()]
    return [*forms, Form(f"{name} plain, summed", partial(_sum, dtype)), *backwards]


FORMS = [form for name, dtype in DTYPES.items() for form in _forms(name, dtype)]
