"""Logical tensors as the ranks hold them, in ranges of the whole or of a box of it, and put together again.

Called by the tests of tests/parallel that compare what several ranks hold with what one process does.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from model.parameters import Box


@dataclass(frozen=True)
class Piece:
    """A range of a logical tensor, or of the flat box of it, that one rank holds."""

    name: str
    shape: tuple[int, ...]
    start: int
    values: np.ndarray
    box: Box | None = None

    def elements(self) -> np.ndarray:
        """The flat indices of its values in the logical tensor."""
        every = np.arange(math.prod(self.shape)).reshape(self.shape)
        if self.box is not None:
            every = every[tuple(slice(first, end) for first, end in self.box)]
        return every.flatten()[self.start : self.start + self.values.size]


def assemble(pieces: Iterable[Piece]) -> dict[str, np.ndarray]:
    """Flat logical tensors from the pieces of all ranks; where two ranks hold the same element they must agree exactly."""
    whole: dict[str, np.ndarray] = {}
    for piece in pieces:
        target = whole.setdefault(piece.name, np.full(math.prod(piece.shape), np.nan, dtype=np.float32))
        before = target[piece.elements()]
        held = ~np.isnan(before)
        np.testing.assert_array_equal(before[held], piece.values[held], err_msg=f"replicas of {piece.name} differ")
        target[piece.elements()] = piece.values
    for name, values in whole.items():
        assert not np.isnan(values).any(), f"no rank holds a part of {name}"
    return whole
