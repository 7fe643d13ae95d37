"""What goes where in an exchange: each row at most once to each rank, and each output row back once from each.

Plans one hop for several loads of routed copies at once: one exchange of counts, then one of what the receivers must know of every copy.
The rows, the gates and the results travel later, by the carries that come out of it (parallel/carry.py). Called by
parallel/expert.py, which makes loads of routings and hops of the expert group.

Shape letters: C routed copies, N distinct rows, W ranks of the hop's group, Q loads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.carry import Carry, Flight, start_all_to_all
from parallel.ledger import Where
from parallel.peers import Peers


@dataclass(frozen=True)
class Load:
    """Routed copies before a hop. rank_C: where each goes; group_C: its expert group as that rank counts; hashes_C: int64, if any.

    source_C and output_C: its row and its output row here, both ascending among the copies of one destination. origin_C: its place
    among `num_origins`. same_rows: both spaces are one, so the numbers of one do for the other.
    """

    rank_C: Tensor
    group_C: Tensor
    source_C: Tensor
    output_C: Tensor
    origin_C: Tensor
    hashes_C: Tensor | None
    num_rows: int
    num_outputs: int
    num_origins: int
    same_rows: bool


@dataclass(frozen=True)
class Leg:
    """How the rows, the output rows and the copies of a load travel in one hop."""

    rows: Carry
    outputs: Carry
    copies: Carry


@dataclass(frozen=True)
class Arrival:
    """A load's copies after the hop: first those that stayed, then by rank. row_C and output_C: numbers among what arrived here."""

    group_C: Tensor
    row_C: Tensor
    output_C: Tensor
    hashes_C: Tensor | None
    num_rows: int
    num_outputs: int


class _Blocks(NamedTuple):
    """The distinct rows among copies that are sorted by place: whether a copy is its row's first in its place, and how many by place."""

    row_C: Tensor
    is_first_C: Tensor
    count_W: Tensor

    def numbers(self) -> Tensor:
        """Of each copy, the number of its row among all distinct ones."""
        return self.is_first_C.cumsum(0) - 1


class _Counts(NamedTuple):
    """Copies, rows and output rows of one load, to or from each rank."""

    copies: list[int]
    rows: list[int]
    outputs: list[int]


class _Sorted(NamedTuple):
    """A load in the order of places: this rank first, so that what stays is the front of everything, then the others by rank."""

    load: Load
    place_C: Tensor
    order_C: Tensor
    count_W: Tensor
    rows: _Blocks
    outputs: _Blocks


class _Field(NamedTuple):
    """int32 words that the receivers need, in the order of places, and how many of them go to and come from each rank."""

    words_N: Tensor
    sent: list[int]
    received: list[int]


def plan_hop(loads: Sequence[Load], *, peers: Peers, where: Where) -> "Hop":
    """Collectives: one all-to-all of 3 * Q int64 to each rank of the group, one of 4-byte words that `Hop.arrivals` waits for."""
    by_place = [_sort(load, peers) for load in loads]
    sent, received = _exchange_counts(by_place, peers=peers, where=where)
    return Hop(list(zip(by_place, sent, received, strict=True)), peers=peers, where=where)


class Hop:
    """A planned hop: its legs, by load, and what arrives. Made without waiting for a device: every size is one of the counts."""

    def __init__(self, planned: Sequence[tuple[_Sorted, _Counts, _Counts]], *, peers: Peers, where: Where) -> None:
        self.legs = [_leg(sorted_load, sent, received, peers) for sorted_load, sent, received in planned]
        self._me, self._loads = peers.rank, [(sorted_load.load, received) for sorted_load, _, received in planned]
        self._fields = [_fields(*one) for one in planned]
        fields = [field for of_load in self._fields for field in of_load]
        leaving = _Spans.of([field.sent for field in fields], peers.rank, fields[0].words_N.device)
        self._arriving = _Spans.of([field.received for field in fields], peers.rank, fields[0].words_N.device)
        words_N = fields[0].words_N.new_empty(sum(leaving.totals))
        for number, field in enumerate(fields):
            words_N[leaving.of_field(number)] = field.words_N[field.sent[peers.rank] :]
        buffer = words_N.new_empty(sum(self._arriving.totals))
        totals = {"receive": self._arriving.totals, "send": leaving.totals}
        work = start_all_to_all(buffer, words_N, **totals, peers=peers, where=where)
        self._flight = Flight(buffer, words_N, work, peers, where)

    @cached_property
    def arrivals(self) -> list[Arrival]:
        """What arrives, by load; the first call waits for it."""
        words_N, arrivals, number = self._flight.land(), [], 0
        for (load, counts), fields, leg in zip(self._loads, self._fields, self.legs, strict=True):
            found = []
            for field in fields:
                kept = field.words_N[: field.sent[self._me]]
                found.append(torch.cat([kept, words_N[self._arriving.of_field(number)]]))
                number += 1
            arrivals.append(_arrival(load, found, leg, counts))
        del self._flight, self._fields, self._arriving, self._loads
        return arrivals


