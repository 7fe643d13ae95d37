"""The sums over rows of a table that everything of PEER, PKM and Memory+ is made of, in torch alone: `dots` and `sums`.

Owns: how they are computed, and that rows of copies are gathered at most CHUNK_ELEMENTS at a time, or one row if it is wider. Results are
not cut: (bags, width), so with Adam the rows of the table that were read, and without it all, in the wide dtype before they are rounded.
Does not own: what they are used for, the equations of Adam (kernels/tables/adam.py). Called by: the cpu.py of kernels/peer_experts and
kernels/embedding_bag, forward and backward, without autograd.

Rows of the table may be narrower than float32 (bf16 where they were gathered under autocast); everything else is `wide`. Ways that were
measured and were slower are in docs/log.md. Shape letters: C copies, N rows, B bags, U rows of the table that were read, L all of them,
X any width.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.tables.adam import RowAdam

# 1 MiB of float32: what is read is in a core's second cache when it is used. 2**17 and 2**21 are 10 % slower.
CHUNK_ELEMENTS = 2**18


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where a tensor has it: what sums are taken in."""
    return torch.float64 if torch.float64 in {tensor.dtype for tensor in tensors} else torch.float32


def dots(left_NX: Tensor, left_C: Tensor, table_LX: Tensor, entry_C: Tensor) -> Tensor:
    """left[left_c] . table[entry_c] for each copy c, in the dtype of left, which is wide.

    On a CPU the bits of a product of up to 32,768 columns depend on nothing but its two rows, so not on how many ranks share the table;
    wider sums torch cuts up among threads, by how many copies there are.
    """
    products_C, size = left_NX.new_empty(len(entry_C)), _chunk_size(table_LX)
    per_row = _copies_per_row(left_C, len(left_NX))
    is_even = 0 < per_row <= size
    if is_even:  # on one process always: 6.0 ms where the other way takes 7.7, for 65,536 copies of 256 columns
        size -= size % per_row
    for part in _parts(len(entry_C), size):
        read_cX = _read(table_LX, entry_C[part]).to(left_NX.dtype)
        if is_even:
            rows = slice(part.start // per_row, part.stop // per_row)
            read_cX.view(-1, per_row, read_cX.shape[1]).mul_(left_NX[rows, None])
        else:
            read_cX.mul_(_read(left_NX, left_C[part]))
        products_C[part] = read_cX.sum(1)
    return products_C


def sums(table_LX: Tensor, entry_C: Tensor, weights_C: Tensor, ends_B: Tensor) -> Tensor:
    """The sum over each bag's copies of weight_c * table[entry_c], (B, X) in the dtype of the weights, which is wide.

    ends_B: the end of each bag's range of copies. A bag without copies is exactly zero. Copies are added in their order.
    """
    if table_LX.dtype == weights_C.dtype:
        return _bags(table_LX, entry_C, weights_C, F.pad(ends_B, (1, 0)))
    sums_BX = weights_C.new_zeros(len(ends_B), table_LX.shape[1])
    for part in _parts(len(entry_C), _chunk_size(table_LX)):
        copies_c = torch.arange(part.start, part.stop, device=entry_C.device)
        bag_c = torch.searchsorted(ends_B, copies_c, right=True)
        sums_BX.index_add_(0, bag_c, weights_C[part, None] * _read(table_LX, entry_C[part]))
    return sums_BX


def table_gradient(
    table_LX: Tensor,
    rows_NX: Tensor,
    row_C: Tensor,
    weights_C: Tensor,
    *,
    entry_C: Tensor,
    order_C: Tensor,
    adam: RowAdam | None,
) -> Tensor | None:
    """The sum over each table row's copies of weight_c * rows[row_c], in the dtype of the table; with `adam` its rows are stepped by it.

    Rows and weights are wide. order_C sorts the copies stably by entry. A row of the table that no copy reads gets exactly zero. All L rows
    are bags, empty ones too: 4 ms for 65,536 rows of 256 of which 63 % are read, 11 where these are summed and then copied into zeros.
    """
    row_C, weights_C = row_C.index_select(0, order_C), weights_C.index_select(0, order_C)
    if adam is None:
        ends_L = torch.bincount(entry_C, minlength=len(table_LX)).cumsum(0)  # on a GPU it waits for the device
        return sums(rows_NX, row_C, weights_C, ends_L).to(table_LX.dtype)
    sorted_C = entry_C.index_select(0, order_C).long()
    entry_U, counts_U = torch.unique_consecutive(sorted_C, return_counts=True)
    adam.step(table_LX, entry_U, sums(rows_NX, row_C, weights_C, counts_U.cumsum(0)))
    return None


def _read(table_LX: Tensor, entry_c: Tensor) -> Tensor:
    """table[entry_c]; bags of one row each, because torch's bags fetch rows ahead: 3.6 ms for 65,536 rows of 256, index_select 6.6."""
    return _bags(table_LX, entry_c, None, torch.arange(len(entry_c) + 1, dtype=entry_c.dtype, device=entry_c.device))


def _bags(table_LX: Tensor, entry_C: Tensor, weights_C: Tensor | None, offsets: Tensor) -> Tensor:
    """table_LX detached: else torch also makes what its own backward pass would need."""
    return F.embedding_bag(
        entry_C,
        table_LX.detach(),
        offsets.to(entry_C.dtype),
        mode="sum",
        per_sample_weights=weights_C,
        include_last_offset=True,
    )


def _copies_per_row(row_C: Tensor, num_rows: int) -> int:
    """How many copies each row has, where all have as many; else, or on a GPU, which would have to be waited for, 0."""
    if not row_C.is_cpu or not num_rows or len(row_C) % num_rows:
        return 0
    rows_NK = row_C.view(num_rows, -1)
    return rows_NK.shape[1] if (rows_NK == torch.arange(num_rows)[:, None]).all() else 0


def _chunk_size(table_LX: Tensor) -> int:
    """Copies of a chunk of about CHUNK_ELEMENTS."""
    return max(1, CHUNK_ELEMENTS // max(1, table_LX.shape[1]))


def _parts(num_copies: int, size: int) -> Iterator[slice]:
    for first in range(0, num_copies, size):
        yield slice(first, min(first + size, num_copies))
