"""A rank's part of a checkpoint, copied to host memory: what a save waits for before the next step may change the tensors.

Owns that memory, which stays from save to save (on a CPU its pages are then there already; for a GPU it is pinned, so that the copy
runs at the speed of the bus). Does not own what is saved. Called by train/saver.py.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.fragments import Fragment

logger = logging.getLogger(__name__)

ALIGNMENT = 64  # bytes: a line of the processor's cache, and a multiple of the size of every element


@dataclass(frozen=True)
class Copied:
    """What was handed in, in host memory."""

    fragments: list[Fragment]
    tensors: dict[str, Tensor]


class HostCopy:
    """Holds one copy at a time: `take` overwrites what it gave before."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._is_pinned = False

    def take(self, fragments: Sequence[Fragment], tensors: Mapping[str, Tensor]) -> Copied:
        """Copies every tensor; returns when all are there.

        Raises:
            RuntimeError: there is not as much host memory.
        """
        sources = [view for fragment in fragments for view in fragment.tensors.values()] + list(tensors.values())
        needed = sum(_room(source) for source in sources)
        if needed > self._buffer.numel():
            self._allocate(needed, pin=any(source.is_cuda for source in sources))
        copies, offset = [], 0
        for source in sources:
            size = source.numel() * source.itemsize
            copy = self._buffer[offset : offset + size].view(source.dtype).reshape(source.shape)
            copies.append(copy.copy_(source.detach(), non_blocking=True))
            offset += _room(source)
        if any(source.is_cuda for source in sources):
            torch.cuda.current_stream().synchronize()
        taken = iter(copies)
        parts = [replace(one, tensors={kind: next(taken) for kind in one.tensors}) for one in fragments]
        return Copied(parts, {name: next(taken) for name in tensors})

    def close(self) -> None:
        """Gives the memory back; what `take` gave may no longer be used."""
        if self._is_pinned:
            _cudart().cudaHostUnregister(self._buffer.data_ptr())
        self._buffer, self._is_pinned = torch.empty(0, dtype=torch.uint8), False

    def _allocate(self, num_bytes: int, *, pin: bool) -> None:
        self.close()
        try:
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise RuntimeError(
                f"a checkpoint is copied to host memory before it is written, but {num_bytes} bytes of it are not to be had: "
                "free memory, start fewer processes on a machine, or set checkpoint.asynchronous to false"
            ) from error
        if pin:
            # not pin_memory=True: torch's pool of pinned memory rounds 9 GiB up to 16. 1: pinned for every context
            failed = int(_cudart().cudaHostRegister(self._buffer.data_ptr(), num_bytes, 1))
            self._is_pinned = not failed
            if failed:
                logger.warning(
                    "%d bytes of host memory cannot be pinned (CUDA error %d): copies to it will be slower",
                    num_bytes,
                    failed,
                )


def _cudart() -> Any:
    return torch.cuda.cudart()


def _room(source: Tensor) -> int:
    """Bytes that a tensor takes in the buffer."""
    return -(-source.numel() * source.itemsize // ALIGNMENT) * ALIGNMENT
