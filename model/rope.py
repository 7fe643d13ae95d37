"""Rotary positions on the first channels of a head, as SwitchHead's RoPE models use them (arXiv 2312.07987; specs, section 5).

How many channels is the config's choice (model/attention_config.py). Called by attend.py.
"""

import torch
from torch import Tensor

BASE = 10_000.0


def rotate(x_BHSC: Tensor, *, width: int, first: int = 0) -> Tensor:
    """Rotates the first `width` channels by their positions first, first + 1, ... (pairs: channel i with i + width/2).

    width is even, at least 2 and at most C; the rest of the channels passes through. Angles are position * 10000^(-2 i / width), in
    float32 or wider.
    """
    length, head_dim = x_BHSC.shape[-2:]
    angle_dtype = torch.promote_types(x_BHSC.dtype, torch.float32)
    device = x_BHSC.device
    frequencies = BASE ** (-torch.arange(0, width, 2, device=device, dtype=angle_dtype) / width)
    angles_SR = torch.arange(first, first + length, device=device, dtype=angle_dtype)[:, None] * frequencies
    cos_SR, sin_SR = angles_SR.cos(), angles_SR.sin()
    real, imaginary, rest = x_BHSC.split([width // 2, width // 2, head_dim - width], dim=-1)
    rotated = torch.cat([real * cos_SR - imaginary * sin_SR, real * sin_SR + imaginary * cos_SR], dim=-1)
    return torch.cat([rotated.to(x_BHSC.dtype), rest], dim=-1)
