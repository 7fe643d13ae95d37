"""What torch.autocast does to the inputs of an op. Called by: the public functions of kernels/<op>/."""

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of autocast on the tensor's device; its own where autocast is off, and of float64."""
    device_type = tensor.device.type
    off = not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type)
    return tensor.dtype if off or tensor.dtype == torch.float64 else torch.get_autocast_dtype(device_type)


def as_autocast(tensor: Tensor) -> Tensor:
    """What autocast does to an input of torch.matmul."""
    return tensor.to(autocast_dtype(tensor))
