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


def test_a_call_is_queued_behind_a_sleep_of_twice_its_host_time(monkeypatch):
    cycles: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", cycles.append)
    found = timing.time_all({"slow": lambda turn: time.sleep(0.02), "fast": lambda turn: None}, calls=3)
    assert len(cycles) == 2 * 3
    assert min(cycles[::2]) >= 2 * 20 * 2_000_000
    assert min(cycles[1::2]) >= 2.5 * 2_000_000
    assert found["slow"].gpu == [1.0] * 3
    assert len(found["slow"].host) == timing.WARM_UP
    assert min(found["slow"].host) >= 20
    assert re.fullmatch(r"\d{2,}\.\d\d / \d+\.\d\d", timing.hosts(found.values()))


@pytest.mark.parametrize("kind", ["at least", "at most"])
def test_a_bar_includes_its_limit(kind: str):
    bar = Bar("it must be", kind, 0.65)
    worse = 0.64 if kind == "at least" else 0.66
    assert bar.verdict({"a": 0.65, "b": None}) == f"- bar: it must be {kind} 0.65: met. a 0.65"
    assert f"**missed** (1 of 2 reach it). a 0.65; b {worse}" in bar.verdict({"a": 0.65, "b": worse})
    assert bar.verdict({"a": None}).endswith("0.65: not measured")
