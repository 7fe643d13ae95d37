"""The calls of peer_experts and peer_products whose compiled code is watched: the dtypes of rows and tables that differ, widths of whole
rows and of a slice of columns, every tile, both passes, and the gradient of a table with and without Adam.

Owns: that choice. Does not own: compiling and measuring (kernels/tools.py). Called by: benchmarks/kernels/compile_table.py.
"""

from functools import partial

import torch
from torch import Tensor

from kernels.peer_experts.kernel import backward, forward
from kernels.tables.adam import RowAdam
from kernels.tables.by_entry import add_runs
from kernels.tables.by_row import products, products_tiles, sums_tiles, weighted_sums
from kernels.tools import Form

NUM_COPIES, NUM_ROWS, NUM_ENTRIES = 8192, 64, 1024
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _inputs(width: int, rows: torch.dtype, tables: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty(NUM_ROWS, width, dtype=rows), torch.empty(NUM_ENTRIES, width, dtype=tables)


def _numbers() -> Tensor:
    return torch.empty(NUM_COPIES)


def _index() -> Tensor:
    return torch.empty(NUM_COPIES, dtype=torch.int64)


def _entries(rows: torch.dtype) -> Tensor:
    """Of 32 bits beside fp32, so that both widths are compiled."""
    return torch.empty(NUM_COPIES, dtype=torch.int32 if rows == FP32 else torch.int64)


def _ends() -> Tensor:
    return torch.empty(NUM_ROWS, dtype=torch.int32)


def launch_forward(width: int, rows: torch.dtype, tables: torch.dtype, *, relu: bool = False) -> None:
    rows_RD, table_LD = _inputs(width, rows, tables)
    ends = _ends()
    forward(
        rows_RD, table_LD, table_LD, _numbers(), entry_C=_entries(rows), row_ends_R=ends, output_ends_P=ends, relu=relu
    )  # fmt: skip


def launch_backward(width: int, rows: torch.dtype, tables: torch.dtype, *, relu: bool = False) -> None:
    gradient_PD, table_LD = _inputs(width, rows, tables)
    ends = _ends()
    backward(
        gradient_PD, table_LD, table_LD, _numbers(), _numbers(), entry_C=_entries(rows), row_ends_R=ends, output_ends_P=ends, relu=relu,
        dtype=rows,
    )  # fmt: skip


def launch_tiles(number: int) -> None:
    rows_RD, table_LD = _inputs(1024, BF16, BF16)
    products(rows_RD, table_LD, _index(), _ends(), tiles=products_tiles(table_LD, NUM_COPIES // NUM_ROWS)[number])
    if number < len(sums_tiles(table_LD)):
        weighted_sums(table_LD, _numbers(), _index(), _ends(), dtype=BF16, tiles=sums_tiles(table_LD)[number])


def launch_table(width: int, rows: torch.dtype, tables: torch.dtype, *, adam: bool = False) -> None:
    rows_RD, table_LD = _inputs(width, rows, tables)
    copies = (_index(), _numbers(), _entries(rows), torch.empty(NUM_COPIES, dtype=torch.int32))
    found = RowAdam.zeros(table_LD, lr=1e-3) if adam else None
    add_runs(rows_RD, *copies, table_LD, state=found.state if found else (), settings=found.settings if found else ())


FORMS = [
    Form("forward, bf16, D 1024", partial(launch_forward, 1024, BF16, BF16)),
    Form("forward, bf16, tables fp32, D 1024, relu", partial(launch_forward, 1024, BF16, FP32, relu=True)),
    Form("forward, fp16, D 2048", partial(launch_forward, 2048, FP16, FP16)),
    Form("forward, fp32, D 412", partial(launch_forward, 412, FP32, FP32)),
    Form("forward, bf16, D 1001", partial(launch_forward, 1001, BF16, BF16)),
    Form("forward, bf16, 128 columns", partial(launch_forward, 128, BF16, BF16)),
    *(Form(f"products and sums, bf16, D 1024, tiles {number}", partial(launch_tiles, number)) for number in (1, 2, 3)),
    Form("backward, bf16, D 1024", partial(launch_backward, 1024, BF16, BF16)),
    Form("backward, fp32, D 412, relu", partial(launch_backward, 412, FP32, FP32, relu=True)),
    Form("table gradient, bf16, D 1024", partial(launch_table, 1024, BF16, BF16)),
    Form("table gradient, fp32, D 412", partial(launch_table, 412, FP32, FP32)),
    Form("Adam, bf16, tables fp32, D 1024", partial(launch_table, 1024, BF16, FP32, adam=True), can_spill=True),
]
