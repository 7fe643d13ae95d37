"""Which steps are bad, and what is done about one: a function of the config, of what came before and of the step's figures.

Owns the decision and what it must remember. No tensor, no rank, no file: train/step.py asks, with figures that are the same on every
rank, between a step's last backward and its update; train/run.py keeps the state and puts it into checkpoints.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from statistics import median
from typing import Any, Literal

from train.watch_config import WatchConfig

Action = Literal["stop", "skip", "rollback", "log"]
REMEDY = "lower optim.lr or clip_grad_norm in a run with another run.dir"


@dataclass(frozen=True)
class Figures:
    """A step's, in nats; grad_norm before clipping."""

    loss: float
    auxiliary_loss: float
    grad_norm: float

    @property
    def are_finite(self) -> bool:
        return all(math.isfinite(value) for value in (self.loss, self.auxiliary_loss, self.grad_norm))


@dataclass(frozen=True)
class Finding:
    """A bad step. sentence: what is wrong with it, and at a limit what to do."""

    kind: Literal["nonfinite", "spike"]
    action: Action
    sentence: str

    @property
    def applies(self) -> bool:
        """The update is made all the same."""
        return self.action == "log"


@dataclass(frozen=True)
class WatchState:
    """What the decisions depend on besides the step's figures; a checkpoint holds it.

    skipped_steps: of the steps done, those without an update, so that a run has made step - skipped_steps updates. skips_in_a_row: of
    the last ones. rollbacks: of the run over all its starts (a checkpoint has those before it, events.jsonl all). losses, norms: of the
    last steps with an update, the newest last.
    """

    skipped_steps: int = 0
    skips_in_a_row: int = 0
    rollbacks: int = 0
    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()

    @classmethod
    def of(cls, saved: Mapping[str, Any] | None, *, where: object = "a checkpoint") -> "WatchState":
        """Of what a checkpoint holds; None is a checkpoint from before there was a state.

        Raises:
            RuntimeError: it holds more than this version knows.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(saved or {}) - set(known))
        if unknown:
            raise RuntimeError(
                f"the watch state in {where} must hold {', '.join(known)}, but it also holds {', '.join(unknown)}: go on with the version "
                "that wrote it (environment.json in the run folder names it)"
            )
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in (saved or {}).items()}
        return cls(**values)

    def saved(self) -> dict[str, Any]:
        """JSON that `of` reads back to the last bit."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def counts(self) -> dict[str, int]:
        """What metrics.jsonl has of it."""
        return {"skipped_steps": self.skipped_steps, "rollbacks": self.rollbacks}


def judge(config: WatchConfig, state: WatchState, figures: Figures, *, step: int) -> Finding | None:
    """None for a good step. step: its number, 1 is the first. A step that would exceed a limit is to stop the run."""
    if not figures.are_finite:
        sentence = (
            f"the loss and the gradient norm must be finite, but at step {step} the loss is {figures.loss}, the auxiliary loss "
            f"{figures.auxiliary_loss} and the gradient norm {figures.grad_norm}"
        )
        return _within_limits(config, state, Finding("nonfinite", config.on_nonfinite, sentence))
    if config.spike_factor is None:
        return None
    for name, value, past in (
        ("loss", figures.loss, state.losses),
        ("gradient norm", figures.grad_norm, state.norms),
    ):
        past = past[-config.window :]
        if len(past) < config.window:
            continue
        middle = median(past)
        if middle > 0 and value > config.spike_factor * middle:  # a median of 0 has no multiples
            sentence = (
                f"the {name} must stay below {config.spike_factor:g} times its median over the last {config.window} good steps, "
                f"{middle:.4g}, but at step {step} it is {value:.4g}"
            )
            return _within_limits(config, state, Finding("spike", config.on_spike, sentence))
    return None


def after(config: WatchConfig, state: WatchState, figures: Figures, finding: Finding | None) -> WatchState:
    """The state behind a step that was applied or skipped. (What a rollback leaves is `rolled_back`.)"""
    if finding is not None and not finding.applies:
        return replace(state, skipped_steps=state.skipped_steps + 1, skips_in_a_row=state.skips_in_a_row + 1)
    keep = config.window if config.spike_factor is not None else 0
    return replace(
        state,
        skips_in_a_row=0,
        losses=_longer(state.losses, figures.loss, keep),
        norms=_longer(state.norms, figures.grad_norm, keep),
    )


def rolled_back(state: WatchState, saved: WatchState) -> WatchState:
    """`saved` is the checkpoint's. The rollbacks alone are not undone: their limit would never be reached."""
    return replace(saved, rollbacks=state.rollbacks + 1)


def _longer(past: tuple[float, ...], value: float, keep: int) -> tuple[float, ...]:
    return (*past, value)[-keep:] if keep else ()


def _within_limits(config: WatchConfig, state: WatchState, finding: Finding) -> Finding:
    spent = None
    if finding.action == "stop":
        return replace(finding, sentence=f"{finding.sentence}: {REMEDY}, or set watch.on_nonfinite to skip or rollback")
    if finding.action == "skip" and state.skips_in_a_row >= config.max_skips_in_a_row:
        spent = (
            f"{state.skips_in_a_row} of at most {config.max_skips_in_a_row} skips in a row (watch.max_skips_in_a_row)"
        )
    elif finding.action == "skip" and state.skipped_steps >= config.max_skips:
        spent = f"{state.skipped_steps} of at most {config.max_skips} skips (watch.max_skips)"
    elif finding.action == "rollback" and state.rollbacks >= config.max_rollbacks:
        spent = f"{state.rollbacks} of at most {config.max_rollbacks} rollbacks (watch.max_rollbacks)"
    if spent is None:
        return finding
    return replace(
        finding, action="stop", sentence=f"{finding.sentence}, after {spent}: {REMEDY}, or raise the limit in watch"
    )
