"""The choice among a kernel's configurations, with a clock that the test sets."""

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton

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
    repeats, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    yield names
    torch.use_deterministic_algorithms(repeats, warn_only=warns)
    decide(kept)


def test_the_fastest_is_measured_once_for_each_key(measured: list[str]) -> None:
    for rows in (1000, 900, 1024):
        assert fastest(list(MILLISECONDS), measured.append, key=("op", rounded(rows)), device=GPU) == "middle"
    assert measured == ["small", "middle", "large"]
    fastest(list(MILLISECONDS), measured.append, key=("op", rounded(1500)), device=GPU)
    assert len(measured) == 6


def test_nothing_is_measured_without_a_gpu_or_where_results_must_repeat(measured: list[str]) -> None:
    assert fastest(list(MILLISECONDS), measured.append, key="op", device=torch.device("cpu")) == "small"
    torch.use_deterministic_algorithms(True)
    assert fastest(list(MILLISECONDS), measured.append, key="op", device=GPU) == "small"
    assert measured == []
    assert decisions() == {}


def test_while_a_graph_is_recorded_nothing_is_measured_or_kept_but_what_was_decided_holds(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest(list(MILLISECONDS), measured.append, key=("op", 16), device=GPU)
    kept = decisions()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with measuring():
        assert fastest(list(MILLISECONDS), measured.append, key=("op", 32), device=GPU) == "small"
        assert fastest(list(MILLISECONDS), measured.append, key=("op", 16), device=GPU) == "middle"
    assert len(measured) == 3
    assert decisions() == kept


def test_before_a_run_they_are_measured_and_then_hold_where_results_must_repeat(measured: list[str]) -> None:
    torch.use_deterministic_algorithms(True)
    with measuring():
        assert fastest(list(MILLISECONDS), measured.append, key=("op", 16), device=GPU) == "middle"
    assert fastest(list(MILLISECONDS), measured.append, key=("op", 16), device=GPU) == "middle"
    assert fastest(list(MILLISECONDS), measured.append, key=("op", 32), device=GPU) == "small"
    assert len(measured) == 3


def test_decisions_that_were_kept_are_taken_without_measuring(measured: list[str]) -> None:
    fastest(list(MILLISECONDS), measured.append, key=("op", 16), device=GPU)
    kept = json.loads(json.dumps(decisions()))
    decide({})
    decide({name: 2 for name in kept})
    assert fastest(list(MILLISECONDS), measured.append, key=("op", 16), device=GPU) == "large"
    assert len(measured) == 3


def test_another_list_of_configurations_is_measured_again(measured: list[str]) -> None:
    """Also one of the same length, in which a number would name another configuration."""
    fastest(list(MILLISECONDS), measured.append, key="op", device=GPU)
    for changed, wanted in ((["small", "large"], "large"), (["large", "small", "middle"], "middle")):
        measured.clear()
        assert fastest(changed, measured.append, key="op", device=GPU) == wanted
        assert measured == changed
    assert len(decisions()) == 3


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (torch.cuda, "get_device_name", lambda device: "another GPU"),
        (torch, "__version__", "3.0.0"),
        (triton, "__version__", "4.0.0"),
    ],
    ids=["device", "torch", "triton"],
)
def test_another_device_or_compiler_is_measured_again(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, value: Any
) -> None:
    fastest(list(MILLISECONDS), measured.append, key="op", device=GPU)
    monkeypatch.setattr(owner, name, value)
    fastest(list(MILLISECONDS), measured.append, key="op", device=GPU)
    assert len(measured) == 6
    assert len(decisions()) == 2


def test_where_products_round_to_tf32_tiles_are_measured_again(measured: list[str]) -> None:
    """By either of torch's switches, of which the second is the older one."""
    before = torch.get_float32_matmul_precision()
    fastest(list(MILLISECONDS), measured.append, key="op", device=GPU)
    try:
        torch.set_float32_matmul_precision("high")
        fastest(list(MILLISECONDS), measured.append, key="op", device=GPU)
        assert len(measured) == 6
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_tf32 = True
        fastest(list(MILLISECONDS), measured.append, key="op", device=GPU)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(measured) == 6
    assert len(decisions()) == 2


def test_a_decision_has_the_same_name_in_every_process(measured: list[str]) -> None:
    """Python's own hash of a text would not."""
    fastest(list(MILLISECONDS), measured.append, key=("op", 16), device=GPU)
    tiles = hashlib.sha256(b"('small', 'middle', 'large')").hexdigest()[:8]
    build = f"torch {torch.__version__}, triton {triton.__version__}, tiles {tiles}"
    assert decisions() == {f"a GPU, {build}: ('op', 16)": 1}


def test_a_kept_number_beyond_the_configurations_is_refused(measured: list[str]) -> None:
    """Two of them: the largest number that any kernel may have, 3, is none of theirs. Below 0 Python would count from the end."""
    fastest(["small", "middle"], measured.append, key="op", device=GPU)
    (name,) = decisions()
    for number in (2, 3, -1):
        decide({name: number})
        with pytest.raises(RuntimeError, match=rf"must be below 2, but {number} was kept: remove it"):
            fastest(["small", "middle"], measured.append, key="op", device=GPU)


def test_more_than_four_configurations_are_refused(measured: list[str]) -> None:
    with pytest.raises(ValueError, match="may have 4 configurations, got 5"):
        fastest(["a"] * 5, measured.append, key="op", device=GPU)


def test_sizes_are_rounded_to_the_power_of_two_that_is_nearest_by_ratio() -> None:
    assert [rounded(size) for size in (0, 1, 16, 22, 23, 4096, 5792, 5793)] == [16, 16, 16, 16, 32, 4096, 4096, 8192]
    sizes = [*range(16, 3000), *range(10**6, 10**6 + 50)]
    assert [rounded(size) for size in sizes] == [2 ** round(math.log2(size)) for size in sizes]


def test_what_uneven_routing_sends_has_the_tiles_of_even_routing(measured: list[str]) -> None:
    """8 ranks, each with 4,096 tokens that choose 4 of 64 experts: what a rank gets is a little more or less than 16,384."""
    generator = torch.Generator().manual_seed(1)
    experts_TK = torch.rand(8 * 4096, 64, generator=generator).topk(4).indices
    copies = (experts_TK // 8).flatten().bincount().tolist()
    assert min(copies) < 4096 * 4 < max(copies)
    with measuring():
        fastest(list(MILLISECONDS), measured.append, key=rounded(4096 * 4), device=GPU)
    torch.use_deterministic_algorithms(True)
    assert {fastest(list(MILLISECONDS), measured.append, key=rounded(size), device=GPU) for size in copies} == {
        "middle"
    }
