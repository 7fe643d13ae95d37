"""The calls of expert_mlp whose compiled code is watched: each dtype that computes differently, hidden activations that a tile can
hold and that it cannot, with all that is optional and without.

Owns: that choice. Does not own: compiling and measuring (kernels/tools.py), the weights' gradients (kernels/grouped_matmul/forms.py).
Called by: benchmarks/kernels/compile_table.py.
"""

import torch
from torch import Tensor

from kernels.expert_mlp.kernel import backward, forward
from kernels.tools import Form

NUM_COPIES, NUM_ROWS, NUM_GROUPS = 4096, 1024, 16


def _inputs(dtype: torch.dtype, d_model: int, expert_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty(NUM_ROWS, d_model, dtype=dtype),
        torch.empty(NUM_GROUPS, d_model, expert_dim, dtype=dtype),
        torch.empty(NUM_GROUPS, expert_dim, d_model, dtype=dtype),
        torch.empty(NUM_COPIES),
    )


def _index() -> Tensor:
    return torch.empty(NUM_COPIES, dtype=torch.int64)


def _ends(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int32)


def launch_forward(dtype: torch.dtype, *, d_model: int, expert_dim: int, extras: bool = False) -> None:
    """extras: with factors, and the hidden activations kept."""
    forward(
        *_inputs(dtype, d_model, expert_dim), row_index_C=_index(), offsets_L=_ends(NUM_GROUPS),
        factors_CF=torch.empty(NUM_COPIES, expert_dim) if extras else None, keep_hidden=extras,
    )  # fmt: skip


def launch_backward(dtype: torch.dtype, *, d_model: int, expert_dim: int, extras: bool = False) -> None:
    rows_RD, up_LDF, down_LFD, gates_C = _inputs(dtype, d_model, expert_dim)
    hidden_CF = torch.empty(NUM_COPIES, expert_dim, dtype=dtype)
    backward(
        torch.empty_like(rows_RD), rows_RD, up_LDF, down_LFD, gates_C, row_index_C=_index(), output_index_C=_index(),
        offsets_L=_ends(NUM_GROUPS), factors_CF=torch.empty(NUM_COPIES, expert_dim) if extras else None,
        hidden_CF=hidden_CF if extras else None, of_rows=True,
    )  # fmt: skip


BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = {
    "bf16, D 412, F 128": {"dtype": BF16, "d_model": 412, "expert_dim": 128},
    "bf16, D 1024, F 128, factors, hidden kept": {"dtype": BF16, "d_model": 1024, "expert_dim": 128, "extras": True},
    "bf16, D 2048, F 256": {"dtype": BF16, "d_model": 2048, "expert_dim": 256},
    "bf16, D 2048, F 512": {"dtype": BF16, "d_model": 2048, "expert_dim": 512},
    "fp32, D 412, F 128": {"dtype": FP32, "d_model": 412, "expert_dim": 128},
    "fp32, D 128, F 64": {"dtype": FP32, "d_model": 128, "expert_dim": 64},
}

FORMS = [
    *(Form(f"forward, {name}", lambda shape=shape: launch_forward(**shape)) for name, shape in SHAPES.items()),
    *(Form(f"backward, {name}", lambda shape=shape: launch_backward(**shape)) for name, shape in SHAPES.items()),
    Form("forward, fp16, D 412, F 128", lambda: launch_forward(torch.float16, d_model=412, expert_dim=128)),
    Form("backward, fp16, D 412, F 128", lambda: launch_backward(torch.float16, d_model=412, expert_dim=128)),
]
