"""The choice among a kernel's configurations, with a clock that the test sets."""

import json
from collections.abc import Iterator

import pytest
import torch

from kernels.tuning import decide, decisions, fastest, measuring, rounded

GPU = torch.device("cuda")
MILLISECONDS = {"small": 3.0, "middle": 1.0, "large": 2.0}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The configurations measured so far."""
    names: list[str] = []

    def do_bench(launch, **kwargs) -> float:
        launch()
        return MILLISECONDS[names[-1]]

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    kept = decisions()
    decide({})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield names
    decide(kept)


def test_the_fastest_is_measured_once_for_each_key(measured: list[str]) -> None:
    for rows in (1000, 900, 1024):
        assert fastest(list(MILLISECONDS), measured.append, key=("op", rounded(rows)), device=GPU) == "middle"
    assert measured == ["small", "middle", "large"]
    fastest(list(MILLISECONDS), measured.append, key=("op", rounded(1025)), device=GPU)
    assert len(measured) == 6


def test_nothing_is_measured_without_a_gpu_or_where_results_must_repeat(measured: list[str]) -> None:
    assert fastest(list(MILLISECONDS), measured.append, key="op", device=torch.device("cpu")) == "small"
    torch.use_deterministic_algorithms(True)
    try:
        assert fastest(list(MILLISECONDS), measured.append, key="op", device=GPU) == "small"
    finally:
        torch.use_deterministic_algorithms(False)
    assert measured == []


def test_before_a_run_they_are_measured_and_then_hold_where_results_must_repeat(measured: list[str]) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with measuring():
            assert fastest(list(MILLISECONDS), measured.append, key=("op", 16), device=GPU) == "middle"
        assert fastest(list(MILLISECONDS), measured.append, key=("op", 16), device=GPU) == "middle"
        assert fastest(list(MILLISECONDS), measured.append, key=("op", 32), device=GPU) == "small"
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(measured) == 3


def test_decisions_that_were_kept_are_taken_without_measuring(measured: list[str]) -> None:
    fastest(list(MILLISECONDS), measured.append, key=("op", 16), device=GPU)
    kept = json.loads(json.dumps(decisions()))
    decide({})
    decide({name: 2 for name in kept})
    assert fastest(list(MILLISECONDS), measured.append, key=("op", 16), device=GPU) == "large"
    assert len(measured) == 3


def test_a_kept_decision_for_a_configuration_that_is_gone_is_measured_again(measured: list[str]) -> None:
    fastest(list(MILLISECONDS), measured.append, key="op", device=GPU)
    decide({name: 7 for name in decisions()})
    assert fastest(list(MILLISECONDS), measured.append, key="op", device=GPU) == "middle"


def test_more_than_four_configurations_are_refused(measured: list[str]) -> None:
    with pytest.raises(ValueError, match="may have 4 configurations, got 5"):
        fastest(["a"] * 5, measured.append, key="op", device=GPU)


def test_sizes_are_rounded_up_to_powers_of_two() -> None:
    assert [rounded(size) for size in (0, 1, 16, 17, 4096, 4097)] == [16, 16, 16, 32, 4096, 8192]
