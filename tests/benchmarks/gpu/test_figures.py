"""What the GPU benchmarks make of times: medians, shares of the attainable rate, ratios, MFU, met or missed; and what they refuse."""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import kernel_bench, layers, timing, training
from benchmarks.gpu.kernel_bench import Bench, Inputs, Work
from benchmarks.gpu.timing import Machine, Speeds, Times
from benchmarks.gpu.training import TINY, TINY_DENSE, Result, read
from benchmarks.kernels import bench_top_k_attention
from data.prepare import main as prepare
from kernels.traffic import Pass, Traffic

CPU = timing.find_machine(smoke=True)


@dataclass(frozen=True)
class Layer:
    name: str
    size: int


@dataclass(frozen=True)
class Measuring(Machine):
    """A CPU that claims to be a GPU."""

    @property
    def measures(self) -> bool:
        return True

    @property
    def cache_bytes(self) -> int:
        return 1000


def make(layer: Layer, *, zipf: bool, seed: int, device: torch.device) -> Inputs:
    leaf = torch.full((layer.size,), 1.0 + seed, requires_grad=True)
    return Inputs((leaf,), torch.ones(layer.size), zipf)


def square(inputs: Inputs) -> Tensor:
    return inputs.leaves[0].square()


BENCH = Bench(
    op="square",
    layers=(Layer("ten", 10),),
    smoke_layers=(),
    leaf_names=("x",),
    make=make,
    functions={"rival": square, "ours": square, "prepared": square},
    ours=("ours",),
    judged="prepared",
    faster="ours",
    rival="rival",
    reference=square,
    # 2 ms of arithmetic at 1 TFLOP/s and 1 ms of bytes at 1 GB/s; our own launches move 8 times those
    work=lambda layer, *, backward: Work(2 * 10**9 * (1 + backward), 10**6 * (1 + backward), 8 * 10**6),
    share={"fwd": 0.5, "fwd+bwd": 0.5},
    speedup=1.3,
)
SPEEDS = Speeds(1e12, 1e9)
MILLISECONDS = {"rival": [14.0, 15.0, 90.0], "ours": [10.0, 11.0, 9.0], "prepared": [5.0, 1.0, 9.0]}


def test_a_share_is_the_larger_of_two_floors_over_the_median_and_the_ratio_is_rival_over_ours(monkeypatch):
    times = {name: Times(values, [0.5, 0.25, 9.0]) for name, values in MILLISECONDS.items()}
    monkeypatch.setattr(kernel_bench, "time_all", lambda functions: times)
    measure = kernel_bench.measure
    machine = Measuring(torch.device("cpu"), "test")
    row = measure(BENCH, BENCH.layers[0], machine, SPEEDS, zipf=True, backward=False)
    assert row.attainable == pytest.approx(2.0)
    assert row.shares == pytest.approx((2.0 / 5.0, 8.0 / 5.0))
    assert row.ratio == pytest.approx(15.0 / 10.0)
    assert row.tflops == pytest.approx(2e9 / 5e-3 / 1e12)
    assert str(row).startswith("| ten | Zipf 1.0 | fwd | 15.000 ± ")
    assert "| 0.50 / 0.50 / 0.50 | 1.50 | 2.000 |" in str(row)
    columns = kernel_bench.head(BENCH, machine, SPEEDS).splitlines()[-2]
    assert columns.count("|") == str(row).count("|")
    assert "| prepared | host | rival / ours | attainable |" in columns
    both = measure(BENCH, BENCH.layers[0], machine, SPEEDS, zipf=False, backward=True)
    assert kernel_bench.verdicts(BENCH, [row, both]) == [
        "- bar: square fwd, share of attainable, at least 50%: **missed** (0 of 1 reach it). ten Zipf 1.0 40%",
        "- bar: square fwd+bwd, share of attainable, at least 50%: met. ten uniform 80%",
        "- bar: square, rival / ours, at least 1.30: met. ten Zipf 1.0 fwd 1.50; ten uniform fwd+bwd 1.50",
    ]


def test_a_function_is_timed_on_its_layers_alone_and_a_bar_is_judged_on_its_rows(monkeypatch):
    monkeypatch.setattr(
        kernel_bench, "time_all", lambda functions: {name: Times([2.0, 2.0], [0.5]) for name in functions}
    )
    bench = replace(
        BENCH, only={"rival": lambda layer: layer.size == 10}, bars=lambda layer, zipf: layer.size == 10 and not zipf
    )
    machine, sizes = Measuring(torch.device("cpu"), "test"), (Layer("ten", 10), Layer("six", 6))
    cases = [(layer, zipf) for layer in sizes for zipf in (False, True)]
    rows = [kernel_bench.measure(bench, layer, machine, SPEEDS, zipf=zipf, backward=False) for layer, zipf in cases]
    assert [row.ratio for row in rows] == [1.0, 1.0, None, None]
    assert str(rows[2]).startswith("| six | uniform | fwd | not measured | 2.000 ")
    assert "| - / 0.50 / 0.50 | - |" in str(rows[2])
    assert [line.split("it). ")[-1].split("met. ")[-1] for line in kernel_bench.verdicts(bench, rows)] == [
        "ten uniform 100%",
        "- bar: square fwd+bwd, share of attainable, at least 50%: not measured",
        "ten uniform fwd 1.00",
    ]


