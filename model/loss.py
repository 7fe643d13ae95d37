"""Cross-entropy over this rank's rows, as a sum: the division by the micro-step's targets needs all ranks and happens in train/step.py."""

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def cross_entropy_sum(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Sum in nats, float32 (or wider), over the targets that are not IGNORED; exactly zero, and differentiable, when there are none."""
    logits_TV = logits_BSV.flatten(0, 1)
    logits_TV = logits_TV if logits_TV.dtype.itemsize >= 4 else logits_TV.float()
    return F.cross_entropy(logits_TV, targets_BS.flatten(), ignore_index=IGNORED, reduction="sum")