def _leg(sorted_load: _Sorted, sent: _Counts, received: _Counts, peers: Peers) -> Leg:
    def carry(index_N: Tensor, num_rows: int, kind: str) -> Carry:
        leaving, arriving = getattr(sent, kind), getattr(received, kind)
        others = ([0 if rank == peers.rank else n for rank, n in enumerate(one)] for one in (leaving, arriving))
        return Carry(peers, index_N, num_rows, leaving[peers.rank], *others)

    def distinct(blocks: _Blocks, number: int) -> Tensor:
        return blocks.row_C.new_empty(number).scatter_(0, blocks.numbers(), blocks.row_C)  # equal rows, equal values

    load, rows, outputs = sorted_load.load, sorted_load.rows, sorted_load.outputs
    row_N = distinct(rows, sum(sent.rows))
    output_N = row_N if outputs is rows else distinct(outputs, sum(sent.outputs))
    return Leg(
        rows=carry(row_N, load.num_rows, "rows"),
        outputs=carry(output_N, load.num_outputs, "outputs"),
        copies=carry(load.origin_C[sorted_load.order_C], load.num_origins, "copies"),
    )


def _fields(sorted_load: _Sorted, sent: _Counts, received: _Counts) -> list[_Field]:
    """The number of copies of each row; of each copy its group, its output row if that is not its row, its hash."""
    load, rows, outputs = sorted_load.load, sorted_load.rows, sorted_load.outputs
    copies_N = rows.row_C.new_zeros(sum(sent.rows)).scatter_add_(0, rows.numbers(), torch.ones_like(rows.row_C))
    fields = [
        _Field(copies_N.int(), sent.rows, received.rows),
        _Field(load.group_C[sorted_load.order_C].int(), sent.copies, received.copies),
    ]
    if not load.same_rows:
        before_W = outputs.count_W.cumsum(0) - outputs.count_W  # numbers count anew at each receiver
        number_C = outputs.numbers() - before_W[sorted_load.place_C]
        fields.append(_Field(number_C.int(), sent.copies, received.copies))
    if load.hashes_C is not None:
        words_X = load.hashes_C[sorted_load.order_C].view(torch.int32)
        twice = ([2 * count for count in counts.copies] for counts in (sent, received))
        fields.append(_Field(words_X, *twice))
    return fields


class _Spans(NamedTuple):
    """Where fields lie in a message buffer that is ordered by rank, then by field. totals: its words by rank."""

    words_FW: Tensor
    shift_FW: Tensor
    sizes: list[int]
    totals: list[int]

    @staticmethod
    def of(words: Sequence[Sequence[int]], me: int, device: torch.device) -> "_Spans":
        """words: of each field, by rank; those of this rank stay out of the buffer."""
        words_FW = torch.tensor(words, dtype=torch.int64)
        words_FW[:, me] = 0
        flat_X = words_FW.T.flatten()
        starts_FW = (flat_X.cumsum(0) - flat_X).view(words_FW.T.shape).T
        shift_FW = starts_FW - (words_FW.cumsum(1) - words_FW)
        on_device = torch.stack([words_FW, shift_FW]).to(device, non_blocking=True)
        return _Spans(on_device[0], on_device[1], words_FW.sum(1).tolist(), words_FW.sum(0).tolist())

    def of_field(self, number: int) -> Tensor:
        """The index of each word of a field in the buffer, in the order of ranks."""
        size, words_W = self.sizes[number], self.words_FW[number]
        shift_N = self.shift_FW[number].repeat_interleave(words_W, output_size=size)
        return shift_N + torch.arange(size, device=words_W.device)


