"""sum_copies in Triton: a program owns a block of rows and columns and adds their copies one after the other, in the order of order_C.

Letters: C copies, P rows, N columns; BLOCK_P x BLOCK_N of them in one program.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false
# A launch passes numbers where a kernel declares tl.constexpr, and options of the compiler that it does not declare.

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_P, BLOCK_N = 16, 128  # 16 rows wait for each other's last copy; most rows have equally many


@triton.jit(do_not_specialize=["P"])
def sum_kernel(
    copies_ptr, order_ptr, ends_ptr, sums_ptr, P, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    column_blocks: tl.constexpr = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    p = (program // column_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = (program % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(ends_ptr + p - 1, mask=(p > 0) & (p < P), other=0)
    end = tl.load(ends_ptr + p, mask=p < P, other=0)
    count = tl.where(p < P, end - start, 0)
    sums = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for j in range(tl.max(count, axis=0)):
        copy = tl.load(order_ptr + start + j, mask=j < count, other=0).to(tl.int64)
        inside = (j < count)[:, None] & (n < N)[None, :]
        sums += tl.load(copies_ptr + copy[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    place = p.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(sums_ptr + place, sums.to(sums_ptr.dtype.element_ty), mask=(p < P)[:, None] & (n < N)[None, :])


@torch.library.custom_op("switchyard::sum_copies", mutates_args=())
def add(copies_CN: Tensor, order_C: Tensor, ends_P: Tensor) -> Tensor:
    """sums_PN of contiguous copies, each row's in the order of order_C."""
    sums_PN = _empty(copies_CN, order_C, ends_P)
    P, N = sums_PN.shape
    if sums_PN.numel():
        grid = (triton.cdiv(P, BLOCK_P) * triton.cdiv(N, BLOCK_N),)
        sum_kernel[grid](copies_CN, order_C, ends_P, sums_PN, P, N=N, BLOCK_P=BLOCK_P, BLOCK_N=BLOCK_N)
    return sums_PN


@add.register_fake
def _empty(copies_CN: Tensor, order_C: Tensor, ends_P: Tensor) -> Tensor:
    return copies_CN.new_empty(len(ends_P), copies_CN.shape[1])
