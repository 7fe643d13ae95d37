"""The calls of switchhead_project whose compiled code is watched: every way in which the two kernels are launched, by their first tiles,
and all tiles of the forward pass at D 412, whose rows of 824 and 152 bytes can only be loaded 8 bytes at a time.

Owns: that choice. Does not own: compiling and measuring (kernels/tools.py). Called by: benchmarks/kernels/compile_table.py.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.switchhead_project.kernel import Projection, launch_outputs, launch_values, outputs_tiles, values_tiles
from kernels.tools import Form

T = 4096


@dataclass(frozen=True)
class Widths:
    """H heads of width C with E experts, K of them chosen."""

    heads: int
    experts: int
    choices: int
    d_model: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16

    def wide(self) -> Tensor:
        return torch.empty(T, self.d_model, dtype=self.dtype)

    def narrow(self) -> Tensor:
        return torch.empty(T, self.heads, self.head_dim, dtype=self.dtype)

    def projection(self, *, to_heads: bool) -> Projection:
        widths = (self.d_model, self.head_dim) if to_heads else (self.head_dim, self.d_model)
        weights = torch.empty(self.heads * self.experts, *widths, dtype=self.dtype)
        choices = (T, self.heads, self.choices)
        return Projection(weights, torch.empty(choices), torch.empty(choices, dtype=torch.int64), to_heads)


def launch_v(widths: Widths, *, tiles: int = 0) -> None:
    """tiles: which of those that are tried."""
    chosen = values_tiles(widths.dtype, head_dim=widths.head_dim)[tiles]
    launch_values(widths.wide(), widths.projection(to_heads=True), tiles=chosen)


def launch_o(widths: Widths, *, tiles: int = 0) -> None:
    launch_outputs(widths.narrow(), widths.projection(to_heads=False), tiles=outputs_tiles(widths.dtype)[tiles])


def launch_v_backward(widths: Widths) -> None:
    projection = widths.projection(to_heads=True)
    launch_outputs(widths.narrow(), projection)
    launch_values(widths.wide(), projection, values=False, other_THC=widths.narrow())


def launch_o_backward(widths: Widths) -> None:
    launch_values(widths.wide(), widths.projection(to_heads=False), other_THC=widths.narrow())


SMALL = "bf16, D 412, 2 x 76"
NAMED = {
    SMALL: Widths(2, 5, 2, 412, 76),  # 47M
    "bf16, D 1024, 4 x 112": Widths(4, 4, 2, 1024, 112),  # 262M and 1B
    "bf16, D 412, 2 x 132": Widths(2, 5, 3, 412, 132),
    "bf16, D 412, 10 x 41": Widths(10, 4, 1, 412, 41),
    "fp16, D 2048, 8 x 128": Widths(8, 8, 2, 2048, 128, torch.float16),
    "fp32, D 412, 2 x 76": Widths(2, 5, 2, 412, 76, torch.float32),
}

FORMS = [
    *(Form(f"V, {name}", partial(launch_v, widths)) for name, widths in NAMED.items()),
    *(Form(f"O, {name}", partial(launch_o, widths)) for name, widths in NAMED.items()),
    *(Form(f"V, {SMALL}, tiles {tiles}", partial(launch_v, NAMED[SMALL], tiles=tiles)) for tiles in (1, 2, 3)),
    *(Form(f"O, {SMALL}, tiles {tiles}", partial(launch_o, NAMED[SMALL], tiles=tiles)) for tiles in (1, 2)),
    *(
        Form(f"{part} backward, {name}", partial(call, NAMED[name]), can_spill=True)
        for name in (SMALL, "bf16, D 1024, 4 x 112", "fp32, D 412, 2 x 76")
        for part, call in (("V", launch_v_backward), ("O", launch_o_backward))
    ),
]
