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
    """The distinct rows of a load by destination: row_N, how many for each place, and number_C of each copy's row in its block."""

    row_N: Tensor
    count_W: Tensor
    first_N: Tensor
    number_C: Tensor


class _Counts(NamedTuple):
    """Copies, rows and output rows of one load, to or from each rank."""

    copies: list[int]
    rows: list[int]
    outputs: list[int]


class _Sorted(NamedTuple):
    """A load by places: place 0 is this rank, then the others in rank order."""

    load: Load
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
    loads_by_place = [_sort(load, peers) for load in loads]
    sent, received = _exchange_counts(loads_by_place, peers=peers, where=where)
    return Hop(list(zip(loads_by_place, sent, received, strict=True)), peers=peers, where=where)


class Hop:
    """A planned hop: its legs, by load, and what arrives."""

    def __init__(self, planned: Sequence[tuple[_Sorted, _Counts, _Counts]], *, peers: Peers, where: Where) -> None:
        self.legs = [_leg(by_place, sent, received, peers) for by_place, sent, received in planned]
        self._me, self._loads = peers.rank, [(by_place.load, received) for by_place, _, received in planned]
        self._fields = [_fields(by_place, sent, received) for by_place, sent, received in planned]
        fields = [field for of_load in self._fields for field in of_load]
        leaving = _spans([field.sent for field in fields], me=peers.rank)
        self._arriving = _spans([field.received for field in fields], me=peers.rank)
        words_N = fields[0].words_N.new_empty(sum(leaving.totals))
        for field, span in zip(fields, leaving.of_fields, strict=True):
            words_N[span.to(words_N.device)] = field.words_N[field.sent[peers.rank] :]
        buffer = words_N.new_empty(sum(self._arriving.totals))
        totals = {"receive": self._arriving.totals, "send": leaving.totals}
        work = start_all_to_all(buffer, words_N, **totals, peers=peers, where=where)
        self._flight = Flight(buffer, words_N, work, peers, where)

    @cached_property
    def arrivals(self) -> list[Arrival]:
        """What arrives, by load; the first call waits for it."""
        words_N, spans, arrivals = self._flight.land(), iter(self._arriving.of_fields), []
        for (load, counts), fields, leg in zip(self._loads, self._fields, self.legs, strict=True):
            found = [
                torch.cat([field.words_N[: field.sent[self._me]], words_N[next(spans).to(words_N.device)]])
                for field in fields
            ]
            arrivals.append(_arrival(load, found, leg, counts))
        del self._flight, self._fields, self._arriving, self._loads
        return arrivals


def _leg(by_place: _Sorted, sent: _Counts, received: _Counts, peers: Peers) -> Leg:
    load, origin_C = by_place.load, by_place.load.origin_C[by_place.order_C]
    return Leg(
        rows=_carry(peers, by_place.rows.row_N, load.num_rows, sent.rows, received.rows),
        outputs=_carry(peers, by_place.outputs.row_N, load.num_outputs, sent.outputs, received.outputs),
        copies=_carry(peers, origin_C, load.num_origins, sent.copies, received.copies),
    )


def _fields(by_place: _Sorted, sent: _Counts, received: _Counts) -> list[_Field]:
    """The number of copies of each row; of each copy its group, its output row if that is not its row, its hash."""
    load, rows = by_place.load, by_place.rows
    copies_N = torch.cat([rows.first_N, rows.first_N.new_tensor([len(by_place.order_C)])]).diff()
    fields = [
        _Field(copies_N.int(), sent.rows, received.rows),
        _Field(load.group_C[by_place.order_C].int(), sent.copies, received.copies),
    ]
    if not load.same_rows:
        fields.append(_Field(by_place.outputs.number_C.int(), sent.copies, received.copies))
    if load.hashes_C is not None:
        words_X = load.hashes_C[by_place.order_C].view(torch.int32)
        twice = ([2 * count for count in counts.copies] for counts in (sent, received))
        fields.append(_Field(words_X, *twice))
    return fields


class _Spans(NamedTuple):
    """of_fields: where the words of each field lie in a message buffer that is ordered by rank, then by field; totals: words by rank."""

    of_fields: list[Tensor]
    totals: list[int]


