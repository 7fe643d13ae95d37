"""What is told of a bad step or a slow rank: a line on the console, and one in events.jsonl with the rows and documents of a bad step.

Owns the form of an event. A file of its own, which only grows: metrics.jsonl loses the steps that a rollback does again, this one tells
why, and so knows how often the run has gone back over all its starts. A run that is killed and meets the same step again tells of it
again. Called by train/run.py and train/resume.py on every rank; rank 0 writes.
"""

import json
import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from train.engine import World
from train.progress import Progress
from train.run_folder import RunFolder, explained
from train.step import StepResult
from train.together import on_rank_zero

logger = logging.getLogger(__name__)

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
    done = {"skip": "its update is skipped", "log": "its update is made", "rollback": _way(event)}
    first, end = event["positions"]
    ids = ", ".join(map(str, event["document_ids"])) + (" and more" if event["more_documents"] else "")
    what = done.get(event["action"], "the run stops")
    return f"bad step {event['step']}: {event['reason']}; {what}; rows {first} to {end - 1}, documents {ids or 'none'}"


def _way(event: dict[str, Any]) -> str:
    way = f"the run goes back to step {event.get('back_to')}"
    again = event.get("passed_over")
    return way if again is None else f"{way}, because after it went back to step {again} it met this one"


def tell_of(
    world: World, folder: RunFolder, done: Progress, result: StepResult, *, rows: int, say: Callable[[str], None]
) -> None:
    """Tells of a bad step, the one after `done`, of `rows` rows. Every rank calls it."""
    write_event(folder, world, bad_step(result, world, step=done.step + 1, position=done.position, rows=rows), say=say)


def write_event(folder: RunFolder, world: World, event: dict[str, Any], *, say: Callable[[str], None]) -> None:
    """Says it, and adds a line to events.jsonl. Every rank calls it.

    Raises:
        RuntimeError: on every rank, if rank 0 cannot write it and the run is to go on. One that stops ends with the reason for that.
    """
    say(sentence_of(event))
    if event["action"] != "stop":
        on_rank_zero(world, lambda: _append(folder, event))
    elif world.rank == 0:
        try:
            _append(folder, event)
        except RuntimeError as error:
            logger.warning("%s", error)


def count_rollbacks(folder: RunFolder) -> int:
    """How often the run has gone back, by its events. RuntimeError if they cannot be read."""
    if not folder.events.exists():
        return 0
    number = 0
    try:
        lines = folder.events.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise RuntimeError(f"{folder.events} cannot be read ({error.strerror}): let this user read it") from error
    for line in lines:
        try:
            number += json.loads(line)["action"] == "rollback"
        except (ValueError, KeyError, TypeError):
            continue  # a line that a kill cut short
    return number


def _append(folder: RunFolder, event: dict[str, Any]) -> None:
    line = json.dumps(event).encode() + b"\n"
    with explained(folder.events), folder.events.open("a+b") as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a kill has cut the last line short
                line = b"\n" + line
        file.write(line)


def _text_if_not_finite(value: float) -> float | str:
    return value if abs(value) < float("inf") else str(value)  # JSON has no NaN
