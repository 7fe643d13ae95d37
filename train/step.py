"""One optimizer step: its micro-steps forward and backward, then the update. Also the one place that makes a loss of the logits.

The loss of a micro-step is the sum over its targets on all ranks divided by their number (at least 1), plus the auxiliary loss; a
step's loss is the mean over its micro-steps. Engines average gradients over ranks, so each rank's share of the cross-entropy is
multiplied by their number; the auxiliary loss is already the same value on every rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.loader import Batch
from model.context import BatchContext, document_mask
from model.loss import IGNORED, cross_entropy_sum
from model.router import RouterReport
from train.engine import Engine, World


@dataclass(frozen=True)
class StepSettings:
    """What every step of a run shares: micro-steps per step, seed of the dropout masks, whether attention stays in documents."""

    accumulation_steps: int
    seed: int
    mask_documents: bool


@dataclass(frozen=True)
class StepResult:
    """A step seen by all ranks together. loss and auxiliary_loss in nats, mean over micro-steps; grad_norm before clipping.

    num_targets and num_bytes: of all ranks. reports: this rank's router reports, summed over micro-steps (see `total_reports`).
    """

    loss: float
    auxiliary_loss: float
    grad_norm: float
    num_targets: int
    num_bytes: int
    reports: dict[str, RouterReport]


@dataclass
class _Totals:
    """Sums over a step's micro-steps of this rank's shares."""

    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    auxiliary_loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    num_targets: int = 0
    num_bytes: int = 0
    reports: dict[str, RouterReport] = field(default_factory=dict)


def context_of(batch: Batch, settings: StepSettings, *, step: int, device: torch.device) -> BatchContext:
    """What the layers may know of a batch's rows."""
    mask = document_mask(batch.document_ids_BS.to(device)) if settings.mask_documents else None
    return BatchContext(batch.positions_B.to(device), mask, settings.seed, step)


def train_step(
    engine: Engine, batches: Iterator[Batch], world: World, settings: StepSettings, *, step: int, lr: float
) -> StepResult:
    """Runs step number `step` (0 is the first) on the next micro-steps of `batches`.

    Raises:
        RuntimeError: the loss or the gradient norm is not finite, on every rank alike. Checkpoints stay as they are.
    """
    engine.model.train()
    totals = _Totals()
    for micro_step in range(settings.accumulation_steps):
        last = micro_step == settings.accumulation_steps - 1
        _micro_step(engine, next(batches), world, settings, totals, step=step, last=last)
    grad_norm = engine.step(lr)
    result = _reduce(totals, world, grad_norm=grad_norm, accumulation_steps=settings.accumulation_steps)
    if not (torch.tensor([result.loss, result.auxiliary_loss, grad_norm]).isfinite().all()):
        raise RuntimeError(
            f"the loss and the gradient norm must be finite, but at step {step + 1} the loss is {result.loss}, the auxiliary loss "
            f"{result.auxiliary_loss} and the gradient norm {grad_norm}: lower optim.lr or clip_grad_norm in a run with "
            "another run.dir"
        )
    return result


def _micro_step(
    engine: Engine, batch: Batch, world: World, settings: StepSettings, totals: _Totals, *, step: int, last: bool
) -> None:
    targets_BS = batch.targets_BS.to(world.device)
    local_targets = (batch.targets_BS != IGNORED).sum().to(torch.int64)
    num_targets = max(1, int(world.sum(local_targets.view(1)).item()))
    output = engine.forward(
        batch.tokens_BS.to(world.device), context_of(batch, settings, step=step, device=world.device)
    )
    loss_sum = cross_entropy_sum(output.logits_BSV, targets_BS)
    engine.backward(loss_sum * (world.world_size / num_targets) + output.auxiliary_loss, last=last)

    totals.loss += loss_sum.detach().double().cpu() / num_targets
    totals.auxiliary_loss += output.auxiliary_loss.detach().double().cpu()
    totals.num_targets += int(local_targets)
    totals.num_bytes += batch.num_bytes
    for name, report in output.reports.items():
        seen = totals.reports.get(name)
        totals.reports[name] = (
            report if seen is None else RouterReport(*(a + b for a, b in zip(seen, report, strict=True)))
        )


def _reduce(totals: _Totals, world: World, *, grad_norm: float, accumulation_steps: int) -> StepResult:
    counts = torch.tensor([totals.num_targets, totals.num_bytes], dtype=torch.float64)  # exact below 2**53
    sums = world.sum(torch.cat([totals.loss.view(1), totals.auxiliary_loss.view(1), counts])).tolist()
    return StepResult(
        loss=sums[0] / accumulation_steps,
        auxiliary_loss=sums[1] / world.world_size / accumulation_steps,
        grad_norm=grad_norm,
        num_targets=int(sums[2]),
        num_bytes=int(sums[3]),
        reports=totals.reports,
    )


def total_reports(reports: dict[str, RouterReport], world: World) -> dict[str, RouterReport]:
    """Router reports summed over ranks, by one all-reduce of all of them."""
    if not reports:
        return {}
    flat = world.sum(torch.cat([part.flatten() for report in reports.values() for part in report]))
    parts = iter(flat.split([part.numel() for report in reports.values() for part in report]))
    return {name: RouterReport(*(next(parts).view_as(part) for part in report)) for name, report in reports.items()}
