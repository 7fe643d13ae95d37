"""What a layer may know of its rows besides their hidden states, and the dropout that depends on nothing else.

Dropout masks are a function of (seed, step, site, depth, position, offset in the row, channel): the same at every layout, under
recompute, and after a resume. So no generator has a state that a checkpoint would have to keep.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Memory:
    """Transformer-XL state memory of B rows: what the layers were given in the rows before.

    states: by depth of a layer with memory, (B, M, D) of the residual stream before the layer's norm, without gradient.
    filled_B: int64, how many of a layer's M positions are filled, the newest ones; M or more means all.
    """

    states: dict[int, Tensor]
    filled_B: Tensor


@dataclass(frozen=True)
class BatchContext:
    """Facts about the B rows of a forward pass.

    positions_B: int64, the data position of each row. document_ids_BS: equal inside a document; None lets a row be one document.
    seed and step choose the dropout masks. memory: only where a mixer has memory. depth: of the layer that is being computed, which
    the Transformer sets for each; -1 outside the layers. A layer asks here and not its own place: it may be used at several depths.
    """

    positions_B: Tensor
    document_ids_BS: Tensor | None
    seed: int
    step: int
    memory: Memory | None = None
    depth: int = -1

    @property
    def memory_BMD(self) -> Tensor | None:
        """The memory of the layer at `depth`, if it has one."""
        return None if self.memory is None else self.memory.states.get(self.depth)

    @property
    def num_memory(self) -> int:
        """Positions of memory that come before the row's own in what the mixer is given."""
        return 0 if self.memory_BMD is None else self.memory_BMD.shape[1]


def dropout(x_BSC: Tensor, context: BatchContext, *, probability: float, site: str) -> Tensor:
    """Zeroes each element with `probability` and scales the rest by 1 / (1 - probability). Call it only in training."""
    if probability == 0.0:
        return x_BSC
    keep_BSC = keep_mask(context, x_BSC.shape[1], x_BSC.shape[2], probability=probability, site=site)
    return x_BSC * keep_BSC.to(x_BSC.dtype) / (1.0 - probability)


def keep_mask(context: BatchContext, length: int, channels: int, *, probability: float, site: str) -> Tensor:
    """bool (B, length, channels), True with chance 1 - probability, by hashing the coordinates of each element."""
    tokens_BS = token_hashes(context, length, site=site)
    return keep_channels(tokens_BS, channels, probability=probability)


def token_hashes(context: BatchContext, length: int, *, site: str) -> Tensor:
    """int64 (B, length) in [0, 2**32): of each token. A mask that is made where the context is not known can start from it."""
    row_B = _row_hashes(context, site=site)
    return _mix(row_B[:, None] ^ _mix(torch.arange(length, device=row_B.device)))


def hash_with(hashes: Tensor, coordinate: Tensor) -> Tensor:
    """int64 in [0, 2**32): hashes with one more coordinate, an integer."""
    return _mix(hashes ^ _mix(coordinate.long() + _MASK_32 // 2))


def keep_channels(hashes: Tensor, channels: int, *, probability: float) -> Tensor:
    """bool (..., channels), True with chance 1 - probability, for each channel of each hash."""
    return hash_with(hashes[..., None], torch.arange(channels, device=hashes.device)) >= int(
        probability * (_MASK_32 + 1)
    )


def gaussian_noise(context: BatchContext, length: int, channels: int, *, site: str) -> Tensor:
    """float32 (B, length, channels), standard normal: the inverse of its distribution function at the hash of each element."""
    tokens_BS = token_hashes(context, length, site=site)
    hash_BSC = hash_with(tokens_BS[..., None], torch.arange(channels, device=tokens_BS.device))
    return torch.special.ndtri((hash_BSC.double() + 0.5) / (_MASK_32 + 1)).float()


def keep_at(context: BatchContext, *coordinates: Tensor, probability: float, site: str) -> Tensor:
    """bool, True with chance 1 - probability, by hashing the given coordinates after the position of each row.

    coordinates: integers, also negative ones, whose meaning is the caller's; each broadcastable to the result's shape (B, ...), one
    of them with as many axes. With (offset, channel) of all elements this is `keep_mask`; here single elements can be asked for.
    """
    state = _row_hashes(context, site=site).view(-1, *(1 for _ in range(max(x.ndim for x in coordinates) - 1)))
    for place, coordinate in enumerate(coordinates):
        state = _mix(state ^ _mix(coordinate.long() + place * (_MASK_32 // 2)))
    return state >= int(probability * (_MASK_32 + 1))


def _row_hashes(context: BatchContext, *, site: str) -> Tensor:
    """int64 (B,) in [0, 2**32): of each row at a site of the layer that is being computed, in this step of this run."""
    digest = hashlib.blake2b(f"{context.seed}/{context.step}/{site}/{context.depth}".encode(), digest_size=4).digest()
    key, positions_B = int.from_bytes(digest, "little"), context.positions_B
    return _mix(_mix((positions_B & _MASK_32) ^ key) ^ (positions_B >> 32))


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser with little bias (xor-shift-multiply) of the low 32 bits of an int64 tensor."""
    x = x & _MASK_32  # a copy, changed in place from here on: half the time of new tensors
    x.bitwise_xor_(x >> 16).mul_(0x7FEB352D).bitwise_and_(_MASK_32)
    x.bitwise_xor_(x >> 15).mul_(0x846CA68B).bitwise_and_(_MASK_32)
    return x.bitwise_xor_(x >> 16)
