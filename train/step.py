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
from model.context import BatchContext
from model.loss import IGNORED, cross_entropy_sum
from model.memory import StreamMemory
from model.parameters import add_updates
from model.router import RouterReport
from model.transformer import ModelOutput
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

    nats: the cross-entropy summed over all targets, which the mean over micro-steps does not give when their numbers of targets
    differ. num_targets and num_bytes: of all ranks. reports: this rank's router reports, summed over micro-steps (see
    `total_reports`).
    """

    loss: float
    auxiliary_loss: float
    grad_norm: float
    nats: float
    num_targets: int
    num_bytes: int
    reports: dict[str, RouterReport]


@dataclass
class _Totals:
    """Sums over a step's micro-steps of this rank's shares; the tensors stay on the device and are read once, at the step's end."""

    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    auxiliary_loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    nats: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    num_targets: int = 0
    num_bytes: int = 0
    reports: dict[str, RouterReport] = field(default_factory=dict)


def forward(
    engine: Engine,
    batch: Batch,
    settings: StepSettings,
    *,
    step: int,
    device: torch.device,
    memory: StreamMemory | None,
) -> ModelOutput:
    """The model on a batch, with the memory of its rows, which then remembers them; in training its states are updated."""
    past = None if memory is None else memory.read(batch.positions_B, batch.continues_B)
    documents_BS = batch.document_ids_BS.to(device) if settings.mask_documents else None
    context = BatchContext(batch.positions_B.to(device), documents_BS, settings.seed, step, past)
    output = engine.forward(batch.tokens_BS.to(device), context)
    if memory is not None and past is not None:
        memory.write(past, batch.positions_B, output.layer_inputs)
    if engine.model.training:
        add_updates(engine.model, output.updates)
    return output


def train_step(
    engine: Engine,
    batches: Iterator[Batch],
    world: World,
    settings: StepSettings,
    *,
    step: int,
    lr: float,
    memory: StreamMemory | None = None,
) -> StepResult:
    """Runs step number `step` (0 is the first) on the next micro-steps of `batches`.

    memory: of this rank's streams, where a mixer has memory; it moves on with the rows.

    Raises:
        RuntimeError: the loss or the gradient norm is not finite, or a rank could not read its rows: on every rank alike.
            Checkpoints stay as they are.
    """
    world.begin_step(step + 1)
    engine.model.train()
    totals = _Totals()
    for micro_step in range(settings.accumulation_steps):
        last = micro_step == settings.accumulation_steps - 1
        _micro_step(engine, batches, world, settings, totals, step=step, last=last, memory=memory)
    grad_norm = engine.step(lr)
    if engine.model.balances:
        engine.model.balance(total_reports(totals.reports, world))
    result = _reduce(totals, world, grad_norm=grad_norm, accumulation_steps=settings.accumulation_steps)
    world.end_step()
    if not (torch.tensor([result.loss, result.auxiliary_loss, grad_norm]).isfinite().all()):
        raise RuntimeError(
            f"the loss and the gradient norm must be finite, but at step {step + 1} the loss is {result.loss}, the auxiliary loss "
            f"{result.auxiliary_loss} and the gradient norm {grad_norm}: lower optim.lr or clip_grad_norm in a run with "
            "another run.dir"
        )
    return result


def _micro_step(
    engine: Engine,
    batches: Iterator[Batch],
    world: World,
    settings: StepSettings,
    totals: _Totals,
    *,
    step: int,
    last: bool,
    memory: StreamMemory | None,
) -> None:
    batch, num_targets = _next_batch(batches, world)
    targets_BS = batch.targets_BS.to(world.device)
    output = forward(engine, batch, settings, step=step, device=world.device, memory=memory)
    loss_sum = cross_entropy_sum(output.logits_BSV, targets_BS)
    engine.backward(loss_sum * (world.world_size / num_targets) + output.auxiliary_loss, last=last)

    nats = loss_sum.detach().double()
    totals.loss = totals.loss + nats / num_targets
    totals.nats = totals.nats + nats
    totals.auxiliary_loss = totals.auxiliary_loss + output.auxiliary_loss.detach().double()
    totals.num_targets += int((batch.targets_BS != IGNORED).sum())
    totals.num_bytes += batch.num_bytes
    for name, report in output.reports.items():
        totals.reports[name] = totals.reports[name].plus(report) if name in totals.reports else report


def _next_batch(batches: Iterator[Batch], world: World) -> tuple[Batch, int]:
    """This rank's next rows, and the number of targets of all ranks (at least 1); what fails on one rank is raised on all.

    One all-reduce of 16 bytes over all ranks: the counts, and how many ranks failed, which so costs nothing.
    """
    batch, error = None, None
    try:
        batch = next(batches)
    except Exception as caught:  # mostly a damaged shard; the others would wait for this rank in their first exchange
        error = caught
    local_targets = 0 if batch is None else int((batch.targets_BS != IGNORED).sum())
    num_targets, failed = world.sum(torch.tensor([local_targets, int(batch is None)])).tolist()
    if failed:
        world.raise_together(error)
    assert batch is not None
    return batch, max(1, num_targets)


def _reduce(totals: _Totals, world: World, *, grad_norm: float, accumulation_steps: int) -> StepResult:
    counts = torch.tensor([totals.num_targets, totals.num_bytes], dtype=torch.float64)  # exact below 2**53
    losses = torch.stack([totals.loss, totals.auxiliary_loss, totals.nats])
    sums = world.sum(torch.cat([losses, counts.to(losses.device)])).tolist()
    return StepResult(
        loss=sums[0] / accumulation_steps,
        auxiliary_loss=sums[1] / world.world_size / accumulation_steps,
        grad_norm=grad_norm,
        nats=sums[2],
        num_targets=int(sums[3]),
        num_bytes=int(sums[4]),
        reports=totals.reports,
    )


def total_reports(reports: dict[str, RouterReport], world: World) -> dict[str, RouterReport]:
    """Router reports summed over ranks, by one all-reduce of all of them."""
    if not reports:
        return {}
    flat = world.sum(torch.cat([part.flatten() for report in reports.values() for part in report]))
    parts = iter(flat.split([part.numel() for report in reports.values() for part in report]))
    return {name: RouterReport(*(next(parts).view_as(part) for part in report)) for name, report in reports.items()}
