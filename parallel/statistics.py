"""BatchStatistics over all ranks: sums whose gradient is right wherever the result is used.

Each rank's loss depends on the summed value, so the gradient of a local row is the sum of what every rank sends back: the backward of
this all-reduce is an all-reduce. With train/step.py's convention (the objective is the mean over ranks of the ranks' losses) a term
that every rank computes alike then counts once, neither once per rank nor divided by their number.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.ledger import Where
from parallel.peers import Peers


class AllRankStatistics:
    """model.statistics.BatchStatistics over the ranks that share a micro-step. Ranks may hold different numbers of rows.

    layer: path of the layer that asks, for the ledger.
    """

    def __init__(self, peers: Peers, *, layer: str = "model") -> None:
        self.peers = peers
        self.where = Where(layer, "", "statistics")

    def sum(self, rows_NX: Tensor) -> Tensor:
        """One all-reduce of the row's size over the group, and one in the backward pass."""
        return _AllReduceSum.apply(rows_NX.sum(0), self.peers, self.where)

    def mean(self, rows_NX: Tensor) -> Tensor:
        """The sum with one more number, the count of rows, in the same all-reduce."""
        flat_X = rows_NX.sum(0).flatten()
        count = flat_X.new_full((1,), rows_NX.shape[0])
        total = _AllReduceSum.apply(torch.cat([flat_X, count]), self.peers, self.where)
        return (total[:-1] / total[-1]).view(rows_NX.shape[1:])


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, peers: Peers, where: Where) -> Tensor:
        ctx.peers, ctx.where = peers, where
        return _all_reduce(values, peers, where)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _all_reduce(gradient, ctx.peers, replace(ctx.where, backward=True)), None, None


def _all_reduce(values: Tensor, peers: Peers, where: Where) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    with peers.ledger.collective(where, peers.all_reduce(total.numel() * total.element_size())):
        dist.all_reduce(total, group=peers.group)
    return total
