"""Experts on other ranks during a run: when a move is due, what is said of it, and what of it is in a checkpoint.

Owns the words, the record of metrics.jsonl and the field `placement` of a checkpoint's `extra`. Does not own the move
(parallel/placement.py). Called by train/run.py and train/resume.py, on every rank.
"""

import time
from collections.abc import Mapping
from typing import Any

from train.job import Job
from train.progress import Progress


class Placer:
    """Looks after each step whether experts are to move."""

    def __init__(self, job: Job) -> None:
        self._job, self._every = job, job.config.parallel.placement_every_steps
        self._record: dict[str, Any] = {}
        if self._every is not None and not _banks(job):
            job.reporter.say(
                f"no expert moves: parallel.placement_every_steps is {self._every}, but ep_size is {job.layout.ep_size} and no bank's "
                "tokens travel to experts that could live elsewhere"
            )

    def look(self, done: Progress) -> None:
        """Moves experts if that is due after the step `done`.

        Raises:
            RuntimeError: a rank has no memory for what travels: on every rank alike.
        """
        if self._every is None or done.step % self._every:
            return
        placement = self._job.engine.placement
        if placement is None or not placement.banks:
            return
        began = time.perf_counter()
        placed = placement.move()
        seconds = time.perf_counter() - began
        moved, say = [one for one in placed if one.num_moved], self._job.reporter.say
        for one in moved:
            say(
                f"step {done.step}: {one.num_moved} experts of {one.path} moved; the busiest rank has {one.after:.2f} of the mean load, "
                f"before {one.before:.2f}"
            )
        num_moved = sum(one.num_moved for one in moved)
        say(f"step {done.step}: {num_moved} experts moved in {len(moved)} of {len(placed)} banks, {seconds:.3f} s")
        banks = {one.path: {"before": one.before, "after": one.after, "moved": one.num_moved} for one in placed}
        self._record = {"placement": {"step": done.step, "seconds": seconds, "moved": num_moved, "banks": banks}}

    def take_record(self) -> dict[str, Any]:
        """For metrics.jsonl: of the last move, once."""
        taken, self._record = self._record, {}
        return taken


def saved_placement(job: Job) -> dict[str, Any]:
    """The field `placement` of a checkpoint; nothing where no expert has moved and none is counted."""
    placement = job.engine.placement
    if placement is None:
        return {}
    places, loads = placement.tables(), placement.loads()
    return {"placement": {"places": places, "loads": loads}} if places or loads else {}


def restore_placement(job: Job, extra: Mapping[str, Any]) -> None:
    """Puts the experts where the checkpoint with `extra` had them; before its tensors are read. A table is one of an ep_size: at
    another the experts begin at their first places, and the log says so.

    Raises:
        ValueError: a table is not one of its bank: on every rank alike.
    """
    saved, ep_size = extra.get("placement", {}), extra.get("layout", {}).get("ep_size")
    places, banks = saved.get("places", {}), _banks(job)
    fits = {path: places[path] for path in places if path in banks and ep_size == job.layout.ep_size}
    if len(fits) < len(places):
        job.reporter.say(
            f"the experts of {len(places) - len(fits)} banks are at their first places again: they had moved at ep_size {ep_size} "
            f"between ranks that tokens travelled to, and now ep_size is {job.layout.ep_size} and {len(banks)} banks are so"
        )
    if job.engine.placement is not None:
        job.engine.placement.restore(fits, saved.get("loads", {}))


def _banks(job: Job) -> list[str]:
    return [] if job.engine.placement is None else job.engine.placement.banks
