"""What the benches of the table ops make of times, what they choose, and what their backward pass computes."""

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import kernel_bench, table_bench
from benchmarks.gpu.kernel_bench import Work
from benchmarks.gpu.table_bench import Layer, Row, choose, few_tokens, routes_of, verdicts
from benchmarks.gpu.timing import Speeds, Times
from benchmarks.kernels import bench_embedding_bag, bench_peer_experts
from kernels.tables.routes import TableRoutes
from tests.benchmarks.gpu.test_figures import CPU, Measuring

LAYER = Layer("small", 5, 12, 64, 8)
BENCHES = pytest.mark.parametrize("module", [bench_peer_experts, bench_embedding_bag], ids=["peer", "bag"])


def test_the_share_is_of_the_copy_on_the_bytes_that_must_move(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {
        "torch": Times([8.0, 9.0, 7.0], [0.5]),
        "ours": Times([2.0, 1.0, 9.0], [0.25]),
        "routes": Times([0.5, 0.5, 0.5], [0.1]),
    }
    monkeypatch.setattr(table_bench, "time_all", lambda functions: times)
    monkeypatch.setattr(table_bench, "calls", lambda *args, **options: {})
    # 1.2 GB in 2 ms are 600 GB/s; our own launches move twice that
    bench = replace(bench_peer_experts.BENCH, work=lambda layer, *, backward: Work(0, 12 * 10**8, 24 * 10**8))
    machine = Measuring(torch.device("cpu"), "test")
    row = table_bench.measure(bench, LAYER, machine, 1e12, zipf=True, backward=True)
    assert row.share == pytest.approx(0.6)
    assert row.text.startswith("| small | Zipf 1.0 | bwd | 8.000 ± ")
    assert row.text.endswith("| 0.500 ± 0.000 | 0.50 / 0.25 / 0.10 | 4.00 | 3.20 | 600 | 60% | 120% |")
    head = table_bench.head(bench, machine, 1e12, Speeds(1.0, 2e12))
    assert "copy: 1.000 TB/s, of 1 GiB" in head
    assert "the peak is 2.00 TB/s" in head
    assert head.splitlines()[-2].count("|") == row.text.count("|")
    assert "| torch / ours | torch / (ours + routes) |" in head.splitlines()[-2]


@BENCHES
def test_the_backward_pass_by_itself_gives_the_gradients_of_the_reference(module) -> None:
    functions = {"torch": module.by_reference, "ours": module.by_reference}
    bench = replace(module.BENCH, functions=functions)
    inputs = module.make(LAYER, zipf=False, seed=0, device=CPU.device)
    wide = replace(inputs, leaves=tuple(leaf.detach().double().requires_grad_() for leaf in inputs.leaves))
    bench = replace(bench, make=lambda layer, **options: wide)
    found = table_bench.calls(bench, LAYER, CPU, zipf=False, backward=True)["ours"](0)
    wanted = torch.autograd.grad(module.by_reference(wide), wide.leaves, wide.gradient)
    for one, other in zip(found, wanted, strict=True):  # type: ignore[call-overload]
        assert torch.equal(one, other)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_beside_the_functions_the_routes_of_the_inputs_of_ours_are_timed(backward: bool) -> None:
    bench = replace(bench_peer_experts.BENCH, functions=dict.fromkeys(("torch", "ours"), bench_peer_experts.by_torch))
    calls = table_bench.calls(bench, LAYER, CPU, zipf=False, backward=backward)
    assert [*calls] == ["torch", "ours", "routes"]
    made = [bench.make(LAYER, zipf=False, seed=seed, device=CPU.device).rest.routes for seed in range(4)]
    for turn in range(4):
        routes = calls["routes"](turn)
        assert isinstance(routes, TableRoutes)
        assert torch.equal(routes.order_C, made[(turn + 2) % 4].order_C)


def test_a_bar_is_also_judged_on_tables_as_a_run_holds_them_whose_bytes_are_counted() -> None:
    rows = {layer.dtype: layer for layer in bench_peer_experts.LAYERS if "columns" not in layer.name}
    assert {*rows} == {torch.bfloat16, torch.float32}
    wide = rows[torch.float32]
    inputs = bench_peer_experts.make(replace(LAYER, dtype=torch.float32), zipf=False, seed=0, device=CPU.device)
    assert [leaf.dtype for leaf in inputs.leaves] == [torch.bfloat16, *[torch.float32] * 3]
    bound = {dtype: bench_peer_experts.BENCH.work(replace(wide, dtype=dtype), backward=False).bound for dtype in rows}
    # a copy reads a row of each table; ids, gates and rows are the same
    assert bound[torch.float32] - bound[torch.bfloat16] == 2 * wide.tokens * wide.choices * wide.d_model * 2


@BENCHES
def test_the_rival_computes_the_same(module) -> None:
    inputs = module.make(LAYER, zipf=True, seed=0, device=CPU.device)
    found, wanted = module.by_torch(inputs).double(), module.by_reference(inputs).double()
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


@BENCHES
def test_the_check_gets_few_tokens_of_a_small_table_with_their_own_routes(module) -> None:
    inputs = module.make(LAYER, zipf=False, seed=0, device=CPU.device)
    few = few_tokens(inputs, tables=(1, 2) if module is bench_peer_experts else (0,), entries=16, tokens=3)
    entry_TA = inputs.rest.entry_TA[:3] % 16
    assert torch.equal(few.rest.entry_TA, entry_TA)
    assert torch.equal(few.rest.routes.entry_C, entry_TA.flatten())
    assert [len(leaf) for leaf in few.leaves] == ([3, 16, 16, 24] if module is bench_peer_experts else [16, 24])
    assert all(torch.equal(leaf, whole[: len(leaf)]) for leaf, whole in zip(few.leaves, inputs.leaves, strict=True))
    assert module.by_reference(few).shape == few.gradient.shape == (3, 12)


def test_by_zipf_s_law_half_of_the_draws_fall_on_the_square_root_of_the_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Layer("", 4096, 1, 2**16, 16)
    uniform, zipf = (choose(layer, zipf=each, generator=generator).entry_TA.flatten() for each in (False, True))
    for entry_C in (uniform, zipf):
        assert 0 <= int(entry_C.min()) <= int(entry_C.max()) < 2**16
    share_of_popular = [
        float(each.bincount().sort(descending=True).values[:256].sum()) / each.numel() for each in (uniform, zipf)
    ]
    assert share_of_popular[0] < 0.02
    assert share_of_popular[1] == pytest.approx(0.5, abs=0.02)


def test_the_bars_are_held_on_uniform_routing_alone() -> None:
    rows = [
        Row("small", zipf, part, "", share)
        for zipf, part, share in ((False, "fwd", 0.8), (True, "fwd", 0.1), (False, "bwd", 0.4), (True, "bwd", 0.9))
    ]
    forward, backward = verdicts(bench_peer_experts.BENCH, rows)
    assert "small uniform" in forward
    assert "MISSED" not in forward.upper()
    assert "MISSED" in backward.upper()


def test_the_command_takes_the_speeds_of_a_gpu_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    monkeypatch.setattr("sys.argv", ["bench", "--peak-tflops", "100", "--bandwidth-gb", "3000"])
    monkeypatch.setattr(kernel_bench, "find_machine", lambda *, smoke: Measuring(torch.device("cpu"), "unheard of"))
    monkeypatch.setattr(kernel_bench, "why_not_triton", lambda device_type: None)
    monkeypatch.setattr(table_bench, "check", lambda *args, **options: None)
    monkeypatch.setattr(table_bench, "copy_bandwidth", lambda machine: None)
    monkeypatch.setattr(table_bench, "head", lambda *args: given.append(args[3].bandwidth))
    table_bench.main(replace(bench_peer_experts.BENCH, layers=()))
    assert given == [3e12]


def test_routes_are_of_tokens_that_read_and_write_themselves() -> None:
    routes = routes_of(torch.tensor([[3, 1], [1, 0]]))
    assert routes.row_C.tolist() == routes.output_C.tolist() == [0, 0, 1, 1]
    assert routes.order_C.tolist() == [3, 1, 2, 0]
    assert routes.output_ends_P.tolist() == [2, 4]
