"""The optimizer's choice and its learning rate: which parameters decay, and a schedule that is a pure function of the step.

Does not own the update itself (torch.optim) nor where its state lives (train/engine.py, parallel/zero.py).
"""

import math
from typing import Any

import torch
from torch import nn

from model.parameters import logical_parameters
from train.config import OptimConfig


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Named groups: matrices that decay, and the rest. Vectors never decay, nor does what is declared so: routers (specs of arXiv
    2312.07987, P18), tables and sub-keys.
    """
    decaying, others = [], []
    for parameter in logical_parameters(model):
        decays = parameter.spec.decays and len(parameter.spec.shape) > 1
        (decaying if decays and weight_decay > 0 else others).append(parameter.tensor)
    groups = [
        {"name": "decay", "params": decaying, "weight_decay": weight_decay},
        {"name": "no_decay", "params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or plain SGD over `parameter_groups`."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def learning_rate(step: int, config: OptimConfig, *, num_steps: int) -> float:
    """Rate of update `step` (0 is the first): linear warmup, then constant or a cosine down to min_lr_ratio * lr at num_steps."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)
