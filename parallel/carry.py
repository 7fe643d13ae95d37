"""Rows on their way to other ranks, and sums of rows on their way back: the one collective of the exchange, in two halves.

A `Carry` is two linear maps, each the transpose of the other. Out: row index_N[n] of a space of `num_rows` rows here goes to the rank
that n stands for; a row that goes to several is several n. Home: what comes back for n is added to row index_N[n]. So the backward
pass of either is the other. Rows that stay are copied once and never meet the network.

Under autograd a journey is a start and a wait, in both passes: the start launches and the wait lands; in the backward pass the wait
launches the transposed exchange and the start lands it, so what lies between the two overlaps in both directions. The result of a
start has one consumer, its wait. Every rank builds the same graph whatever its routing, so all make the same exchanges in one order; a
rank with nothing to send sends zero rows. Knows nothing of experts; parallel/exchange.py decides what goes where.

Shape letters: N rows that leave a space, R rows that arrive, W ranks of the group, X any width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.ledger import Where
from parallel.peers import Peers


@dataclass
class Flight:
    """A started all-to-all: what stayed (or was received before), what comes in, and what must live until it has left."""

    buffer_RX: Tensor
    sent_NX: Tensor
    work: Any
    peers: Peers
    where: Where

    def land(self) -> Tensor:
        if self.work is not None:
            with self.peers.ledger.waiting(self.where):
                self.work.wait()
            self.work = None
        return self.buffer_RX


def start_all_to_all(
    received_RX: Tensor, rows_NX: Tensor, *, receive: Sequence[int], send: Sequence[int], peers: Peers, where: Where
) -> Any:
    """Sends send[0] rows to rank 0 of the group, then send[1] ..., and fills received; gives what to wait for.

    Sizes of X elements each; what a rank sends itself is not counted. Rows of width 0 make no exchange.
    """
    width = rows_NX.shape[1:].numel()
    if width == 0:
        return None
    sent = peers.to_each([count * width * rows_NX.element_size() for count in send])
    with peers.ledger.collective(where, sent), torch.profiler.record_function(f"{where.verb}/{where.label}"):
        return dist.all_to_all_single(received_RX, rows_NX, list(receive), list(send), group=peers.group, async_op=True)


@dataclass(frozen=True)
class Carry:
    """Where N rows go. index_N: their rows here; the first `num_here` stay, then those for rank 0, rank 1, ...

    send and receive: rows to and from each rank of the group, 0 of this rank to itself.
    """

    peers: Peers
    index_N: Tensor
    num_rows: int
    num_here: int
    send: list[int]
    receive: list[int]

    @property
    def num_arriving(self) -> int:
        return self.num_here + sum(self.receive)

    def start_out(self, rows_NX: Tensor, *, dtype: torch.dtype, where: Where) -> Flight:
        """Rows (num_rows, X) leave in `dtype`: the cast comes before the journey."""
        here_N, leaving_N = self.index_N[: self.num_here], self.index_N[self.num_here :]
        buffer_RX = rows_NX.new_empty(self.num_arriving, rows_NX.shape[1], dtype=dtype)
        buffer_RX[: self.num_here] = rows_NX.index_select(0, here_N)
        sent_NX = rows_NX.index_select(0, leaving_N).to(dtype)
        work = start_all_to_all(
            buffer_RX[self.num_here :], sent_NX, receive=self.receive, send=self.send, peers=self.peers, where=where
        )
        return Flight(buffer_RX, sent_NX, work, self.peers, where)

    def start_home(self, arrived_RX: Tensor, *, where: Where) -> Flight:
        """What belongs to the R rows that arrived goes back to where they came from."""
        arrived_RX = arrived_RX.contiguous()
        received_NX = arrived_RX.new_empty(len(self.index_N) - self.num_here, arrived_RX.shape[1])
        work = start_all_to_all(
            received_NX,
            arrived_RX[self.num_here :],
            receive=self.send,
            send=self.receive,
            peers=self.peers,
            where=where,
        )
        return Flight(received_NX, arrived_RX, work, self.peers, where)

    def add_home(self, flight: Flight, sums: Tensor) -> None:
        """Adds what came home to sums (num_rows, X), first what had stayed, then by rank: always in one order."""
        received_NX = flight.land()
        sums.index_add_(0, self.index_N[: self.num_here], flight.sent_NX[: self.num_here].to(sums.dtype))
        sums.index_add_(0, self.index_N[self.num_here :], received_NX.to(sums.dtype))


@dataclass
class Journey:
    """One use of some carries under autograd, one for each part of a batch of rows. overlap: False waits at once, for comparison."""

    carries: Sequence[Carry]
    where: Where
    overlap: bool = True
    flights: dict[int, Flight] = field(default_factory=dict)

    def start_out(self, part: int, rows_NX: Tensor, *, dtype: torch.dtype, backward: bool = False) -> None:
        where = replace(self.where, backward=backward)
        self._launched(part, self.carries[part].start_out(rows_NX, dtype=dtype, where=where))

    def start_home(self, part: int, arrived_RX: Tensor, *, backward: bool = False) -> None:
        where = replace(self.where, backward=backward)
        self._launched(part, self.carries[part].start_home(arrived_RX, where=where))

    def land_out(self, part: int) -> Tensor:
        return self.flights.pop(part).land()

    def land_home(self, like_X: Tensor, dtype: torch.dtype) -> Tensor:
        """The sums of all parts (num_rows, X), in float32 at least, then rounded once to `dtype`."""
        num_rows = self.carries[0].num_rows
        sums = like_X.new_zeros(num_rows, *like_X.shape, dtype=torch.promote_types(dtype, torch.float32))
        for part, carry in enumerate(self.carries):
            carry.add_home(self.flights.pop(part), sums)
        return sums.to(dtype)

    def _launched(self, part: int, flight: Flight) -> None:
        if not self.overlap:
            flight.land()
        self.flights[part] = flight


class _StartOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NX: Tensor, journey: Journey, dtype: torch.dtype) -> tuple[Tensor, ...]:
        ctx.journey, ctx.dtype, ctx.like = journey, rows_NX.dtype, rows_NX.new_empty(rows_NX.shape[1])
        for part in range(len(journey.carries)):
            journey.start_out(part, rows_NX, dtype=dtype)
        return tuple(rows_NX.new_empty(0) for _ in journey.carries)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None, None]:
        return ctx.journey.land_home(ctx.like, ctx.dtype), None, None


class _WaitOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, started: Tensor, journey: Journey, part: int) -> Tensor:
        ctx.journey, ctx.part = journey, part
        return journey.land_out(part)

    @staticmethod
    def backward(ctx: Any, gradient_RX: Tensor) -> tuple[Tensor, None, None]:
        ctx.journey.start_home(ctx.part, gradient_RX, backward=True)
        return gradient_RX.new_empty(0), None, None


class _StartHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arrived_RX: Tensor, journey: Journey, part: int) -> Tensor:
        ctx.journey, ctx.part = journey, part
        journey.start_home(part, arrived_RX)
        return arrived_RX.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:
        return ctx.journey.land_out(ctx.part), None, None


class _WaitHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, journey: Journey, width: int, *started: Tensor) -> Tensor:
        ctx.journey, ctx.num_parts = journey, len(started)
        return journey.land_home(started[0].new_empty(width), started[0].dtype)

    @staticmethod
    def backward(ctx: Any, gradient_NX: Tensor) -> tuple[None, None, *tuple[Tensor, ...]]:
        for part in range(ctx.num_parts):
            ctx.journey.start_out(part, gradient_NX, dtype=gradient_NX.dtype, backward=True)
        return None, None, *(gradient_NX.new_empty(0) for _ in range(ctx.num_parts))


Hops = Sequence[Sequence[Carry]]  # by hop, then by part


class Outward:
    """Rows that have left for the ranks of their experts, in parts, perhaps over several hops."""

    def __init__(self, hops: Hops, rows_NX: Tensor, *, dtype: torch.dtype, where: Where, overlap: bool) -> None:
        """Sends rows (num_rows, X) by every part's carry, in `dtype`."""
        self.later_hops, self.dtype, self.where, self.overlap = hops[1:], dtype, where, overlap
        self.journey = Journey(hops[0], where, overlap)
        self.started: tuple[Tensor, ...] = _StartOut.apply(rows_NX, self.journey, dtype)

    def wait(self, part: int) -> Tensor:
        """(R, X) of one part, differentiable. Once for each part."""
        rows_RX = _WaitOut.apply(self.started[part], self.journey, part)
        for hop in self.later_hops:
            next_hop = Outward([[hop[part]]], rows_RX, dtype=self.dtype, where=self.where, overlap=self.overlap)
            rows_RX = next_hop.wait(0)
        return rows_RX


class Homeward:
    """Results that leave for home part by part and are summed there; over several hops they are summed at each."""

    def __init__(self, hops: Hops, *, where: Where, overlap: bool) -> None:
        self.later_hops, self.where, self.overlap = hops[1:], where, overlap
        self.journey = Journey(hops[0], where, overlap)
        self.width = 0
        self.started: list[Tensor] = []

    def start(self, arrived_RX: Tensor) -> None:
        """The next part's results (R, X)."""
        part = len(self.started)
        for hop in reversed(self.later_hops):
            last_hop = Homeward([[hop[part]]], where=self.where, overlap=self.overlap)
            last_hop.start(arrived_RX)
            arrived_RX = last_hop.wait()
        self.width = arrived_RX.shape[1]
        self.started.append(_StartHome.apply(arrived_RX, self.journey, part))

    def wait(self) -> Tensor:
        """(num_rows, X) in the results' dtype, differentiable."""
        return _WaitHome.apply(self.journey, self.width, *self.started)
