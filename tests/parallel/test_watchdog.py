"""Who a hang is blamed on, and which errors are another rank's. Whole jobs that hang: tests/end_to_end/test_hang.py."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel.ledger import Ledger, Sent, Where
from parallel.side_channel import Entry
from parallel.watchdog import _is_broken_collective, dump, host_is_gone, missing_ranks, silent_ranks, within

HERE = Entry(step=3, progress=41, current="dispatch (value) of layers.3.mixer, forward", last=None, beat=9)


def away(progress: int) -> Entry:
    return replace(HERE, progress=progress, current=None, last="plan of layers.3.mixer, forward")


def test_the_missing_ranks_are_those_behind_and_the_furthest_behind_comes_first():
    ahead = replace(HERE, progress=44, current="combine (mlp) of layers.3.feedforward, forward")
    text = missing_ranks(HERE, [HERE, away(40), ahead, away(36)], silent=[])
    plan = "(outside any collective, last in plan of layers.3.mixer, forward, at step 3)"
    assert text == f"rank 3 {plan} and rank 1 {plan}"


def test_a_rank_that_is_elsewhere_is_named_where_nobody_is_behind():
    ahead = replace(HERE, progress=44, current="combine (mlp) of layers.3.feedforward, forward")
    text = missing_ranks(HERE, [HERE, ahead], silent=[])
    assert text == "rank 1 (in combine (mlp) of layers.3.feedforward, forward, at step 3)"


def test_a_dead_rank_is_called_dead_and_of_many_some_are_named():
    text = missing_ranks(HERE, [HERE, *[away(30)] * 20], silent=[2])
    assert "rank 2 (dead or stopped, last seen outside any collective" in text
    assert "rank 1 (outside any collective" in text
    assert text.endswith(" and 12 more")
    assert text.count("rank ") == 8


def test_where_every_rank_is_in_it_the_connection_is_blamed():
    assert "the connection between them" in missing_ranks(HERE, [HERE, HERE], silent=[])


def test_a_rank_without_a_new_entry_is_silent():
    moving = [replace(HERE, beat=beat) for beat in (4, 5, 6)]
    assert silent_ranks(moving, [moving[0], replace(HERE, beat=6), moving[2]]) == [0, 2]


@pytest.mark.parametrize(("agent", "named"), [("True", "the launcher on the first node"), ("False", "rank 0")])
def test_a_store_that_does_not_answer_blames_the_process_that_keeps_it(monkeypatch, agent, named):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    assert host_is_gone(HERE).startswith(named)


def raised(error: Exception, *, inside: bool) -> tuple[Exception, Ledger]:
    ledger = Ledger()
    try:
        if inside:
            with ledger.collective(Where("layers.0.mixer", "value", "dispatch"), Sent()):
                raise error
        raise error
    except Exception as caught:
        return caught, ledger


@pytest.mark.parametrize(
    ("error", "inside", "broken"),
    [
        (RuntimeError("Connection closed by peer"), True, True),
        (dist.DistBackendError("NCCL error"), True, True),
        (torch.OutOfMemoryError("2 GiB"), True, False),
        (ValueError("shape"), True, False),
        (RuntimeError("size mismatch"), False, False),
    ],
)
def test_what_follows_from_another_rank_is_told_from_an_own_error(error, inside, broken):
    assert _is_broken_collective(*raised(error, inside=inside)) is broken


def test_stacks_have_every_thread(tmp_path: Path):
    path = tmp_path / "hang" / "rank_00003.txt"
    assert within(5, lambda: dump(path))  # as the watchdog does: on a thread that is not the one that hangs
    assert "test_stacks_have_every_thread" in path.read_text()


def test_what_does_not_end_keeps_nobody():
    read, write = os.pipe()
    began = time.monotonic()
    assert not within(0.1, lambda: os.read(read, 1))
    assert time.monotonic() - began < 5
    assert within(5, lambda: None)
    os.write(write, b"x")


def test_a_span_costs_the_hot_path_microseconds():
    """A thousand or so are in a step of 24 layers; measured 6 us on a busy machine of two cores, here with room for a busier one."""
    ledger, where = Ledger(), Where("layers.0.mixer", "value", "dispatch")
    times = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(1000):
            with ledger.collective(where, Sent(1, 2)):
                pass
        times.append((time.perf_counter() - began) / 1000)
    assert min(times) < 50e-6
