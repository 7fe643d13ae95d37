"""sort_routes: the routed copies of a batch in the order of their experts; what every grouped kernel needs first.

Owns: the public function, its checks, and the choice of a backend. Does not own: which expert a row chose, and what is
done with the sorted copies. Called by: whoever lays out routed rows for kernels/grouped_matmul and kernels/expert_mlp.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.availability import why_not_triton
from kernels.sort_routes.reference import reference

BACKENDS = ("auto", "triton", "reference")
MAX_GROUPS = 2048  # a program keeps one counter per group in registers
ID_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True)
class SortedRoutes:
    """C routed copies (n-major, then choice) in ascending order of their group; copies of one group keep their order.

    order_C: int32, the copy at each place. offsets_G: int32, the end of each group's places. inverse_C: int32, the place of
    each copy: order_C[inverse_C[c]] == c.
    """

    order_C: Tensor
    offsets_G: Tensor
    inverse_C: Tensor


def sort_routes(ids_NK: Tensor, *, num_groups: int, backend: str = "auto") -> SortedRoutes:
    """Sort copies by group, stably; on a GPU in two launches without waiting for the device.

    Args:
        ids_NK: int32 or int64 group of each choice, any shape and strides; C is its number of elements, less than 2**31.
            Every id must be in [0, num_groups): on a GPU an id outside is undefined behaviour, since looking would stall.
        num_groups: G, at least 1, at most 2,048 for "triton".
        backend: "triton"; "reference", which is torch's stable sort; "auto" is the first on a GPU, the second on a CPU.

    Raises:
        ValueError: dtypes, sizes or ids (on a CPU) that break the above, an unknown backend, or "triton" without a GPU.
    """
    if backend not in BACKENDS:
        raise ValueError(f"the backend of sort_routes must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if ids_NK.dtype not in ID_DTYPES:
        raise ValueError(f"ids must be int32 or int64, got {ids_NK.dtype}: convert them")
    if num_groups < 1 or ids_NK.numel() >= 2**31:
        raise ValueError(
            f"sort_routes needs at least 1 group and fewer than 2**31 ids, got {num_groups} groups and {ids_NK.numel()} ids"
        )
    if ids_NK.is_cpu and ids_NK.numel():
        low, high = (int(value) for value in torch.aminmax(ids_NK))
        if low < 0 or high >= num_groups:
            raise ValueError(f"ids must be in [0, num_groups), got {low} to {high} for {num_groups} groups")
    if backend == "auto":
        backend = "triton" if ids_NK.is_cuda and num_groups <= MAX_GROUPS else "reference"
    ids_C = ids_NK.reshape(-1)
    if backend == "reference":
        return SortedRoutes(*reference(ids_C, num_groups=num_groups))
    if reason := why_not_triton(ids_NK.device.type):
        raise ValueError(f"sort_routes: {reason}")
    if num_groups > MAX_GROUPS:
        raise ValueError(
            f"the triton backend of sort_routes takes at most {MAX_GROUPS} groups, got {num_groups}: choose the reference backend"
        )
    from kernels.sort_routes.kernel import sort

    return SortedRoutes(*sort(ids_C.contiguous(), num_groups))
