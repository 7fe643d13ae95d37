"""Expert parallelism: the Dispatcher that carries routed rows to the ranks that own their experts, and the results home.

Owner of the group at place p is rank p div L of the expert group, L = ceil(G / ep_size); group g is at place g until groups move
(parallel/placement.py). A row travels at most once to each rank, whatever number of its
experts live there; the owner applies the gates, and sums per output row before it answers. Or the other way round: the weights of a
bank travel to the tokens. A table may be split by columns as well: rank = row shard * columns + column, and then every copy goes to
all columns of its row shard, with that part of its row. With two levels of ranks (nodes) a row crosses to each node at most once.
Layers see only the Dispatcher protocol (model/dispatch.py).

Shape letters: N routings, K choices, C routed copies, R received rows, W ranks of the expert group, L local groups, Z columns.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from model.dispatch import (
    Compute,
    Copies,
    LocalArriving,
    LocalExchange,
    LocalPlan,
    Pending,
    Ready,
    Routing,
    Then,
)
from model.parameters import ExpertBank
from parallel.carry import Carry, Homeward, Outward
from parallel.exchange import Arrival, Hop, Load, plan_hop
from parallel.gather import Gathering
from parallel.ledger import Where
from parallel.peers import Peers


@dataclass(frozen=True)
class Exchange:
    """How one routing travels: the hops of its plan, and which of their loads are its parts."""

    routing: Routing
    hops: Sequence[Hop]
    loads: range

    @cached_property
    def plans(self) -> list[LocalPlan]:
        """Of each part, what the experts here do."""
        bank = self.routing.bank
        arrivals = [self.hops[-1].arrivals[load] for load in self.loads]
        return [_copies(arrival, bank).sort() for arrival in arrivals]

    def carries(self, kind: str) -> list[list[Carry]]:
        """By hop, then by part; kind: the field of a Leg."""
        return [[getattr(hop.legs[load], kind) for load in self.loads] for hop in self.hops]


@dataclass
class Arriving:
    """Rows that are on their way to their experts; their gates too, unless they are yet to be known."""

    exchange: Exchange
    rows: Outward
    gates: Outward | None
    arrived: dict[int, Tensor] = field(default_factory=dict)

    def rows_of(self, part: int) -> Tensor:
        """(R, X); kept, because a layer that replies needs them again."""
        if part not in self.arrived:
            self.arrived[part] = self.rows.wait(part)
        return self.arrived[part]


class AllToAllDispatcher:
    """Dispatcher of one layer over an expert group. Every rank must make the same calls in the same order, whatever its routing."""

    def __init__(
        self,
        experts: Peers,
        *,
        layer: str = "",
        levels: Sequence[Peers] = (),
        gathered: Collection[ExpertBank] = (),
        chunks: int = 1,
        overlap: bool = True,
    ) -> None:
        """layer: its path in the model, for the ledger.

        levels: the groups of the hops, where there are two: the ranks with the same place on each node, then those of this node.
        gathered: the banks whose weights travel, not the tokens. chunks: parts into which the tokens are cut, so that one travels while
        another is computed. overlap: False waits for every exchange where it starts, for comparison. counts, set by
        parallel/placement.py: of the banks in it, (G,) int64, to which the copies for each group are added while gradients are on.
        """
        self.experts = experts
        self.layer = layer
        self.levels = tuple(levels) or (experts,)
        self.gathered = gathered
        self.chunks = chunks
        self.overlap = overlap
        self.counts: Mapping[ExpertBank, Tensor] = {}

    def plan(self, *routings: Routing) -> list[Exchange | LocalExchange]:
        """Two exchanges per hop: the numbers of copies, rows and output rows of all routings, then the words that tell of each copy."""
        travelling = [routing for routing in routings if routing.bank not in self.gathered]
        where = Where(self.layer, "", "plan")
        hops: list[Hop] = []
        if torch.is_grad_enabled():
            self._count(travelling)
        if travelling:
            loads = [load for routing in travelling for load in self._loads(routing)]
            hops.append(plan_hop(loads, peers=self.levels[0], where=where))
            for level in self.levels[1:]:
                banks = [routing.bank for routing in travelling for _ in range(self.chunks)]
                loads = [_next_load(*one) for one in zip(hops[-1].arrivals, loads, banks, strict=True)]
                hops.append(plan_hop(loads, peers=level, where=where))
        exchanges: list[Exchange | LocalExchange] = []
        for routing in routings:
            if routing.bank in self.gathered:
                num_groups = routing.bank.num_local * self.experts.size
                exchanges.append(LocalExchange.of(routing, num_groups=num_groups))
            else:
                first = self.chunks * sum(isinstance(exchange, Exchange) for exchange in exchanges)
                exchanges.append(Exchange(routing, hops, range(first, first + self.chunks)))
        return exchanges

    def dispatch(self, exchange: Exchange | LocalExchange, rows: Tensor, *, label: str) -> Arriving | LocalArriving:
        """Rows, in the dtype of autocast where that is on, and gates, 4 bytes a copy, to the owners."""
        if isinstance(exchange, LocalExchange):
            return LocalArriving(exchange, rows)
        columns = exchange.routing.bank.columns
        where = Where(self.layer, label, "dispatch")
        rows = rows.reshape(len(rows) * columns, rows.shape[1] // columns)
        outward = Outward(exchange.carries("rows"), rows, dtype=_matmul_dtype(rows), where=where, overlap=self.overlap)
        gates_NK = exchange.routing.gates_NK
        return Arriving(exchange, outward, None if gates_NK is None else self._send_gates(exchange, gates_NK, label))

    def weights(self, exchange: Exchange | LocalExchange, *, label: str) -> Pending[dict[str, Tensor]]:
        """The local ones, or an all-gather over the expert group; its gradients come home summed."""
        weights = exchange.routing.bank.weights()
        if isinstance(exchange, Exchange):
            return Ready(weights)
        start = partial(Gathering, peers=self.experts, where=Where(self.layer, label, "weights"), overlap=self.overlap)
        started = {name: start(weight, dtype=_matmul_dtype(weight)) for name, weight in weights.items()}
        return Then(Ready(started), _wait_for_all)

    def reply(self, arriving: Arriving | LocalArriving, compute: Compute, *, label: str) -> Pending[Tensor]:
        """One number a copy home, 4 bytes; the columns of a table sum theirs."""
        if isinstance(arriving, LocalArriving):
            return Ready(arriving.reply(compute))
        exchange, where = arriving.exchange, Where(self.layer, label, "reply")
        home = Homeward(exchange.carries("copies"), where=where, overlap=self.overlap)
        for part, plan in enumerate(exchange.plans):
            found_C = plan.as_they_came(compute(arriving.rows_of(part), plan))
            home.start(found_C[:, None])
        return Then(home, partial(torch.reshape, shape=exchange.routing.expert_ids_NK.shape))

    def combine(
        self, arriving: Arriving | LocalArriving, compute: Compute, *, label: str, gates_NK: Tensor | None = None
    ) -> Pending[Tensor]:
        """Partials (P, Y) home; what lies on one rank is summed there, and all is summed per output row here."""
        if isinstance(arriving, LocalArriving):
            return Ready(arriving.combine(compute, gates_NK))
        exchange = arriving.exchange
        gates = arriving.gates if gates_NK is None else self._send_gates(exchange, gates_NK, label)
        assert gates is not None
        home = Homeward(exchange.carries("outputs"), where=Where(self.layer, label, "combine"), overlap=self.overlap)
        for part, plan in enumerate(exchange.plans):
            home.start(compute(arriving.rows_of(part), plan.with_gates(gates.wait(part)[:, 0])))
        return Then(home, partial(_join_columns, columns=exchange.routing.bank.columns))

    def gather(self, bank: ExpertBank, rows: Tensor, *, label: str) -> Pending[Tensor]:
        """Rows (L, X) to every rank of the expert group; back come its gradients, summed."""
        where = Where(self.layer, label, "gather")
        gathering = Gathering(rows, dtype=rows.dtype, peers=self.experts, where=where, overlap=self.overlap)
        return Then(gathering, bank.seats.in_order)

    def _count(self, routings: Sequence[Routing]) -> None:
        """Recompute counts a routing twice, but then those of all groups alike: what matters is their share."""
        for routing in routings:
            if (count_G := self.counts.get(routing.bank)) is not None:
                ids_C = routing.expert_ids_NK.flatten()
                count_G.scatter_add_(
                    0, ids_C, torch.ones_like(ids_C)
                )  # bincount would make the host wait for the device

    def _send_gates(self, exchange: Exchange, gates_NK: Tensor, label: str) -> Outward:
        where = Where(self.layer, label, "gates")
        gates_X1 = gates_NK.reshape(-1, 1)
        return Outward(exchange.carries("copies"), gates_X1, dtype=gates_X1.dtype, where=where, overlap=self.overlap)

    def _loads(self, routing: Routing) -> list[Load]:
        """One for each part: the routings in equal ranges, as many parts on every rank."""
        num_routings = len(routing.expert_ids_NK)
        size = -(-num_routings // self.chunks)
        return [
            self._load(routing, slice(part * size, min((part + 1) * size, num_routings))) for part in range(self.chunks)
        ]

    def _load(self, routing: Routing, part: slice) -> Load:
        bank, ids_nK = routing.bank, routing.expert_ids_NK[part]
        num_choices, device = ids_nK.shape[1], ids_nK.device
        origin_nK = torch.arange(routing.expert_ids_NK.numel(), device=device).view(-1, num_choices)[part]
        columns_Z = torch.arange(bank.columns, device=device)

        def spread(rows_n: Tensor) -> Tensor:  # row n is Z rows, one for each column
            return (rows_n[:, None] * bank.columns + columns_Z).flatten().repeat_interleave(num_choices)

        # in the order (n, column, choice), so that rows ascend
        place_nK = bank.seats.places(ids_nK)
        owner_nZK = (place_nK // bank.num_local)[:, None, :] * bank.columns + columns_Z[:, None]
        group_nZK = (place_nK % bank.num_local)[:, None, :].expand_as(owner_nZK)
        hashes_n = None if routing.hashes_N is None else routing.hashes_N[part]
        node_size = self.levels[-1].size
        hops = len(self.levels) > 1
        return Load(
            rank_C=(owner_nZK // node_size if hops else owner_nZK).flatten(),
            group_C=(owner_nZK % node_size * bank.num_local + group_nZK if hops else group_nZK).flatten(),
            source_C=spread(routing.source_row_N[part]),
            output_C=spread(routing.output_row_N[part]),
            origin_C=origin_nK[:, None, :].expand_as(owner_nZK).flatten(),
            hashes_C=None if hashes_n is None else hashes_n.repeat_interleave(bank.columns * num_choices),
            num_rows=routing.num_rows * bank.columns,
            num_outputs=routing.num_outputs * bank.columns,
            num_origins=routing.expert_ids_NK.numel(),
            same_rows=routing.output_row_N is routing.source_row_N,
        )


def _next_load(arrival: Arrival, load: Load, bank: ExpertBank) -> Load:
    """What came to this node's rank of the first hop goes on to the ranks of the node that own it."""
    return replace(
        load,
        rank_C=arrival.group_C // bank.num_local,
        group_C=arrival.group_C % bank.num_local,
        source_C=arrival.row_C,
        output_C=arrival.output_C,
        origin_C=torch.arange(len(arrival.group_C), device=arrival.group_C.device),
        hashes_C=arrival.hashes_C,
        num_rows=arrival.num_rows,
        num_outputs=arrival.num_outputs,
        num_origins=len(arrival.group_C),
    )


def _copies(arrival: Arrival, bank: ExpertBank) -> Copies:
    return Copies(
        group_C=arrival.group_C,
        row_C=arrival.row_C,
        output_C=arrival.output_C,
        hashes_C=arrival.hashes_C,
        num_groups=bank.num_local,
        num_outputs=arrival.num_outputs,
        global_ids=bank.seats.global_ids,
    )


def _join_columns(sums_XY: Tensor, *, columns: int) -> Tensor:
    return sums_XY.reshape(len(sums_XY) // columns, sums_XY.shape[1] * columns)


def _wait_for_all(started: Mapping[str, Pending[Tensor]]) -> dict[str, Tensor]:
    return {name: pending.wait() for name, pending in started.items()}


def _matmul_dtype(rows: Tensor) -> torch.dtype:
    """The dtype of rows as a matmul takes them: cast before they travel instead of after, they are half as many bytes."""
    device_type = rows.device.type
    if not torch.is_autocast_enabled(device_type) or rows.dtype == torch.float64:
        return rows.dtype
    return torch.get_autocast_dtype(device_type)
