"""The held-out loss: every target scored once, in the same rows at any layout (data/loader.py cuts them)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from data.loader import Batch
from model.loss import IGNORED, cross_entropy_sum
from model.memory import StreamMemory
from train.engine import Engine, World
from train.step import StepSettings, forward


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy in nats per target, and in bits per byte of text, over `num_targets` targets of `num_bytes` bytes."""

    loss: float
    bits_per_byte: float
    num_targets: int
    num_bytes: int


@torch.no_grad()
def evaluate(
    engine: Engine,
    batches: Iterable[Batch],
    world: World,
    settings: StepSettings,
    *,
    step: int,
    memory: StreamMemory | None = None,
) -> Evaluation:
    """Scores all batches; every rank must bring the same number of them. Leaves the model in training mode.

    memory: empty, of the evaluation's own streams, where a mixer has memory.
    """
    engine.model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        logits_BSV = forward(engine, batch, settings, step=step, device=world.device, memory=memory).logits_BSV
        sums[0] += cross_entropy_sum(logits_BSV, batch.targets_BS.to(world.device)).double().cpu()
        sums[1] += (batch.targets_BS != IGNORED).sum()
        sums[2] += batch.num_bytes
    engine.model.train()
    nats, num_targets, num_bytes = world.sum(sums).tolist()
    return Evaluation(
        loss=nats / max(1, num_targets),
        bits_per_byte=bits_per_byte(nats, num_bytes),
        num_targets=int(num_targets),
        num_bytes=int(num_bytes),
    )


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Cross-entropy in bits for each byte of text; end tokens count their nats but no bytes."""
    return nats / math.log(2) / max(1, num_bytes)