def _spans(words: Sequence[Sequence[int]], *, me: int) -> _Spans:
    """words: of each field, by rank; those of this rank stay out of the buffer."""
    words_FW = torch.tensor(words, dtype=torch.int64)
    words_FW[:, me] = 0
    starts_FW = (words_FW.T.flatten().cumsum(0) - words_FW.T.flatten()).view(words_FW.T.shape).T
    of_fields = []
    for words_W, starts_W in zip(words_FW, starts_FW, strict=True):
        shift_W = starts_W - (words_W.cumsum(0) - words_W)
        of_fields.append(shift_W.repeat_interleave(words_W) + torch.arange(int(words_W.sum())))
    return _Spans(of_fields, words_FW.sum(0).tolist())


def _sort(load: Load, peers: Peers) -> _Sorted:
    place_C = load.rank_C + (load.rank_C < peers.rank)
    place_C = torch.where(load.rank_C == peers.rank, 0, place_C).to(torch.int16)  # a stable sort of narrow keys is fast
    place_C, order_C = place_C.sort(stable=True)
    place_C = place_C.long()
    rows = _blocks(place_C, load.source_C[order_C], num_rows=load.num_rows, peers=peers)
    outputs = rows
    if not load.same_rows:
        outputs = _blocks(place_C, load.output_C[order_C], num_rows=load.num_outputs, peers=peers)
    return _Sorted(load, order_C, torch.bincount(place_C, minlength=peers.size), rows, outputs)


def _blocks(place_C: Tensor, row_C: Tensor, *, num_rows: int, peers: Peers) -> _Blocks:
    key_C = place_C * num_rows + row_C  # ascends, because rows ascend within a place
    is_first_C = torch.ones_like(key_C, dtype=torch.bool)
    is_first_C[1:] = key_C[1:] != key_C[:-1]
    first_N = is_first_C.nonzero()[:, 0]
    count_W = torch.bincount(place_C[first_N], minlength=peers.size)
    before_W = count_W.cumsum(0) - count_W
    number_C = is_first_C.cumsum(0) - 1 - before_W[place_C]
    return _Blocks(row_C[first_N], count_W, first_N, number_C)


def _exchange_counts(
    loads_by_place: Sequence[_Sorted], *, peers: Peers, where: Where
) -> tuple[list[_Counts], list[_Counts]]:
    """What this rank sends and what it receives, by load. The host waits here: the splits of every later exchange are its numbers."""
    places = [0 if rank == peers.rank else rank + (rank < peers.rank) for rank in range(peers.size)]
    counts = [torch.stack([one.count_W, one.rows.count_W, one.outputs.count_W]) for one in loads_by_place]
    sent_WX = torch.cat(counts)[:, places].T.contiguous()
    received_WX = torch.empty_like(sent_WX)
    sizes = peers.to_each([row_X.numel() * row_X.element_size() for row_X in sent_WX])
    with peers.ledger.collective(where, sizes), torch.profiler.record_function(where.verb):
        dist.all_to_all_single(received_WX, sent_WX, group=peers.group)
    both = torch.stack([sent_WX, received_WX]).transpose(1, 2).tolist()
    sent, received = ([_Counts(*table[i : i + 3]) for i in range(0, len(table), 3)] for table in both)
    return sent, received


def _carry(peers: Peers, index_N: Tensor, num_rows: int, sent: list[int], received: list[int]) -> Carry:
    def others(counts: list[int]) -> list[int]:
        return [0 if rank == peers.rank else count for rank, count in enumerate(counts)]

    return Carry(peers, index_N, num_rows, sent[peers.rank], others(sent), others(received))


def _arrival(load: Load, fields: list[Tensor], leg: Leg, counts: _Counts) -> Arrival:
    """Makes indices of the words that came with the copies."""
    me, device = leg.rows.peers.rank, fields[0].device
    by_arrival = [me, *(rank for rank in range(len(counts.copies)) if rank != me)]
    rows_N = torch.arange(len(fields[0]), device=device)
    row_C = rows_N.repeat_interleave(fields[0].long(), output_size=sum(counts.copies))
    output_C = row_C
    if not load.same_rows:
        outputs_W = torch.tensor([counts.outputs[rank] for rank in by_arrival])
        copies_W = torch.tensor([counts.copies[rank] for rank in by_arrival])
        before_C = (outputs_W.cumsum(0) - outputs_W).repeat_interleave(copies_W)
        output_C = fields[2] + before_C.to(device)
    return Arrival(
        group_C=fields[1].long(),
        row_C=row_C,
        output_C=output_C,
        hashes_C=None if load.hashes_C is None else fields[-1].view(torch.int64),
        num_rows=leg.rows.num_arriving,
        num_outputs=leg.outputs.num_arriving,
    )
