"""One optimizer step: its micro-steps forward and backward, then the update. Also the one place that makes a loss of the logits.

The loss of a micro-step is the sum over its targets on all ranks divided by their number (at least 1), plus the auxiliary loss; a
step's loss is the mean over its micro-steps. Engines average gradients over ranks, so each rank's share of the cross-entropy is
multiplied by their number; the auxiliary loss is already the same value on every rank.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from data.loader import NO_DOCUMENT, Batch
from model.context import BatchContext
from model.loss import IGNORED, cross_entropy_sum
from model.memory import StreamMemory
from model.parameters import add_updates, states_of
from model.router import RouterReport
from model.transformer import ModelOutput
from train.engine import Engine, World
from train.watch import Figures, Finding, WatchState, judge
from train.watch_config import WatchConfig


@dataclass(frozen=True)
class StepSettings:
    """What every step of a run shares: micro-steps per step, seed of the dropout masks, whether attention stays in documents.

    watch: what is done at a bad step.
    """

    accumulation_steps: int
    seed: int
    mask_documents: bool
    watch: WatchConfig = field(default_factory=WatchConfig)


@dataclass(frozen=True)
class StepResult:
    """A step seen by all ranks together. loss and auxiliary_loss in nats, mean over micro-steps; grad_norm before clipping.

    nats: the cross-entropy summed over all targets, which the mean over micro-steps does not give when their numbers of targets
    differ. num_targets and num_bytes: of all ranks. reports: this rank's router reports, summed over micro-steps (see
    `total_reports`). ends: a rank was asked to end the run. finding: what is wrong with the step, None for a good one; document_ids: of
    this rank's rows, if it is bad.
    """

    loss: float
    auxiliary_loss: float
    grad_norm: float
    nats: float
    num_targets: int
    num_bytes: int
    reports: dict[str, RouterReport]
    ends: bool = False
    finding: Finding | None = None
    document_ids: frozenset[int] = frozenset()

    @property
    def figures(self) -> Figures:
        return Figures(self.loss, self.auxiliary_loss, self.grad_norm)

    @property
    def goes_back(self) -> bool:
        return self.finding is not None and self.finding.action == "rollback"

    @property
    def is_skipped(self) -> bool:
        return self.finding is not None and not self.finding.applies


@dataclass
class _Totals:
    """Sums over a step's micro-steps of this rank's shares; the tensors stay on the device and are read once, at the step's end."""

    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    auxiliary_loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    nats: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    num_targets: int = 0
    num_bytes: int = 0
    reports: dict[str, RouterReport] = field(default_factory=dict)
    documents: list[Tensor] = field(default_factory=list)  # on the CPU


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
    past: WatchState | None = None,
    is_asked_to_end: Callable[[], bool] = lambda: False,
    tell: Callable[[StepResult], None] = lambda result: None,
) -> StepResult:
    """Runs step number `step` (0 is the first) on the next micro-steps of `batches`.

    memory: of this rank's streams, where a mixer has memory; it moves on with the rows. past: what is known of the steps before.
    is_asked_to_end: of this rank, looked at once the gradients are there. tell: called for a bad step, on every rank, before anything is
    raised; not for one that goes back, of which train/resume.py tells. A step that is skipped leaves weights, moments, states and memory
    as they were; after one that asks for a rollback only weights and moments are.

    Raises:
        RuntimeError: the loss or the gradient norm is not finite (and the watch does not skip it or roll back), or a rank could not
            read its rows: on every rank alike. Checkpoints stay as they are.
    """
    world.begin_step(step + 1)
    engine.model.train()
    totals = _Totals()
    before = _Before(engine, memory) if settings.watch.may_skip else None
    results: list[StepResult] = []

    def accept(grad_norm: float) -> bool:
        result = _reduce(
            totals, world, grad_norm=grad_norm, ends=is_asked_to_end(), accumulation_steps=settings.accumulation_steps
        )
        finding = judge(settings.watch, past or WatchState(), result.figures, step=step + 1)
        if finding is not None:
            result = replace(result, finding=finding, document_ids=_documents(totals))
        results.append(result)
        return not result.is_skipped

    for micro_step in range(settings.accumulation_steps):
        last = micro_step == settings.accumulation_steps - 1
        _micro_step(engine, batches, world, settings, totals, step=step, last=last, memory=memory)
    engine.step(lr, accept=accept)
    (result,) = results
    finding = result.finding
    if not result.is_skipped:
        if engine.model.balances:
            engine.model.balance(total_reports(totals.reports, world))
    elif before is not None:
        before.put_back()
    world.end_step()
    if finding is not None:
        if not result.goes_back:
            tell(result)
        if finding.action == "stop":
            raise RuntimeError(finding.sentence)
    return result


class _Before:
    """What the forward passes of a step change: the states of routers and norms, the memory of the streams. Copies of them."""

    def __init__(self, engine: Engine, memory: StreamMemory | None) -> None:
        self._states = states_of(engine.model)
        self._values = {name: state.clone() for name, state in self._states.items()}
        self._memory = memory
        self._remembered = None if memory is None else memory.tensors()  # its tensors are copies

    def put_back(self) -> None:
        for name, value in self._values.items():
            self._states[name].copy_(value)
        if self._memory is not None and self._remembered is not None:
            self._memory.restore(self._remembered)


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
    totals.documents.append(batch.document_ids_BS)
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


def _reduce(totals: _Totals, world: World, *, grad_norm: float, ends: bool, accumulation_steps: int) -> StepResult:
    """Sums over all ranks, by one all-reduce of 56 bytes.

    The norm is rank 0's, and not finite if any rank's is not: whatever is decided by these figures is decided alike on every rank.
    """
    norm = grad_norm if world.rank == 0 or not math.isfinite(grad_norm) else 0.0
    counts = torch.tensor([totals.num_targets, totals.num_bytes, norm, ends], dtype=torch.float64)  # exact below 2**53
    losses = torch.stack([totals.loss, totals.auxiliary_loss, totals.nats])
    sums = world.sum(torch.cat([losses, counts.to(losses.device)])).tolist()
    return StepResult(
        loss=sums[0] / accumulation_steps,
        auxiliary_loss=sums[1] / world.world_size / accumulation_steps,
        grad_norm=sums[5],
        nats=sums[2],
        num_targets=int(sums[3]),
        num_bytes=int(sums[4]),
        reports=totals.reports,
        ends=sums[6] > 0,
    )


def _documents(totals: _Totals) -> frozenset[int]:
    return frozenset(torch.cat([ids.flatten() for ids in totals.documents]).tolist()) - {NO_DOCUMENT}


def total_reports(reports: dict[str, RouterReport], world: World) -> dict[str, RouterReport]:
    """Router reports summed over ranks, by one all-reduce of all of them."""
    if not reports:
        return {}
    flat = world.sum(torch.cat([part.flatten() for report in reports.values() for part in report]))
    parts = iter(flat.split([part.numel() for report in reports.values() for part in report]))
    return {name: RouterReport(*(next(parts).view_as(part) for part in report)) for name, report in reports.items()}
