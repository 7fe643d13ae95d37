"""The calls of embedding_bag whose compiled code is watched; its table's gradient is among those of kernels/peer_experts/forms.py.

Owns: that choice. Does not own: compiling and measuring (kernels/tools.py). Called by: benchmarks/kernels/compile_table.py.
"""

from functools import partial

import torch

from kernels.tables.by_row import products, weighted_sums
from kernels.tools import Form

NUM_COPIES, NUM_ROWS, NUM_ENTRIES = 8192, 64, 1024
BF16, FP32 = torch.bfloat16, torch.float32


def launch_forward(width: int, tables: torch.dtype, dtype: torch.dtype) -> None:
    """dtype: of the result."""
    weighted_sums(
        torch.empty(NUM_ENTRIES, width, dtype=tables), torch.empty(NUM_COPIES), torch.empty(NUM_COPIES, dtype=torch.int64),
        torch.empty(NUM_ROWS, dtype=torch.int32), dtype=dtype,
    )  # fmt: skip


def launch_backward(width: int, tables: torch.dtype, dtype: torch.dtype) -> None:
    products(
        torch.empty(NUM_ROWS, width, dtype=dtype), torch.empty(NUM_ENTRIES, width, dtype=tables),
        torch.empty(NUM_COPIES, dtype=torch.int64), torch.empty(NUM_ROWS, dtype=torch.int32),
    )  # fmt: skip


FORMS = [
    Form("forward, bf16 of tables fp32, D 1024", partial(launch_forward, 1024, FP32, BF16)),
    Form("forward, fp32, D 288", partial(launch_forward, 288, FP32, FP32)),
    Form("backward, bf16 of tables fp32, D 1024", partial(launch_backward, 1024, FP32, BF16)),
]
