"""The calls of grouped_matmul whose compiled code is watched: every tile of the forward pass, the first one of the backward.

Owns: that choice. Does not own: compiling and measuring (kernels/tools.py). Called by: benchmarks/kernels/compile_table.py.
"""

from functools import partial

import torch
from torch import Tensor

from kernels.grouped_matmul.kernel import Rows, Tiles, launch_multiply, launch_weight_gradient, tiles_for
from kernels.grouped_matmul.op import backward, forward
from kernels.tools import Form

C, R, P, G, M, N = 4096, 1024, 1024, 64, 512, 128  # an expert layer of published size, K = 4
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _tensors(dtype: torch.dtype, width: int = M, columns: int = N) -> dict[str, Tensor]:
    return {
        "rows": torch.empty(R, width, dtype=dtype),
        "weights": torch.empty(G, width, columns, dtype=dtype),
        "gates": torch.empty(C),
        "offsets": torch.empty(G, dtype=torch.int32),
        "row_index": torch.empty(C, dtype=torch.int64),
        "output_index": torch.empty(C, dtype=torch.int64),
        "order": torch.empty(C, dtype=torch.int32),
        "ends": torch.empty(P, dtype=torch.int32),
        "gradient": torch.empty(P, columns, dtype=dtype),
    }


def launch_forward(dtype: torch.dtype, tiles: Tiles | None = None, width: int = M) -> None:
    given = _tensors(dtype, width)
    rows = Rows(given["rows"], given["row_index"])
    launch_multiply(rows, given["weights"], given["offsets"], given["gates"], relu=True, tiles=tiles)


def launch_sum(dtype: torch.dtype) -> None:
    """The plainest matmul, and the sum."""
    given = _tensors(dtype)
    copies = given["output_index"][:R], given["order"][:R], given["ends"]
    forward(given["rows"], given["weights"], None, given["offsets"], None, *copies, None, None, False, False)


def launch_backward(dtype: torch.dtype, relu: bool, columns: int = N) -> None:
    given = _tensors(dtype, columns=columns)
    names = ("gradient", "rows", "weights", "gates", "offsets", "row_index", "output_index", "order", "ends")
    backward(*(given[name] for name in names), relu, False, True, True, True)


def launch_parts(dtype: torch.dtype) -> None:
    """A weight gradient of so few groups that the copies of each are cut into parts, at the width of the 47M model."""
    given = _tensors(dtype, 412)
    rows, gradient = Rows(given["rows"], torch.empty(8 * C, dtype=torch.int64)), torch.empty(8 * C, N, dtype=dtype)
    launch_weight_gradient(rows, Rows(gradient, None), given["offsets"][:8], None)


def _forms(name: str, dtype: torch.dtype) -> list[Form]:
    return [
        *(
            Form(f"{name} forward {tiles.rows} x {tiles.columns}", partial(launch_forward, dtype, tiles))
            for tiles in tiles_for(dtype)
        ),
        Form(f"{name} plain, summed", partial(launch_sum, dtype)),
        Form(f"{name} backward", partial(launch_backward, dtype, False), can_spill=True),
        Form(f"{name} backward, relu", partial(launch_backward, dtype, True), can_spill=True),
    ]


FORMS = [
    *(form for name, dtype in DTYPES.items() for form in _forms(name, dtype)),
    Form("bf16 forward, M 412", partial(launch_forward, torch.bfloat16, width=412)),
    Form("bf16 weights in parts", partial(launch_parts, torch.bfloat16), can_spill=True),
    Form("fp16 forward", partial(launch_forward, torch.float16)),
    Form("fp16 backward, N 412", partial(launch_backward, torch.float16, False, columns=412), can_spill=True),
]
