"""Tensors of all ranks of a group on each of them, differentiable: the weights that travel instead of tokens, and Avg-K's averages.

Forward an all-gather; backward each rank sends everyone the gradient of that one's part, and sums what it gets in float32, in rank order
(the bytes of a reduce-scatter, the sums always in one order). Start and wait as in parallel/carry.py. Called by parallel/expert.py.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.carry import Flight
from parallel.ledger import Where
from parallel.peers import Peers


@dataclass
class _Box:
    """What start and wait share; in the backward pass, the same again the other way."""

    peers: Peers
    where: Where
    overlap: bool
    flight: Flight | None = None

    def launch(self, sent: Tensor, *, num_rows: int, backward: bool) -> None:
        peers, where = self.peers, replace(self.where, backward=backward)
        num_bytes, received = sent.numel() * sent.element_size(), sent.new_empty(num_rows, *sent.shape[1:])
        exchange, sizes = dist.all_gather_into_tensor, peers.all_gather(num_bytes * peers.size)
        if backward:
            exchange, sizes = dist.all_to_all_single, peers.to_each([num_bytes // peers.size] * peers.size)
        with peers.ledger.collective(where, sizes), torch.profiler.record_function(f"{where.verb}/{where.label}"):
            work = exchange(received, sent, group=peers.group, async_op=True)
        self.flight = Flight(received, sent, work, peers, where)
        if not self.overlap:
            self.flight.land()

    def land(self) -> Tensor:
        assert self.flight is not None
        received, self.flight = self.flight.land(), None
        return received


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, box: _Box, dtype: torch.dtype) -> Tensor:
        ctx.box, ctx.dtype = box, part.dtype
        box.launch(part.to(dtype).contiguous(), num_rows=len(part) * box.peers.size, backward=False)
        return part.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:
        parts = ctx.box.land().chunk(ctx.box.peers.size)
        total = parts[0].to(torch.promote_types(ctx.dtype, torch.float32))
        for part in parts[1:]:
            total = total + part
        return total.to(ctx.dtype), None, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, started: Tensor, box: _Box) -> Tensor:
        ctx.box = box
        return box.land()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.box.launch(gradient.contiguous(), num_rows=len(gradient), backward=True)
        return gradient.new_empty(0), None


class Gathering:
    """A gather that has started. part (L, ...) of each rank, all of one shape; `wait` gives (W * L, ...), in rank order."""

    def __init__(self, part: Tensor, *, dtype: torch.dtype, peers: Peers, where: Where, overlap: bool) -> None:
        self._box = _Box(peers, where, overlap)
        self._started = _Start.apply(part, self._box, dtype)

    def wait(self) -> Tensor:
        return _Wait.apply(self._started, self._box)
