"""What is told of a bad step or a slow rank: a line on the console, and one in events.jsonl with the rows and documents of a bad step.

Owns the form of an event. A file of its own, which only grows: metrics.jsonl loses the steps that a rollback does again, this one tells
why. A run that is killed and meets the same step again tells of it again. Called by train/run.py on every rank; rank 0 writes.
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from train.engine import World
from train.progress import Progress
from train.run_folder import RunFolder, explained
from train.step import StepResult
from train.together import on_rank_zero

SHOWN = 32  # document ids in an event


def bad_step(result: StepResult, world: World, *, step: int, position: int, rows: int) -> dict[str, Any]:
    """The event of a bad step: its number, its rows [first, end) as data positions, and its documents' ids in the data set.

    Every rank calls it: one exchange of at most 33 numbers of each.
    """
    finding = result.finding
    assert finding is not None
    ids = sorted(result.document_ids)
    told = world.all_gather_object([len(ids), ids[:SHOWN]])
    shown = sorted({one for _, some in told for one in some})[:SHOWN]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "event": finding.kind,
        "action": finding.action,
        "step": step,
        "positions": [position, position + rows],
        "document_ids": shown,
        "more_documents": any(number > SHOWN for number, _ in told) or len({i for _, s in told for i in s}) > SHOWN,
        "loss": _text_if_not_finite(result.loss),
        "auxiliary_loss": _text_if_not_finite(result.auxiliary_loss),
        "grad_norm": _text_if_not_finite(result.grad_norm),
        "reason": finding.sentence,
    }


def sentence_of(event: dict[str, Any]) -> str:
    """The line of a bad step for the console."""
    done = {"skip": "its update is skipped", "rollback": "the run goes back", "log": "its update is made"}
    first, end = event["positions"]
    ids = ", ".join(map(str, event["document_ids"])) + (" and more" if event["more_documents"] else "")
    what = done.get(event["action"], "the run stops")
    return f"bad step {event['step']}: {event['reason']}; {what}; rows {first} to {end - 1}, documents {ids or 'none'}"


def tell_of(
    world: World, folder: RunFolder, done: Progress, result: StepResult, *, rows: int, say: Callable[[str], None]
) -> None:
    """Tells of a bad step, the one after `done`, of `rows` rows. Every rank calls it."""
    event = bad_step(result, world, step=done.step + 1, position=done.position, rows=rows)
    say(sentence_of(event))
    write_event(folder, world, event)


def write_event(folder: RunFolder, world: World, event: dict[str, Any]) -> None:
    """Adds a line to events.jsonl. RuntimeError on every rank if rank 0 cannot."""
    on_rank_zero(world, lambda: _append(folder, event))


def _append(folder: RunFolder, event: dict[str, Any]) -> None:
    with explained(folder.events), folder.events.open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def _text_if_not_finite(value: float) -> float | str:
    return value if abs(value) < float("inf") else str(value)  # JSON has no NaN
