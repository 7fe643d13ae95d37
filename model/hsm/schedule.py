"""How far each layer shifts: powers of two over the depth, and what happens beyond the last of them.

Owns the schedule and its wrap modes; pure arithmetic on the list of mixers, without torch. Does not own which settings go together
(model/hsm/config.py). Called by the config. All of it is our reading of arXiv 2601.22852, see docs/hsm.md.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

KIND = "hsm"
Wrap = Literal["repeat", "hold", "random"]
Hybrid = Literal["skip", "compress"]


@dataclass(frozen=True)
class Schedule:
    """Shifts 1, 2, 4 .. 2^(num_shifts - 1) over the slots of a model, then on by `wrap`.

    num_shifts: distinct shifts before the wrap; None gives every slot its own. hybrid: whether a layer of another kind takes up a slot
    (skip: its shift is left out) or not (compress: the next HSM layer gets the shift).
    """

    num_shifts: int | None
    wrap: Wrap
    hybrid: Hybrid

    def shift(self, mixers: Sequence[str], *, depth: int, head: int = 0) -> int:
        """The shift of the HSM layer at `depth`; `mixers` is every layer's kind. Head h is h slots ahead of the layer."""
        slots = len(mixers) if self.hybrid == "skip" else mixers.count(KIND)
        slot = depth if self.hybrid == "skip" else mixers[:depth].count(KIND)
        return 2 ** self._exponent(slot + head, self.num_shifts or slots)

    def _exponent(self, slot: int, num_shifts: int) -> int:
        if slot < num_shifts or self.wrap == "repeat":
            return slot % num_shifts
        if self.wrap == "hold":
            return num_shifts - 1
        digest = hashlib.blake2b(f"hsm/{slot}".encode(), digest_size=8).digest()  # the same at every layout and seed
        return int.from_bytes(digest, "little") % num_shifts


def largest_num_shifts(length: int) -> int:
    """How many of the shifts 1, 2, 4 .. are below `length`: with all of them once, every pair of a row of that length can meet."""
    return (length - 1).bit_length()
