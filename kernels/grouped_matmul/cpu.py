"""The two ways to compute grouped_matmul with torch alone: its own grouped matmul, and a loop over the groups.

Owns: both paths and what torch's operation demands of its inputs. Does not own: checks of shapes and offsets, autocast
(the public function). Called by: kernels/grouped_matmul. Both are differentiable and plain torch, so they also serve a
GPU that has no kernel.py for this operation; there the loop waits for the device to read the offsets.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16  # bytes: what F.grouped_mm demands of the distance between two rows
# What F.grouped_mm computes in; on a GPU only bfloat16 is documented.
DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16,)}


def by_torch(rows_RM: Tensor, weights_GMN: Tensor, *, offsets_G: Tensor) -> Tensor:
    """rows_RN by one call of torch's grouped matmul; only for what `why_not_torch` has nothing against."""
    rows_RN = F.grouped_mm(_with_good_strides(rows_RM), _with_good_strides(weights_GMN), offs=offsets_G)
    if rows_RN.requires_grad:
        # The backward multiplies what arrives as it lies, and `y.sum().backward()` sends one number with strides 0.
        rows_RN.register_hook(_with_good_strides)
    return rows_RN


def by_loop(rows_RM: Tensor, weights_GMN: Tensor, *, offsets_G: Tensor) -> Tensor:
    """rows_RN by one matmul per group, in any dtype and any width."""
    ends = offsets_G.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    # Split and unbound, never indexed: the backward of weights[g] writes a gradient of the whole bank for each group
    # (26 times a dense matmul at 64 experts), that of unbind stacks them once.
    products = [rows @ weights for rows, weights in zip(rows_RM.split(sizes), weights_GMN.unbind(), strict=True)]
    return torch.cat(products)


def why_not_torch(dtype: torch.dtype, *, device_type: str, widths: Iterable[int]) -> str | None:
    """The reason why `by_torch` cannot compute in this dtype with these widths (every M and N), or None if it can."""
    dtypes = DTYPES.get(device_type, ())
    if dtype not in dtypes:
        return (
            f"the torch backend of grouped_matmul on {device_type} computes in {list(dtypes)}, got {dtype}: "
            "choose the loop backend"
        )
    step = ALIGNMENT // dtype.itemsize
    for width in widths:
        if width % step:
            return (
                f"the torch backend of grouped_matmul needs widths that are multiples of {step} in {dtype} "
                f"({ALIGNMENT} bytes), got {width}: pad it to {-(-width // step) * step}, or choose the loop backend"
            )
    return None


def _with_good_strides(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are dense and as far apart as F.grouped_mm demands, else a contiguous copy.

    `tensor.contiguous()` would not do: it returns a tensor of one row, or of none, with its strides of 0.
    """
    down, right = tensor.stride()[-2:]
    good = right == 1 and down >= max(1, tensor.shape[-1]) and down * tensor.itemsize % ALIGNMENT == 0
    if good and (tensor.is_cpu or tensor.data_ptr() % ALIGNMENT == 0):  # a GPU also looks at the first element
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