def _sort(load: Load, peers: Peers) -> _Sorted:
    place_C = load.rank_C + (load.rank_C < peers.rank)
    place_C = torch.where(load.rank_C == peers.rank, 0, place_C).to(torch.int16)  # a stable sort of narrow keys is fast
    place_C, order_C = place_C.sort(stable=True)
    place_C = place_C.long()
    rows = _blocks(place_C, load.source_C[order_C], num_rows=load.num_rows, peers=peers)
    outputs = rows
    if not load.same_rows:
        outputs = _blocks(place_C, load.output_C[order_C], num_rows=load.num_outputs, peers=peers)
    return _Sorted(load, place_C, order_C, _count(place_C, torch.ones_like(place_C), peers), rows, outputs)


def _blocks(place_C: Tensor, row_C: Tensor, *, num_rows: int, peers: Peers) -> _Blocks:
    key_C = place_C * num_rows + row_C  # ascends, because rows ascend within a place
    is_first_C = torch.ones_like(key_C, dtype=torch.bool)
    is_first_C[1:] = key_C[1:] != key_C[:-1]
    return _Blocks(row_C, is_first_C, _count(place_C, is_first_C.long(), peers))


def _count(place_C: Tensor, ones_C: Tensor, peers: Peers) -> Tensor:
    """By place; bincount would make the host wait for the device to learn how many there are."""
    return ones_C.new_zeros(peers.size).scatter_add_(0, place_C, ones_C)


def _exchange_counts(by_place: Sequence[_Sorted], *, peers: Peers, where: Where) -> tuple[list[_Counts], list[_Counts]]:
    """What this rank sends and what it receives, by load. The host waits here, once for a plan: later splits are these numbers."""
    counts_XW = torch.cat([torch.stack([one.count_W, one.rows.count_W, one.outputs.count_W]) for one in by_place])
    here, before = counts_XW[:, :1], peers.rank + 1  # places 1 to rank are the ranks before this one
    sent_WX = torch.cat([counts_XW[:, 1:before], here, counts_XW[:, before:]], dim=1).T.contiguous()
    received_WX = torch.empty_like(sent_WX)
    sizes = peers.to_each([row_X.numel() * row_X.element_size() for row_X in sent_WX])
    with peers.ledger.collective(where, sizes), torch.profiler.record_function(where.verb):
        dist.all_to_all_single(received_WX, sent_WX, group=peers.group)
        both = torch.stack([sent_WX, received_WX]).transpose(1, 2).tolist()  # where the host waits, also for NCCL
    sent, received = ([_Counts(*table[i : i + 3]) for i in range(0, len(table), 3)] for table in both)
    return sent, received


def _arrival(load: Load, fields: list[Tensor], leg: Leg, counts: _Counts) -> Arrival:
    """Makes indices of the words that came with the copies."""
    me, num_copies, device = leg.rows.peers.rank, sum(counts.copies), fields[0].device
    rows_N = torch.arange(len(fields[0]), device=device)
    row_C = rows_N.repeat_interleave(fields[0].long(), output_size=num_copies)
    output_C = row_C
    if not load.same_rows:
        by_place = [me, *(rank for rank in range(len(counts.copies)) if rank != me)]
        table = [[of_kind[rank] for rank in by_place] for of_kind in (counts.outputs, counts.copies)]
        outputs_W, copies_W = torch.tensor(table).to(device, non_blocking=True)
        before_W = outputs_W.cumsum(0) - outputs_W
        output_C = fields[2] + before_W.repeat_interleave(copies_W, output_size=num_copies)
    return Arrival(
        group_C=fields[1].long(),
        row_C=row_C,
        output_C=output_C,
        hashes_C=None if load.hashes_C is None else fields[-1].view(torch.int64),
        num_rows=leg.rows.num_arriving,
        num_outputs=leg.outputs.num_arriving,
    )
