"""benchmarks/gpu/timing.py without a GPU: what a call is queued behind, what a bar says."""

import re
import time

import pytest
import torch

from benchmarks.gpu import timing
from benchmarks.gpu.timing import Bar


class _Event:
    """Of a GPU on which everything takes a millisecond."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def elapsed_time(self, end: "_Event") -> float:
        return 1.0


@pytest.fixture
def cycles(monkeypatch) -> list[int]:
    """Of each sleep that was asked for."""
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", asked.append)
    return asked


def test_a_call_is_queued_behind_a_sleep_of_twice_its_host_time(monkeypatch, cycles: list[int]):
    monkeypatch.setattr(timing, "WAITS", 1000.0)
    found = timing.time_all({"slow": lambda turn: time.sleep(0.02), "fast": lambda turn: None}, calls=3)
    assert len(cycles) == 2 * 3
    assert min(cycles[::2]) >= 2 * 20 * 2_000_000
    assert min(cycles[1::2]) >= 2.5 * 2_000_000
    assert found["slow"].gpu == [1.0] * 3
    assert len(found["slow"].host) == timing.WARM_UP
    assert min(found["slow"].host) >= 20
    assert re.fullmatch(r"\d{2,}\.\d\d / \d+\.\d\d", timing.hosts(found.values()))


def test_a_call_that_waits_for_the_device_is_made_ten_times_behind_a_short_sleep(monkeypatch, cycles: list[int]):
    """Else a form that reads a flag back takes the time of its step from all that come after it."""
    monkeypatch.setattr(timing, "WAITS", 3.0)
    turns: list[int] = []

    def waits(turn: int) -> None:
        turns.append(turn)
        time.sleep(0.004)

    found = timing.time_all({"waits": waits, "fast": lambda turn: None}, calls=30)
    assert turns == [*range(-timing.WARM_UP, 10)]
    assert found["waits"].gpu == [1.0] * 10
    assert len(found["fast"].gpu) == 30
    assert max(cycles) == 2 * 3 * 2_000_000


@pytest.mark.parametrize("kind", ["at least", "at most"])
def test_a_bar_includes_its_limit(kind: str):
    bar = Bar("it must be", kind, 0.65)
    worse = 0.64 if kind == "at least" else 0.66
    assert bar.verdict({"a": 0.65, "b": None}) == f"- bar: it must be {kind} 0.65: met. a 0.65"
    assert f"**missed** (1 of 2 reach it). a 0.65; b {worse}" in bar.verdict({"a": 0.65, "b": worse})
    assert bar.verdict({"a": None}).endswith("0.65: not measured")