def test_top_k_attention_is_judged_where_flash_reads_no_more_keys_and_chunks_are_timed_on_short_rows():
    bench = bench_top_k_attention.BENCH
    judged = {(layer.tokens, zipf) for layer in bench.layers for zipf in (False, True) if bench.bars(layer, zipf)}
    assert judged == {(16_384, False)}
    assert {layer.tokens for layer in bench.layers if "chunks" in bench.timed(layer)} == {4096}
    assert all({"flash", "ours"} <= {*bench.timed(layer)} for layer in bench.layers)


def test_the_work_of_both_passes_is_the_sum_of_what_their_launches_move_and_of_their_bounds():
    forward = Pass({"one": Traffic(3, 4, again=20, asked=900), "two": Traffic(5, 6)}, bound=10)
    passes = {"forward": forward, "backward": Pass({"three": Traffic(100, 200)}, bound=50)}
    assert Work.of(7, passes, backward=False) == Work(flops=7, bound=10, own=3 + 4 + 20 + 5 + 6)
    assert Work.of(9, passes, backward=True) == Work(flops=9, bound=60, own=38 + 300)


@pytest.mark.parametrize("size", [10, 26, 1000])
@pytest.mark.parametrize("num_functions", [1, 2, 3, 4])
def test_between_two_uses_of_a_set_by_any_function_more_than_twice_the_cache_is_read(num_functions: int, size: int):
    read: list[float] = []
    functions = {
        str(number): lambda inputs: (read.append(float(inputs.leaves[0][0].detach())), square(inputs))[1]
        for number in range(num_functions)
    }
    bench = replace(BENCH, functions=functions)
    machine = Measuring(torch.device("cpu"), "test")
    calls = kernel_bench.calls(bench, Layer("", size), machine, zipf=False, backward=False)
    for turn in range(-timing.WARM_UP, 120):
        for name in functions:
            calls[name](turn)
    last: dict[float, int] = {}
    for now, seed in enumerate(read):
        if seed in last:
            between = set(read[last[seed] + 1 : now])
            assert len(between) * size * 4 > 2 * machine.cache_bytes
        last[seed] = now
    assert len(read) > 2 * len(last)


def test_sets_are_as_many_as_the_smallest_inputs_of_a_function_need():
    """A rival that reads a tenth of the bytes would otherwise find them in the cache."""
    machine, seen = Measuring(torch.device("cpu"), "test"), []

    def tenth(inputs: Inputs) -> Inputs:
        return replace(inputs, leaves=(inputs.leaves[0][:10],))

    def rival(inputs: Inputs) -> Tensor:
        seen.append(float(inputs.leaves[0][0].detach()))
        return square(inputs)

    bench = replace(BENCH, functions={"rival": rival, "ours": square}, adapt={"rival": tenth})
    call = kernel_bench.calls(bench, Layer("", 100), machine, zipf=False, backward=False)["rival"]
    for turn in range(200):
        call(turn)
    assert len(set(seen)) * 40 > 2 * machine.cache_bytes


def test_rows_that_were_measured_are_printed_before_the_next_is(monkeypatch, capsys):
    """A step that runs out of time leaves them."""
    monkeypatch.setattr(sys, "argv", ["bench", "--smoke"])
    monkeypatch.setattr(kernel_bench, "interpreted", lambda: True)
    monkeypatch.setattr(kernel_bench, "why_not_triton", lambda device_type: None)
    right = kernel_bench.measure

    def measure(*args: Any, backward: bool, **options: Any) -> kernel_bench.Row:
        if backward:
            raise RuntimeError("the second row")
        return right(*args, backward=backward, **options)

    monkeypatch.setattr(kernel_bench, "measure", measure)
    with pytest.raises(SystemExit, match="error: the second row"):
        kernel_bench.main(replace(BENCH, smoke_layers=BENCH.layers))
    text = capsys.readouterr().out
    assert text.startswith("# square on ")
    assert text.splitlines()[-1].startswith("| ten | Zipf 1.0 | fwd | not measured |")


def test_training_without_shards_ends_in_one_sentence(monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setattr(
        sys, "argv", ["training", "--smoke", "--shards", f"{tmp_path}/none", "--runs", f"{tmp_path}/runs"]
    )
    with pytest.raises(SystemExit, match=r"error: there is no folder of shards at .*none/train"):
        training.main()
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "runs").exists()


class _Worse:
    """Off by some share of what is right, or only in its second call."""

    def __init__(self, factor: float, *, from_call: int) -> None:
        self.factor, self.from_call, self.calls = factor, from_call, 0

    def __call__(self, inputs: Inputs) -> Tensor:
        self.calls += 1
        return square(inputs) * (self.factor if self.calls >= self.from_call else 1.0)


