"""Expert parallelism: the Dispatcher that carries routed rows to the ranks that own their experts, and the results home.

Owner of group g is rank g div L of the expert group, L = ceil(G / ep_size). Each routed copy travels on its own, with its gate, which the
owner applies; its result travels home and is summed there per output row. Layers see only the Dispatcher protocol (model/dispatch.py).

Shape letters: N routings, K choices, C = N*K routed copies of this rank, R received copies, W ranks of the expert group, L local groups.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from model.dispatch import LocalPlan, Ready, Routing, group_ends
from model.parameters import ExpertBank
from parallel.all_to_all import all_to_all_rows, exchange_counts


@dataclass(frozen=True)
class Exchange:
    """How one routing travels. copy_C: routed copies (n*K + k) in the order of their global expert ids, so in the order of owners.

    send and receive: copies to and from each rank. order_R: received copies sorted by local group. offsets_L: the groups' ends.
    """

    routing: Routing
    copy_C: Tensor
    send: list[int]
    receive: list[int]
    order_R: Tensor
    offsets_L: Tensor


class AllToAllDispatcher:
    """Dispatcher over an expert group. Every rank must make the same calls in the same order, whatever its routing."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)

    def plan(self, *routings: Routing) -> list[Exchange]:
        """Exchanges, over the expert group, how many copies each rank sends to each expert: W * L int64 per routing, in one go."""
        copies = [routing.expert_ids_NK.flatten().sort(stable=True) for routing in routings]
        widths = [math.ceil(routing.bank.num_groups / self.ranks) for routing in routings]
        sent = [
            torch.bincount(ids, minlength=self.ranks * width).view(self.ranks, width)
            for (ids, _), width in zip(copies, widths, strict=True)
        ]
        received = exchange_counts(torch.cat(sent, dim=1), group=self.group).split(widths, dim=1)
        return [
            self._exchange(routing, copy_C, sent_WL, received_WL)
            for routing, (_, copy_C), sent_WL, received_WL in zip(routings, copies, sent, received, strict=True)
        ]

    def _exchange(self, routing: Routing, copy_C: Tensor, sent_WL: Tensor, received_WL: Tensor) -> Exchange:
        # copies arrive by source rank and, inside a source, by group: sort them by group, sources in rank order
        groups_WL = torch.arange(received_WL.shape[1], device=received_WL.device).expand_as(received_WL)
        groups_R, order_R = groups_WL.flatten().repeat_interleave(received_WL.flatten()).sort(stable=True)
        return Exchange(
            routing=routing,
            copy_C=copy_C,
            send=sent_WL.sum(1).tolist(),
            receive=received_WL.sum(1).tolist(),
            order_R=order_R,
            offsets_L=group_ends(groups_R, received_WL.shape[1]),
        )

    def dispatch(self, exchange: Exchange, rows: Tensor, *, label: str) -> Ready[tuple[Tensor, LocalPlan]]:
        """Rows (num_rows, X), in the dtype of autocast where that is on, and gates, 4 bytes each, to the owners."""
        routing = exchange.routing
        routing_C = exchange.copy_C // routing.expert_ids_NK.shape[1]
        # cast after the gather: the copies' gradients are then summed in the rows' own precision
        rows_CX = _as_matmul_input(rows[routing.source_row_N[routing_C]])
        gates_C = routing.gates_NK.flatten()[exchange.copy_C]
        with torch.profiler.record_function(f"dispatch/{label}"):
            rows_RX = all_to_all_rows(rows_CX, send=exchange.send, receive=exchange.receive, group=self.group)
            gates_R = all_to_all_rows(gates_C, send=exchange.send, receive=exchange.receive, group=self.group)
        plan = LocalPlan(
            row_index_C=exchange.order_R,
            output_index_C=exchange.order_R,
            gates_C=gates_R[exchange.order_R],
            offsets_L=exchange.offsets_L,
            num_outputs=sum(exchange.receive),
        )
        return Ready((rows_RX, plan))

    def combine(self, exchange: Exchange, partials: Tensor, *, label: str) -> Ready[Tensor]:
        """Partials (R, X) home over the expert group, then summed per output row in float32, in the order of expert ids."""
        routing = exchange.routing
        with torch.profiler.record_function(f"combine/{label}"):
            rows_CX = all_to_all_rows(partials, send=exchange.receive, receive=exchange.send, group=self.group)
        sum_dtype = torch.promote_types(rows_CX.dtype, torch.float32)
        output_C = routing.output_row_N[exchange.copy_C // routing.expert_ids_NK.shape[1]]
        sums = rows_CX.new_zeros(routing.num_outputs, rows_CX.shape[1], dtype=sum_dtype)
        return Ready(sums.index_add(0, output_C, rows_CX.to(sum_dtype)).to(partials.dtype))

    def weights(self, exchange: Exchange) -> Ready[dict[str, Tensor]]:
        return Ready(exchange.routing.bank.weights())

    def gather(self, bank: ExpertBank, rows: Tensor, *, label: str) -> Ready[Tensor]:
        """Rows (L, X) to every rank of the expert group, L * X elements to each; back come its gradients, summed in their order."""
        with torch.profiler.record_function(f"gather/{label}"):
            each = [len(rows)] * self.ranks
            rows_GX = all_to_all_rows(rows.repeat(self.ranks, 1), send=each, receive=each, group=self.group)
        return Ready(rows_GX[: bank.num_groups])


def _as_matmul_input(rows: Tensor) -> Tensor:
    """Rows as the owner's matmul takes them: cast before they travel instead of after, they are half as many bytes."""
    device_type = rows.device.type
    if not torch.is_autocast_enabled(device_type) or rows.dtype == torch.float64:
        return rows
    return rows.to(torch.get_autocast_dtype(device_type))
