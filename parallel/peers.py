"""A group of ranks as its members see it: who is on this node, and what a collective of the group sends.

Owns the formulas of the collectives whose algorithm is torch's choice: a ring in rank order, in which each rank sends to the next of the
group. Makes no group (parallel/mesh.py does) and no collective. Used by all of parallel/ that communicates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from parallel.ledger import Ledger, Sent


@dataclass(frozen=True)
class Peers:
    """rank and size: this rank's place in the group. is_near: for each rank of the group, whether it is on this rank's node."""

    group: dist.ProcessGroup
    rank: int
    size: int
    is_near: tuple[bool, ...]
    ledger: Ledger

    def all_reduce(self, num_bytes: int) -> Sent:
        """Sent by a rank in an all-reduce of `num_bytes`: 2 (P - 1) / P of them (a reduce-scatter, then an all-gather)."""
        return self._to_next(2 * (self.size - 1) * num_bytes // self.size)

    def all_gather(self, num_bytes: int) -> Sent:
        """`num_bytes`: what each rank has in the end; it puts in a P-th. (P - 1) / P of them are sent."""
        return self._to_next((self.size - 1) * num_bytes // self.size)

    def broadcast(self, num_bytes: int, *, source: int) -> Sent:
        """From rank `source` of the group once around the ring: every rank but the last passes the bytes on."""
        return self._to_next(0 if (self.rank + 1) % self.size == source else num_bytes)

    def reduce(self, num_bytes: int, *, target: int) -> Sent:
        """Partial sums once around the ring to rank `target` of the group, which alone sends nothing."""
        return self._to_next(0 if self.rank == target else num_bytes)

    def to_each(self, num_bytes: Sequence[int]) -> Sent:
        """`num_bytes[r]` go straight to rank r of the group, as in an all-to-all. What stays here is not counted."""
        others = [
            (size, near) for to, (size, near) in enumerate(zip(num_bytes, self.is_near, strict=True)) if to != self.rank
        ]
        return Sent(sum(size for size, near in others if near), sum(size for size, near in others if not near))

    def _to_next(self, num_bytes: int) -> Sent:
        if self.size == 1:
            return Sent()
        return Sent(near=num_bytes) if self.is_near[(self.rank + 1) % self.size] else Sent(far=num_bytes)


def peers_of(group: dist.ProcessGroup, *, node_size: int, ledger: Ledger) -> Peers:
    """`group` as this rank sees it; ranks of the world are on the same node when rank div node_size is equal."""
    ranks = dist.get_process_group_ranks(group)
    node = dist.get_rank() // node_size
    return Peers(
        group=group,
        rank=dist.get_rank(group),
        size=len(ranks),
        is_near=tuple(rank // node_size == node for rank in ranks),
        ledger=ledger,
    )