@pytest.mark.parametrize(
    ("factor", "from_call", "says"),
    [(1.1, 1, "output"), (float("nan"), 1, "output"), (1.001, 2, "two runs are equal: False")],
)
def test_a_wrong_function_is_not_timed(factor: float, from_call: int, says: str):
    bench = replace(BENCH, functions={**BENCH.functions, "ours": _Worse(factor, from_call=from_call)})
    with pytest.raises(RuntimeError, match="square is wrong") as caught:
        kernel_bench.check(bench, BENCH.layers[0], zipf=False, device=torch.device("cpu"))
    assert says in str(caught.value)
    kernel_bench.check(BENCH, BENCH.layers[0], zipf=False, device=torch.device("cpu"))


def test_an_attention_layer_that_differs_from_its_reference_is_not_timed(monkeypatch):
    of = layers.subject("switchhead_xl_47m_wt103", CPU)
    assert list(of.banks) == ["layers.0.mixer.value_experts", "layers.0.mixer.output_experts"]
    layers.check(of, dict.fromkeys(of.banks, "loop"), CPU)
    from model import experts

    right = experts.grouped_matmul

    def wrong(*args: Any, **options: Any) -> Tensor:
        return right(*args, **options) * (1.2 if options["backend"] == "loop" else 1.0)

    monkeypatch.setattr(experts, "grouped_matmul", wrong)
    with pytest.raises(RuntimeError, match="the output is off by"):
        layers.check(of, dict.fromkeys(of.banks, "loop"), CPU)


@pytest.mark.parametrize("pair", layers.PAIRS, ids=lambda pair: pair[0])
def test_both_layers_of_a_pair_see_the_same_tokens(pair: tuple[str, str]):
    ours, dense = (layers.subject(name, Measuring(torch.device("cpu"), "test")) for name in pair)
    for size in ("rows", "length", "num_memory"):
        assert getattr(ours, size) == getattr(dense, size)
    assert (ours.num_memory > 0) == ("_xl_" in pair[0])
    assert ours.config.model.d_model == dense.config.model.d_model
    assert ours.banks
    assert not dense.banks


def test_speeds_are_those_of_the_gpu_or_those_that_are_given():
    none, given = (argparse.Namespace(peak_tflops=t, bandwidth_gb=g) for t, g in ((None, None), (100.0, 2000.0)))
    h200 = Measuring(torch.device("cpu"), "NVIDIA H200")
    assert timing.speeds_of(h200, none) == Speeds(989e12, 4.8e12)
    assert timing.speeds_of(h200, given) == Speeds(100e12, 2e12)
    assert timing.speeds_of(Measuring(torch.device("cpu"), "NVIDIA H100 80GB HBM3"), none) == Speeds(989e12, 3.35e12)
    for other in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "another"):
        with pytest.raises(ValueError, match="--peak-tflops"):
            timing.speeds_of(Measuring(torch.device("cpu"), other), none)


def test_a_training_run_is_judged_without_its_first_record_and_by_the_flops_of_its_tokens():
    speeds = (1.0, 1000.0, 3000.0, 2000.0)
    records = [
        {"step": 10 * n, "tokens": 500 * n, "loss": 5.0 - n, "tokens_per_second": speed}
        for n, speed in enumerate(speeds, 1)
    ]
    records[-1]["heldout_loss"] = 4.25
    result = Result("run", 46_000_000, 3e6, records, 7_000_000_000, "")
    row = result.row(Measuring(torch.device("cpu"), "test"), Speeds(1e12, 1e12))
    assert row == "| run | 46.0 M | 3 M | 40 | 2,000 | 25.0 | 0.6% | 7.00 GB | 1.0000 | 4.2500 | well |"
    none = replace(result, records=[], ending="**failed** with status 1")
    assert none.row(CPU, Speeds(1e12, 1e12)).count("|") == row.count("|")


def test_the_flops_of_a_token_are_six_per_weight_and_those_of_attention(tmp_path: Path):
    """A dense model by hand: six FLOPs for each weight of a matrix that meets the token, and scores and values over the row."""
    source = tmp_path / "text"
    source.mkdir()
    for number in range(60):
        (source / f"{number}.txt").write_text(f"document {number} " * 9)
    prepare(["--source", str(source), "--out", str(tmp_path / "shards"), "--tokenizer", "bytes", "--workers", "1"])
    args = argparse.Namespace(runs=tmp_path, shards=tmp_path / "shards", steps=3, smoke=True, set=[])
    found = read("dense_47m", cast(Any, args), "")
    d, length, heads, width, hidden, vocabulary = 16, 16, 2, 8, 32, 257
    assert {"model.d_model=16", "data.sequence_length=16"} <= set(TINY)
    assert "model.dense_mlp.hidden_dim=32" in TINY_DENSE
    weights = 4 * d * heads * width + 2 * d * hidden + d * vocabulary
    assert found.flops == 6 * (weights + 2 * length * heads * width)
    assert found.records == []
