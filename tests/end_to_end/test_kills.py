"""A run that is killed again and again, at random instants and in the middle of saves, is the run that it would have been.

Short here, 100 kills in `make drills`. The ranks are launcher/main.py in real processes (warm.py saves their imports); what starts them in
production is in test_kill_and_resume.py.
"""

import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.end_to_end.drilled_run import (
    SAVE_EVERY,
    Place,
    Run,
    assert_same_curve,
    resumed_step,
    wait_until,
)
from tests.end_to_end.faults import AT_THE_START, IN_A_SAVE, POINTS
from tests.end_to_end.one_token_each import STEPS_PER_EPOCH, TokenShards, assert_nothing_twice_or_left_out
from tests.end_to_end.warm import Job
from train.preemption import EXIT_CODE

SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1}
# A rank that is left alone asks after the others, tells who is missing and ends: 10 s where the store's rank is gone, on an idle machine.
END_S = 120
MOST_STEPS = 12  # that a start makes before it is killed: two saves, and what is done behind the second

ALONE, EXPERTS, REPLICAS = Place(1, 1, 0), Place(2, 2, 1), Place(2, 1, 2)
READERS = Place(2, 2, 2, "tokens", readers=1)
FOUR = Place(4, 2, 1, "weights")


@dataclass(frozen=True)
class Kill:
    """What is done to a start of the run. where: a point of faults.py, "in a step", or "at any time" from the start on."""

    signal: str
    of_all: bool
    where: str
    time_of: (
        int  # the first or second time that the start gets to the point; in a step: so many steps after its beginning
    )
    delay_s: float  # from then on

    @classmethod
    def drawn(cls, draw: random.Random, *, in_a_save: bool, name: str | None = None) -> "Kill":
        where = (
            draw.choice(list(IN_A_SAVE))
            if in_a_save
            else draw.choice([*AT_THE_START, *["in a step"] * 4, "at any time"])
        )
        return cls(
            signal=name or draw.choice(list(SIGNALS)),
            # the ranks wait 120 s for one that dies before they have met; its launcher ends them
            of_all=where == "at any time" or draw.random() < 0.5,
            where=where,
            time_of=1 if where in AT_THE_START else draw.randint(1, 2 if where in POINTS else 6),
            delay_s=draw.uniform(0.0, 2.0 if where == "at any time" else 0.15),
        )


def strike(run: Run, kill: Kill, draw: random.Random) -> tuple[Job, int]:
    """Starts the run and does it; returns the job when all its ranks have ended, and the last step that they had told."""
    place, folder, before = run.place, run.folder / f"kill{run.starts:04d}", run.latest_step()
    kill = that_fits(kill, run, draw)
    print(f"{place} start {run.starts} at step {before}: {kill}", flush=True)
    folder.mkdir()
    faults: dict[int, dict[str, Any]] = {}
    if kill.where in POINTS:
        rank = draw.randrange(place.processes) if POINTS[kill.where][0] else 0
        faults[rank] = {"point": kill.where, "time": kill.time_of, "folder": str(folder)}
    began = time.monotonic()
    job = run.start(faults=faults)
    try:
        if kill.where in POINTS:
            wait_until((folder / "reached").exists, job)
        elif kill.where == "in a step":
            wait_until(lambda: resumed_and_told(run, job, before) >= before + kill.time_of, job)
        else:
            over = began + kill.delay_s
            wait_until(lambda: time.monotonic() > over or resumed_and_told(run, job, before) >= before + 6, job)
        if kill.where != "at any time":
            time.sleep(kill.delay_s)
        told = run.told()
        struck = job.ranks if kill.of_all else [draw.choice(job.ranks)]
        for rank in struck:
            rank.signal(SIGNALS[kill.signal])
        (folder / "go").touch()
        codes = job.wait(END_S)
        assert None not in codes, "ranks that were left alone do not end:\n" + "\n".join(
            rank.said() for rank in job.ranks
        )
        # killed by it, or, where the program was already listening, asked to end; another may have missed it before its own came
        assert struck[0].code in (-SIGNALS[kill.signal], EXIT_CODE), f"exit codes {codes}"
        if EXIT_CODE in codes:
            assert kill.signal != "kill -9", f"exit codes {codes}"
            assert set(codes) == {EXIT_CODE}, f"exit codes {codes}: all ranks end alike when one is asked to"
            assert run.told() == run.latest_step(), "a run that was asked to end saves the step it ended with"
        assert 0 not in codes, f"exit codes {codes}: a rank was left alone and says that all is well"
    finally:
        job.kill()
    return job, told


def that_fits(kill: Kill, run: Run, draw: random.Random) -> Kill:
    """A run without a checkpoint reads none, and one that is nearly done has no more saves to be killed in."""
    if run.latest_step() == 0 and kill.where in AT_THE_START:
        return replace(kill, where="in a step")
    if run.latest_step() > run.steps - MOST_STEPS:
        return replace(kill, where=draw.choice(list(AT_THE_START)), time_of=1)
    return kill


def resumed_and_told(run: Run, job: Job, step: int) -> int:
    """The last step told; `step` until this start has said where it goes on: metrics.jsonl has lines of the start before."""
    return run.told() if step == 0 or resumed_step(job) == step else step


def drill(
    run: Run, kills: list[Kill], expected: dict[int, dict[str, Any]], draw: random.Random, *, shards: TokenShards
) -> None:
    """All kills, then the run to its end."""
    before = 0
    for kill in kills:
        job, told = strike(run, kill, draw)
        after = run.latest_step()
        assert after >= before, f"latest named step {before} and names step {after}"
        assert told - after <= 2 * SAVE_EVERY, f"step {told} was done and only step {after} is saved"
        if re.search(r"^(resumed from|step \d+ )", job.ranks[0].said(), re.MULTILINE):  # else it was killed before
            assert resumed_step(job) == before, "it went on from another checkpoint than the one that latest named"
        assert_same_curve(run, expected, whole=False)
        before = after
    job = run.start()
    job.finish()
    assert resumed_step(job) == before
    assert_same_curve(run, expected)
    again = assert_nothing_twice_or_left_out(run.folder / "journal", shards, steps=run.steps)
    print(f"{run.place}: {len(kills)} kills, {run.steps} steps, {again} of them made or begun more than once")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("place", [ALONE, EXPERTS, REPLICAS], ids=["alone", "experts", "replicas"])
def test_two_kills_one_in_a_save(
    place: Place, drilled: Callable[..., Run], untouched, token_shards, draw: random.Random
):
    """The three places together: six kills, three of them in a save, each signal twice."""
    steps = 2 * STEPS_PER_EPOCH
    names = {ALONE: ("SIGTERM", "kill -9"), EXPERTS: ("kill -9", "SIGUSR1"), REPLICAS: ("SIGUSR1", "SIGTERM")}[place]
    kills = [Kill.drawn(draw, in_a_save=i == 0, name=name) for i, name in enumerate(names)]
    drill(drilled(place, steps), kills, untouched(place, steps), draw, shards=token_shards)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "place", [ALONE, EXPERTS, REPLICAS, READERS, FOUR], ids=["alone", "experts", "replicas", "readers", "four"]
)
def test_twenty_kills(place: Place, drilled: Callable[..., Run], untouched, token_shards, draw: random.Random):
    """At five places: 100. Eight of the twenty are in a save."""
    steps = 8 * STEPS_PER_EPOCH
    kills = [Kill.drawn(draw, in_a_save=number % 5 < 2) for number in range(20)]
    drill(drilled(place, steps), kills, untouched(place, steps), draw, shards=token_shards)
