"""Who may look at whom: one description of the visible keys, from which each form of attention builds as much as it needs.

A mask tensor over all queries is quadratic in the length; an attention that works in chunks asks for a few rows at a time. Made by
model/attend.py, used by every form of attention. Shape letters: B rows, S queries, M keys.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class KeyMask:
    """Which of M keys each of S queries may look at.

    The last S keys are the queries' own positions, and a query sees those up to its own. The M - S before them came earlier (memory
    or a cache) and are seen by all queries, as far as they are filled.

    documents_BS: keeps attention inside a document, which is a run of equal ids; only where M = S. filled_B: int64, how many of the
    earlier keys are filled, the newest ones; None means all.
    """

    num_queries: int
    num_keys: int
    device: torch.device
    documents_BS: Tensor | None = None
    filled_B: Tensor | None = None

    def __post_init__(self) -> None:
        if self.documents_BS is not None and self.num_keys != self.num_queries:
            raise ValueError(
                f"a document mask needs as many keys as queries, but there are {self.num_keys} keys and {self.num_queries} queries: "
                "documents of earlier keys are not known"
            )

    @property
    def is_causal(self) -> bool:
        """Nothing but the plain causal mask of a square: no tensor is needed to say it."""
        return self.num_keys == self.num_queries and self.documents_BS is None

    def first_keys(self) -> Tensor | None:
        """int64 (B, S), the lowest key that each query sees; it does not decrease along S. None: all queries see key 0."""
        if self.documents_BS is not None:
            # Where a document begins: the newest place whose id is not that of the place before.
            changes_BS = self.documents_BS[:, 1:] != self.documents_BS[:, :-1]
            places_S = torch.arange(1, self.num_queries, device=self.device)
            return F.pad(torch.where(changes_BS, places_S, 0), (1, 0)).cummax(1).values
        earlier = self.num_keys - self.num_queries
        if self.filled_B is None or earlier == 0:
            return None
        return (earlier - self.filled_B).clamp(min=0)[:, None].expand(-1, self.num_queries)

    def rows(self, first: int, last: int) -> Tensor:
        """bool (B or 1, 1, last - first, M) for the queries first..last-1: True where a key is visible."""
        key_M = torch.arange(self.num_keys, device=self.device)
        query_R1 = torch.arange(first, last, device=self.device)[:, None] + self.num_keys - self.num_queries
        visible = (key_M <= query_R1)[None, None]
        first_BS = self.first_keys()
        if first_BS is not None:
            visible = visible & (key_M >= first_BS[:, None, first:last, None])
        return visible
