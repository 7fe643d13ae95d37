"""sort_routes by torch's own stable sort: what the right answer is, and the form for a CPU.

Called by: kernels/sort_routes and its tests.
"""

import torch
from torch import Tensor


def reference(ids_C: Tensor, *, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns int32 order_C, offsets_G and inverse_C: see SortedRoutes."""
    order_C = ids_C.sort(stable=True).indices
    places_C = torch.arange(len(order_C), device=ids_C.device)
    inverse_C = torch.empty_like(order_C).index_copy_(0, order_C, places_C)
    offsets_G = torch.bincount(ids_C, minlength=num_groups).cumsum(0)
    return order_C.int(), offsets_G.int(), inverse_C.int()
