"""Runs with a row whose logits are NaN (or too large), on the one rank that has it, and what is left of a run on disk.

Used by test_watch_run.py, on this process and on the workers of a pool alike: everything here can be found by its name.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from parallel.config import ProcessInfo
from train import checkpoint, job, run, step
from train.config import Config
from train.progress import Progress
from train.step import StepResult

NAN = float("nan")


@dataclass(frozen=True)
class Change:
    """What is different in a run. poison: data position -> factor of its row's logits. without: steps (0 is the first) whose rows are
    read and not learned from. start: the data position that a resumed run goes on from. unreadable: the data position of a row that
    cannot be read. inside: the data position of a row with which every row of its rank and micro-step becomes NaN before the first layer.
    """

    poison: dict[int, float] | None = None
    without: tuple[int, ...] = ()
    start: int | None = None
    unreadable: int | None = None
    inside: int | None = None


def run_with(config: Config, change: Change, processes: int = 1) -> str:
    """The sentence that the run ended with; empty if it came to its end."""
    rank = torch.distributed.get_rank() if processes > 1 else 0
    info = ProcessInfo(
        rank=rank,
        world_size=processes,
        local_rank=rank,
        local_world_size=processes,
        master_addr="",
        master_port=0,
        launcher="test",
    )
    with ExitStack() as patches:
        for target, name, replacement in _patches(change):
            patches.enter_context(mock.patch.object(target, name, replacement))
        try:
            run.run(config, info)
        except (RuntimeError, ValueError) as error:
            return str(error)
    return ""


def _patches(change: Change) -> Iterator[tuple[Any, str, Any]]:
    forward, train_step, restore, batches_of = step.forward, run.train_step, run.restore, job.train_batches

    def poisoned(engine: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if engine.model.training and change.inside in batch.positions_B.tolist():
            hook = engine.model.layers[0].register_forward_pre_hook(
                lambda layer, inputs: (inputs[0] * NAN, *inputs[1:])
            )
            output = forward(engine, batch, *args, **kwargs)
            hook.remove()
            return output
        output = forward(engine, batch, *args, **kwargs)
        factors = [(change.poison or {}).get(position, 1.0) for position in batch.positions_B.tolist()]
        if not engine.model.training or all(factor == 1.0 for factor in factors):
            return output
        return output._replace(logits_BSV=output.logits_BSV * torch.tensor(factors)[:, None, None])

    def unlearned(engine: Any, batches: Any, world: Any, settings: Any, *, step: int, **kwargs: Any) -> Any:
        if step not in change.without:
            return train_step(engine, batches, world, settings, step=step, **kwargs)
        for _ in range(settings.accumulation_steps):
            next(batches)
        return StepResult(1.0, 0.0, 1.0, nats=1.0, num_targets=1, num_bytes=1, reports={})

    def moved(at: Any) -> Progress:
        found = restore(at)
        return found if change.start is None else replace(found, position=change.start)

    def read(*args: Any, **kwargs: Any) -> Any:
        for batch in batches_of(*args, **kwargs):
            if change.unreadable in batch.positions_B.tolist():
                raise RuntimeError("shard 7 is damaged")
            yield batch

    yield step, "forward", poisoned
    yield job, "train_batches", read
    yield run, "train_step", unlearned
    yield run, "restore", moved


def tensors_of(folder: Path, *, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: weights, moments, states and memory."""
    path = folder / "checkpoints" / f"step_{step:06d}"
    kinds = ("master", "exp_avg", "exp_avg_sq", "state")
    return {f"{kind}/{name}": t for kind in kinds for name, t in checkpoint.read_tensors(path, kind=kind).items()}


def assert_same_tensors(found: Path, expected: Path, *, step: int) -> None:
    """Bit for bit."""
    ours, theirs = tensors_of(found, step=step), tensors_of(expected, step=step)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
        assert not tensor.is_floating_point() or tensor.isfinite().all(), name
