"""shift_mix as its definition reads, in any dtype. Owns: what the right answer is. Does not own: checks (the public functions).

Called by: kernels/shift_mix, its tests, its benchmark.
"""

import torch
from torch import Tensor


def reference(
    u_BSD: Tensor,
    a_X: Tensor,
    b_X: Tensor,
    *,
    shifts: tuple[int, ...],
    boundary: str,
    document_ids_BS: Tensor | None = None,
) -> Tensor:
    """y[t] = a * u[t] + b * v[t], v[t] the token `shift` positions before t of the same document, or what `boundary` says."""
    dtype, wide = u_BSD.dtype, torch.promote_types(torch.promote_types(u_BSD.dtype, a_X.dtype), torch.float32)
    u_BSD, a_X, b_X = (each.to(wide) for each in (u_BSD, a_X, b_X))
    batch, length, width = u_BSD.shape
    ids_BS = u_BSD.new_zeros(batch, length, dtype=torch.int64) if document_ids_BS is None else document_ids_BS
    first_BS = (ids_BS[:, :, None] == ids_BS[:, None]).int().argmax(2) if length else ids_BS
    position_S = torch.arange(length, device=u_BSD.device)
    parts = []
    for u_BSY, shift in zip(u_BSD.chunk(len(shifts), dim=2), shifts, strict=True):
        inside_BS1 = (position_S - shift >= first_BS)[..., None]
        source_BS = torch.maximum(position_S - shift, first_BS)
        v_BSY = u_BSY.gather(1, source_BS[..., None].expand_as(u_BSY))
        outside = {"zero": torch.zeros_like(u_BSY), "self": u_BSY, "clamp": v_BSY}[boundary]
        parts.append(torch.where(inside_BS1, v_BSY, outside))
    a_D, b_D = (factors.repeat_interleave(width // len(factors)) for factors in (a_X, b_X))
    return (a_D * u_BSD + b_D * torch.cat(parts, dim=2)).to(dtype)
