"""Rotary positions on the first half of a head's channels, as SwitchHead's RoPE models use them (specs of arXiv 2312.07987)."""

import torch
from torch import Tensor

BASE = 10_000.0


def rotary_width(head_dim: int) -> int:
    """Rotated channels of a head: half of them, rounded down to an even number."""
    return head_dim // 2 // 2 * 2


def rotate(x_BHSC: Tensor) -> Tensor:
    """Rotates the first `rotary_width(C)` channels by their positions 0..S-1 (pairs: channel i with i + width/2), in float32 or wider.

    The rest of the channels passes through. Angles are position * 10000^(-2 i / width).
    """
    length, head_dim = x_BHSC.shape[-2:]
    width = rotary_width(head_dim)
    if width == 0:
        return x_BHSC
    angle_dtype = torch.promote_types(x_BHSC.dtype, torch.float32)
    device = x_BHSC.device
    frequencies = BASE ** (-torch.arange(0, width, 2, device=device, dtype=angle_dtype) / width)
    angles_SR = torch.arange(length, device=device, dtype=angle_dtype)[:, None] * frequencies
    cos_SR, sin_SR = angles_SR.cos(), angles_SR.sin()
    first, second, rest = x_BHSC.split([width // 2, width // 2, head_dim - width], dim=-1)
    rotated = torch.cat([first * cos_SR - second * sin_SR, first * sin_SR + second * cos_SR], dim=-1)
    return torch.cat([rotated.to(x_BHSC.dtype), rest], dim=-1)
