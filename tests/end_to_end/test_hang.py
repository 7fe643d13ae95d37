"""A rank that does not come, dies or fails is named by the others, in one sentence and in limited time; a slow one is left alone.

Each job is two processes of launcher/main.py (by faulty_main.py), of which one has a fault in the feed-forward of the last layer.
"""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import ConfigFile, records
from tests.end_to_end.warm import Job

FAULTY = Path(__file__).with_name("faulty_main.py")
WATCHDOG_S = 3.0
Ranks = Callable[..., Job]


class Faulty:
    """Two ranks with a fault; their exit codes, what they printed, and how long they took after the step before the fault's."""

    def __init__(self, config: ConfigFile, ranks: Ranks, fault: str, *, faulty_rank: int = 1) -> None:
        self.config = config
        settings = config.arguments(
            "run.steps=4", "parallel.exchange=tokens", f"parallel.watchdog_s={WATCHDOG_S}", "eval.every_steps=100"
        )
        self.job = ranks(2, [fault, *settings], script=FAULTY, environment={"FAULTY_RANK": str(faulty_rank)})

    def codes(self) -> list[int | None]:
        """Waits for both; seconds: from the last line of metrics.jsonl to the end of both."""
        codes = self.job.wait(90)
        metrics = self.config.folder / "metrics.jsonl"
        self.seconds = time.time() - metrics.stat().st_mtime
        return codes

    def said(self, rank: int) -> str:
        return self.job.ranks[rank].said()

    def error(self, rank: int) -> str:
        """The sentence that the rank ended with."""
        lines = [line for line in self.said(rank).splitlines() if line.startswith("error")]
        assert len(lines) == 1, self.said(rank)
        return lines[0].removeprefix(f"error (rank {rank}): " if rank else "error: ")

    def crash(self) -> dict[str, Any]:
        return json.loads((self.config.folder / "crash.json").read_text())

    def stacks(self, rank: int) -> str:
        return (self.config.folder / "hang" / f"rank_{rank:05d}.txt").read_text()


@pytest.mark.parametrize("sleeper", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_does_not_come_is_named_with_the_verb_and_every_rank_writes_its_stacks(
    config: ConfigFile, ranks: Ranks, sleeper: int
):
    job = Faulty(config, ranks, "sleep", faulty_rank=sleeper)
    waiter = 1 - sleeper
    assert job.codes() == [1, 1]
    said = job.error(waiter)
    waits = rf"rank {waiter} of 2 has waited \d+ s in plan( \(mlp\))? of layers.1.feedforward, forward, at step 3, for rank {sleeper}"
    was_last = r"\(outside any collective, last in combine \(output\) of layers.1.mixer, forward, at step 3\)"
    assert re.match(f"{waits} {was_last}; the stacks of this rank's threads are in ", said), said
    assert job.error(sleeper).startswith(said.split(";")[0])
    assert job.crash()["reason"] == said.split(";")[0]
    assert job.crash()["step"] == 2
    assert "in oversleep" in job.stacks(sleeper)
    assert "oversleep" not in job.stacks(waiter)
    assert "torch/distributed" in job.stacks(waiter)
    assert job.seconds < WATCHDOG_S + 20


@pytest.mark.parametrize("dead", [0, pytest.param(1, marks=pytest.mark.slow)])  # rank 0 keeps the store
def test_a_rank_that_dies_in_backward_is_named(config: ConfigFile, ranks: Ranks, dead: int):
    job = Faulty(config, ranks, "die", faulty_rank=dead)
    codes = job.codes()
    assert codes[dead] == 9
    assert codes[1 - dead] == 1
    said = job.error(1 - dead)
    assert f"rank {dead}" in said, said
    assert re.search(r"at step 3, .* broke because a rank is gone: .*\(?dead or stopped, last seen", said), said
    assert "Connection closed" not in job.said(1 - dead)
    assert (job.crash()["rank"], job.crash()["reason"]) == (1 - dead, said)
    assert job.seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_also_when_it_keeps_the_store(config: ConfigFile, ranks: Ranks, stopped: int):
    job = Faulty(config, ranks, "stop", faulty_rank=stopped)
    assert job.job.ranks[1 - stopped].wait(90) == 1
    said = job.error(1 - stopped)
    assert f"in plan of layers.1.feedforward, forward, at step 3, for rank {stopped}" in said
    assert "dead or stopped, last seen" in said
    assert "torch/distributed" in job.stacks(1 - stopped)


def test_an_error_in_forward_reaches_the_other_rank_as_its_sentence(config: ConfigFile, ranks: Ranks):
    job = Faulty(config, ranks, "raise")
    assert job.codes() == [1, 1]
    assert job.error(0) == "MemoryError: the feed-forward wanted 80 GiB and there are 2 (rank 1 of 2)"
    assert "Traceback" not in job.said(0)
    assert "in strike" in job.said(1), "the failing rank shows where"
    assert (job.crash()["rank"], job.crash()["reason"]) == (1, job.error(0).removesuffix(" (rank 1 of 2)"))
    assert any("in strike" in line for line in job.crash()["traceback"])
    assert job.seconds < 40


def test_slow_steps_are_left_alone_and_their_exchange_is_told(config: ConfigFile, ranks: Ranks):
    job = Faulty(config, ranks, "slow")
    job.job.finish()
    assert not (config.folder / "hang").exists()
    for record in records(config.folder).values():
        exchange = record["exchange"]
        assert exchange["bytes"]["reduce"]["near"] > 0
        assert exchange["bytes"]["reduce"]["far"] == 0
        slept = sum(wait["max"] for wait in exchange["seconds"].values())
        assert slept > 3.0, "rank 0 waited for each of the two micro-steps of 1.7 s"
        assert record["straggler"]["rank"] == 1
        assert record["straggler"]["seconds"] > 3.0 > record["straggler"]["others"]
    assert "is slow" not in job.said(0), "four windows are too few to say so"
    assert not (config.folder / "crash.json").exists()
