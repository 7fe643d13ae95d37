"""The shift S_s: every position is handed the token s positions before it, of its own document, and never one after it.

Owns the shift over a whole row and over the next positions of a row (with the ring of tokens that such a continuation needs), and
what stands in where there is no earlier token. Does not own how far a layer shifts (schedule.py) nor what it makes of the two tokens
(mixing.py). Called by model/hsm/layer.py. Shape letters: B rows, S positions, D channels, R places of a ring.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.shift_mix import shift_mix_step
from model.hsm.config import Boundary


class Ring:
    """The last `size` tokens of B rows, for decoding: written in place, so a token costs the same however many came before.

    length: tokens seen in all; position p lies at place p mod size. Allocated by the first `append`. Inference only: no gradient.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.length = 0
        self.rows: Tensor | None = None

    @property
    def num_floats(self) -> int:
        """Floats per row held now: size * D after the first token."""
        return 0 if self.rows is None else self.rows.shape[1] * self.rows.shape[2]

    def read(self, first: int, count: int) -> Tensor:
        """(B, count, D): the tokens of positions first .. first + count - 1, which must be among the last `size` ones."""
        assert self.rows is not None
        assert max(0, self.length - self.size) <= first
        assert first + count <= self.length
        place = first % self.size
        before_end = self.rows[:, place : place + count]
        missing = count - before_end.shape[1]
        return torch.cat([before_end, self.rows[:, :missing]], dim=1) if missing else before_end

    def append(self, u_BSD: Tensor) -> None:
        """Takes up the next S tokens of each row. ValueError where the number of rows is another than before."""
        rows_BRD = self._rows_for(u_BSD)
        kept_BRD = u_BSD.detach()[:, -self.size :]
        self.length += u_BSD.shape[1]
        place = (self.length - kept_BRD.shape[1]) % self.size
        before_end = min(kept_BRD.shape[1], self.size - place)
        rows_BRD[:, place : place + before_end] = kept_BRD[:, :before_end]
        rows_BRD[:, : kept_BRD.shape[1] - before_end] = kept_BRD[:, before_end:]

    def mix(self, u_BD: Tensor, a_X: Tensor, b_X: Tensor, *, boundary: Boundary, backend: str) -> Tensor:
        """(B, D): a times the next token of each row plus b times the one `size` positions before; takes the token up, as `append`."""
        rows_BRD = self._rows_for(u_BD[:, None])
        y_BD = shift_mix_step(u_BD, rows_BRD, a_X, b_X, position=self.length, boundary=boundary, backend=backend)
        self.length += 1
        return y_BD

    def _rows_for(self, u_BSD: Tensor) -> Tensor:
        batch, _, width = u_BSD.shape
        if self.rows is None:
            self.rows = u_BSD.new_zeros(batch, self.size, width)
        if self.rows.shape[0] != batch:
            raise ValueError(
                f"a cache must go on with the rows it began with, but it holds {self.rows.shape[0]} rows and is given {batch}: "
                "use a new cache"
            )
        return self.rows


def shift(
    u_BSD: Tensor,
    amount: int,
    *,
    boundary: Boundary,
    document_ids_BS: Tensor | None = None,
    past: Ring | None = None,
) -> Tensor:
    """v (B, S, D) with v[t] = u[t - amount], from the document of t; where that has no such token, what `boundary` says.

    zero: zeros. self: u[t]. clamp: the first token of the document of t. A document is one run of equal ids, different from those of
    the row's other documents; without ids a row is one document. `past` holds the tokens before u, at least the last `amount`; it is
    read, not changed, and goes with rows of one document only.
    """
    length = u_BSD.shape[1]
    seen = 0 if past is None else past.length
    from_before = min(amount, length)
    outside = min(from_before, max(0, amount - seen))
    parts = [u_BSD[:, : length - from_before]]
    if past is not None and outside < from_before:
        parts.insert(0, past.read(seen - amount + outside, from_before - outside))
    if outside == 0:  # the stand-in may be gone from the ring, and nobody needs it any more
        return torch.cat(parts, dim=1)
    edge_BSD = _stand_in(u_BSD, boundary=boundary, document_ids_BS=document_ids_BS, past=past)
    v_BSD = torch.cat([edge_BSD[:, :outside], *parts], dim=1)
    if document_ids_BS is None:
        return v_BSD
    foreign_BS = document_ids_BS[:, from_before:] != document_ids_BS[:, : length - from_before]
    foreign_BS = F.pad(foreign_BS, (from_before, 0))  # the first ones have the stand-in already
    return torch.where(foreign_BS[:, :, None], edge_BSD, v_BSD)


def _stand_in(u_BSD: Tensor, *, boundary: Boundary, document_ids_BS: Tensor | None, past: Ring | None) -> Tensor:
    """(B, S, D): what each position is handed where its document has no token that far back."""
    if boundary == "zero":
        return u_BSD.new_zeros(()).expand_as(u_BSD)
    if boundary == "self":
        return u_BSD
    if document_ids_BS is None:
        first_B1D = past.read(0, 1) if past is not None and past.length else u_BSD[:, :1]
        return first_B1D.expand_as(u_BSD)
    begins_BS = F.pad(document_ids_BS[:, 1:] != document_ids_BS[:, :-1], (1, 0), value=True)
    position_S = torch.arange(u_BSD.shape[1], device=u_BSD.device)
    first_BS = (position_S * begins_BS).cummax(dim=1).values
    return u_BSD.gather(1, first_BS[:, :, None].expand_as(u_BSD))
