"""What attention keeps of earlier positions while it decodes: keys and values, in buffers that grow by doubling.

Owns the buffers and which positions stay visible. A mixer makes its own cache (`new_cache`) and is handed it with each piece of tokens;
model/decode.py drives all layers. Shape letters: B rows, H heads, S new positions, M visible positions, C width.
"""

from typing import Protocol

from torch import Tensor


class Cache(Protocol):
    """A mixer's state while it decodes B rows. Changed in place by each forward pass; carries no gradient."""

    @property
    def length(self) -> int:
        """Positions seen so far."""
        ...

    @property
    def num_floats(self) -> int:
        """Floats held for each row."""
        ...


class KeyValueCache:
    """Keys and values (B, H, positions, C) of the positions that a new one may look at.

    Without memory all positions stay visible. With `memory_blocks` C >= 1 they are those of a row of training: positions come in blocks
    of `block_length`, and a block sees itself and the C blocks before it (Transformer-XL, as arXiv 2312.07987 uses it).
    """

    def __init__(self, *, block_length: int, memory_blocks: int) -> None:
        self.block_length = block_length
        self.memory_blocks = memory_blocks
        self.length = 0
        self._first = 0  # position of the oldest visible key
        self._key: Tensor | None = None  # (B, H, capacity, C), of which length - _first are in use
        self._value: Tensor | None = None

    @property
    def num_floats(self) -> int:
        if self._key is None or self._value is None:
            return 0
        widths = [part.shape[1] * part.shape[3] for part in (self._key, self._value)]
        return (self.length - self._first) * sum(widths)

    def extend(self, key_BHSC: Tensor, value_BHSC: Tensor) -> tuple[Tensor, Tensor]:
        """Takes S new positions; gives the keys and values (B, H, M, C) that they may look at, themselves last.

        Raises:
            ValueError: with memory, the new positions do not lie in one block.
        """
        new = key_BHSC.shape[2]
        if self.memory_blocks:
            inside = self.length % self.block_length
            if inside + new > self.block_length:
                raise ValueError(
                    f"new positions must lie in one block, but {new} come after {inside} of a block of {self.block_length}: "
                    "give them in pieces that end where the block does"
                )
            if inside == 0:
                self._forget_before(self.length - self.memory_blocks * self.block_length)
        used = self.length - self._first
        self._key = _with_room(self._key, key_BHSC, used=used)
        self._value = _with_room(self._value, value_BHSC, used=used)
        self._key[:, :, used : used + new] = key_BHSC
        self._value[:, :, used : used + new] = value_BHSC
        self.length += new
        return self._key[:, :, : used + new], self._value[:, :, : used + new]

    def _forget_before(self, position: int) -> None:
        gone = position - self._first
        if gone <= 0 or self._key is None or self._value is None:
            return
        kept = self.length - position
        for part in (self._key, self._value):
            part[:, :, :kept] = part[:, :, gone : gone + kept].clone()
        self._first = position


def _with_room(buffer: Tensor | None, new_BHSC: Tensor, *, used: int) -> Tensor:
    """A buffer with the same first `used` positions and room for the new ones; twice the size when it must grow."""
    needed = used + new_BHSC.shape[2]
    if buffer is not None and buffer.shape[2] >= needed:
        return buffer
    rows, heads, _, width = new_BHSC.shape
    larger = new_BHSC.new_empty(rows, heads, max(needed, 2 * used), width)
    if buffer is not None:
        larger[:, :, :used] = buffer[:, :, :used]
    return larger
