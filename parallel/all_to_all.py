"""Differentiable all-to-all with uneven splits: the one collective that rows and gates travel by, over gloo and NCCL alike.

Knows nothing of experts; parallel/expert.py decides what goes where. Autograd runs the backward exchanges in the reverse order of the
forward's on every rank, because all ranks build the same graph whatever the routing: ranks with nothing to send send zero rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_to_all_rows(
    rows_NX: Tensor, *, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Sends rows send[0], then send[1], ... of dimension 0 to ranks 0, 1, ... of `group`; gives what comes in, in rank order.

    sum(send) = N rows leave and sum(receive) rows arrive, each of X elements; the backward exchange is the transposed one.
    """
    return _AllToAllRows.apply(rows_NX, list(send), list(receive), group)


def exchange_counts(counts_WX: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """Row w goes to rank w of `group`; row w of the result came from rank w. W * X int64, 8 bytes each, no gradient."""
    received_WX = torch.empty_like(counts_WX)
    dist.all_to_all_single(received_WX, counts_WX.contiguous(), group=group)
    return received_WX


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NX: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(rows_NX, send, receive, group)

    @staticmethod
    def backward(ctx: Any, gradient_RX: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradient_RX, ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(rows_NX: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    received_RX = rows_NX.new_empty(sum(receive), *rows_NX.shape[1:])
    dist.all_to_all_single(received_RX, rows_NX.contiguous(), receive, send, group=group)
    return received_RX
