"""peer_experts, peer_products and embedding_bag in torch: invariants 9 to 15 of the PEER specification.

The loops that they are compared with are those of tests/kernels/tables.py, in float64.
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.embedding_bag import embedding_bag
from kernels.peer_experts import peer_experts, peer_products
from kernels.tables import sums
from kernels.tables.routes import TableRoutes
from tests.kernels.compare import assert_same
from tests.kernels.tables import CASES, NAMES, Case, by_loop, make_inputs

OPS = tuple(NAMES)
PLAIN = ("torch", "reference")
WIDE = Case([9, 0, 5, 12], 8, 10, rows=7)


def apply(op: str, values: list[Tensor], routes: TableRoutes, *, backend: str = "torch", **options: Any) -> Tensor:
    if op == "experts":
        up = {"activation": "gelu"} | options
        return peer_experts(*values, routes=routes, backend=backend, **up)
    function: Callable[..., Tensor] = peer_products if op == "products" else embedding_bag
    return function(*values, routes=routes, backend=backend, **options)


def wide(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def both_ways(op: str, inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Output and gradients by name."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in NAMES[op]}
    output = apply(op, list(leaves.values()), inputs["routes"], **options)
    gradient = inputs["gradient_of_products" if op == "products" else "gradient"].to(output.dtype)
    found = torch.autograd.grad(output, list(leaves.values()), gradient)
    return {"output": output.detach(), **dict(zip(leaves, found, strict=True))}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "CHUNK_ELEMENTS", 40)


@pytest.fixture
def deterministic() -> Any:
    """As runs compute: torch refuses what is not deterministic, and fills memory that nobody has written with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("small_chunks", "deterministic")
@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_a_loop(op: str, name: str, backend: str):
    inputs = wide(make_inputs(CASES[name]))
    assert_same(both_ways(op, inputs, backend=backend), by_loop(op, inputs), tolerance=1e-13)


@pytest.mark.parametrize("chunk", [1, 40, 60, 100, 1000])
def test_chunks_may_end_anywhere(chunk: int, monkeypatch: pytest.MonkeyPatch):
    """5 copies of each row, 8 wide: 1, 5, 7, 12 and 125 copies at once."""
    monkeypatch.setattr(sums, "CHUNK_ELEMENTS", chunk)
    inputs = wide(make_inputs(Case([5] * 6, 8, 10)))
    assert_same(both_ways("experts", inputs), by_loop("experts", inputs), tolerance=1e-13)


@pytest.mark.parametrize("backend", PLAIN)
def test_relu_equals_a_loop(backend: str):
    inputs = wide(make_inputs(WIDE))
    inputs["rows"][inputs["routes"].row_C[0]] = 0.0  # z is 0 for its copies, where relu has slope 0
    found = both_ways("experts", inputs, backend=backend, activation="relu")
    assert_same(found, by_loop("experts", inputs, activation="relu"), tolerance=1e-13)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tables", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16])
def test_sums_are_taken_in_float32_and_each_result_is_rounded_once(op: str, rows: torch.dtype, tables: torch.dtype):
    inputs = make_inputs(CASES["C26_D12_L10_other_received_rows"], rows=rows, tables=tables)
    dtypes = {"rows": rows, "up": tables, "down": tables, "gates": torch.float32}
    dtypes["output"] = {"experts": rows, "products": torch.float32, "bag": tables}[op]
    inputs["gradient"] = inputs["gradient"].to(dtypes["output"])
    found, wanted = both_ways(op, inputs), by_loop(op, inputs)
    for name, tensor in found.items():
        assert tensor.dtype == dtypes[name], name
        half_step = 2.0**-8 if dtypes[name] == torch.bfloat16 else 0.0  # bfloat16 has 8 bits
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1.01 * half_step, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_gradients_agree_with_finite_differences(op: str):
    inputs = wide(make_inputs(Case([3, 0, 4], 3, 5, rows=2)))
    leaves = [inputs[name].requires_grad_() for name in NAMES[op]]
    assert torch.autograd.gradcheck(lambda *values: apply(op, list(values), inputs["routes"]), leaves)


@pytest.mark.parametrize("op", OPS)
def test_strides_do_not_matter(op: str):
    inputs = make_inputs(WIDE)
    strided = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.ndim == 2:
            value = torch.full((len(value) * 2, 24), torch.nan).index_copy(
                1, torch.arange(3, 19, 2), value.repeat(2, 1)
            )
            value = value[: len(value) // 2, 3:19:2]
        elif isinstance(value, Tensor):
            value = value.repeat_interleave(2)[::2]
        strided[name] = value
    assert_same(both_ways(op, strided), by_loop(op, inputs))
    expanded = {"gradient": torch.ones(1).expand(4, 8), "gradient_of_products": torch.ones(1).expand(26)}
    assert_same(both_ways(op, inputs | expanded), by_loop(op, inputs | expanded))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", NAMES["experts"])
def test_one_gradient_alone_is_the_one_beside_the_others(op: str, name: str):
    if name not in NAMES[op]:
        return
    inputs = make_inputs(WIDE)
    values = [inputs[each].detach().requires_grad_(each == name) for each in NAMES[op]]
    output = apply(op, values, inputs["routes"])
    gradient = inputs["gradient_of_products" if op == "products" else "gradient"]
    (found,) = torch.autograd.grad(output, [value for value in values if value.requires_grad], gradient)
    assert torch.equal(found, both_ways(op, inputs)[name])


def test_routes_are_a_permutation_whose_segments_have_the_copies_of_their_entries():
    inputs = make_inputs(WIDE)
    routes: TableRoutes = inputs["routes"]
    entries, order = routes.entry_C.tolist(), routes.order_C.tolist()
    assert order == sorted(range(26), key=lambda copy: (entries[copy], copy))
    for index_C, ends in ((routes.row_C, routes.row_ends_R), (routes.output_C, routes.output_ends_P)):
        assert ends.tolist() == [sum(row <= each for row in index_C.tolist()) for each in range(len(ends))]
    one_space = TableRoutes.of(routes.entry_C, routes.row_C, routes.row_C, num_rows=7, num_outputs=7)
    assert one_space.row_ends_R is one_space.output_ends_P


@pytest.mark.parametrize("op", OPS)
def test_rows_that_nobody_reads_get_exactly_zero_gradients(op: str):
    inputs = make_inputs(Case([10, 9], 20, 50))
    unread = torch.ones(50, dtype=torch.bool)
    unread[inputs["routes"].entry_C] = False
    assert unread.sum() > 25
    for name in {"up", "down"} & set(NAMES[op]):
        assert not both_ways(op, inputs)[name][unread].any()


@pytest.mark.parametrize("op", OPS)
def test_two_runs_are_equal_bit_for_bit_on_any_number_of_threads(op: str):
    inputs = make_inputs(Case([40] * 64, 32, 100))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(both_ways(op, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@pytest.mark.parametrize("op", OPS)
def test_a_permutation_of_the_entries_permutes_the_gradients_of_the_tables_and_nothing_else(op: str):
    inputs = make_inputs(WIDE)
    wanted, new_place = both_ways(op, inputs), torch.randperm(10, generator=torch.Generator().manual_seed(1))
    routes: TableRoutes = inputs["routes"]
    moved = TableRoutes.of(new_place[routes.entry_C], routes.row_C, routes.output_C, num_rows=7, num_outputs=4)
    tables = {name: torch.empty(10, 8).index_copy(0, new_place, inputs[name]) for name in ("up", "down")}
    found = both_ways(op, inputs | tables | {"routes": moved})
    for name, tensor in found.items():
        assert torch.equal(tensor[new_place] if name in tables else tensor, wanted[name]), name


def test_a_permutation_of_the_tokens_permutes_their_outputs_and_gradients():
    inputs, order = make_inputs(Case([5] * 6, 8, 10)), torch.tensor([3, 5, 0, 1, 4, 2])
    wanted = both_ways("experts", inputs)
    copies = (order[:, None] * 5 + torch.arange(5)).flatten()
    routes: TableRoutes = inputs["routes"]
    others = TableRoutes.of(routes.entry_C[copies], routes.row_C, routes.output_C, num_rows=6, num_outputs=6)
    moved = {name: inputs[name][order] for name in ("rows", "gradient")} | {"gates": inputs["gates"][copies]}
    found = both_ways("experts", inputs | moved | {"routes": others})
    assert torch.equal(found["output"], wanted["output"][order])
    assert torch.equal(found["rows"], wanted["rows"][order])
    assert torch.equal(found["gates"], wanted["gates"][copies])
    for name in ("up", "down"):  # sums in another order
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5)


def test_equal_tokens_that_all_read_one_entry_are_right_and_take_no_longer_than_others():
    """16,384 copies: each gradient of a table is one sum. The bound is wide because the machine may be busy; quadratic is 1,000 times."""
    copies = Case([32] * 512, 64, 4096)
    spread = make_inputs(copies)
    routes: TableRoutes = spread["routes"]
    one_C = torch.full_like(routes.entry_C, 77)
    one = TableRoutes.of(one_C, routes.row_C, routes.output_C, num_rows=512, num_outputs=512)
    equal = spread | {"rows": spread["rows"][:1].expand(512, 64).contiguous(), "gates": torch.ones(512 * 32) / 32}
    found = both_ways("experts", equal | {"routes": one})
    z = (equal["rows"][0].double() @ equal["up"][77].double()).item()
    act = 0.5 * z * (1 + torch.erf(torch.tensor(z / 2**0.5, dtype=torch.float64)))
    torch.testing.assert_close(
        found["output"].double(), (act * equal["down"][77].double()).expand(512, 64), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        found["down"][77].double(), act * equal["gradient"].double().sum(0), rtol=1e-4, atol=1e-4
    )

    def seconds(inputs: dict[str, Any]) -> float:
        began = time.process_time()
        both_ways("experts", inputs)
        return time.process_time() - began

    assert min(seconds(equal | {"routes": one}) for _ in range(3)) < 5 * min(seconds(spread) for _ in range(3))


def of_ranks(inputs: dict[str, Any], ranges: list[slice], columns: list[slice]) -> dict[str, Tensor]:
    """What `experts` gives where each rank has a range of the entries and some of their columns; z is summed over the columns."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in NAMES["experts"]}
    routes: TableRoutes = inputs["routes"]
    sizes: dict[str, Any] = {"num_rows": routes.num_rows, "num_outputs": routes.num_outputs}
    outputs: list[list[Tensor]] = []
    for part in ranges:
        held = (routes.entry_C >= part.start) & (routes.entry_C < part.stop)
        local = TableRoutes.of(routes.entry_C[held] - part.start, routes.row_C[held], routes.output_C[held], **sizes)
        up, down, gates = leaves["up"][part], leaves["down"][part], leaves["gates"][held]
        if len(columns) == 1:
            outputs.append([apply("experts", [leaves["rows"], up, down, gates], local)])
            continue
        z = torch.stack([apply("products", [leaves["rows"][:, some], up[:, some]], local) for some in columns]).sum(0)
        weights = gates * torch.nn.functional.gelu(z)
        outputs.append([apply("bag", [down[:, some], weights], local) for some in columns])
    output = torch.stack([torch.cat(row, dim=1).to(inputs["rows"].dtype) for row in outputs]).sum(0)
    found = torch.autograd.grad(output, list(leaves.values()), inputs["gradient"])
    return {"output": output.detach(), **dict(zip(leaves, found, strict=True))}


@pytest.mark.parametrize(
    ("num_ranges", "num_columns"), [(1, 2), (1, 4), (1, 8), (2, 1), (4, 1), (8, 1), (2, 2), (2, 4)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_cut_by_rows_columns_or_both_are_one_table(num_ranges: int, num_columns: int, dtype: torch.dtype):
    inputs = make_inputs(Case([7, 0, 20, 1, 9], 16, 24, rows=6), rows=dtype, tables=dtype)
    cut = [
        [slice(first, first + size // parts) for first in range(0, size, size // parts)]
        for size, parts in ((24, num_ranges), (16, num_columns))
    ]
    found = of_ranks(inputs, cut[0], cut[1])
    assert_same(found, by_loop("experts", inputs), tolerance=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("op", OPS)
def test_under_autocast_rows_and_results_are_rounded_and_tables_are_not(op: str):
    inputs = make_inputs(WIDE)
    leaves = [inputs[name].requires_grad_() for name in NAMES[op]]
    with torch.autocast("cpu", torch.bfloat16):
        found = apply(op, leaves, inputs["routes"])
    rounded = [value.bfloat16() if name == "rows" else value for name, value in zip(NAMES[op], leaves, strict=True)]
    wanted = apply(op, rounded, inputs["routes"])
    assert found.dtype == (torch.float32 if op == "products" else torch.bfloat16)
    assert torch.equal(found, wanted.to(found.dtype))
    for gradient in torch.autograd.grad(found.float().sum(), leaves):
        assert gradient.dtype == torch.float32


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("op", OPS)
def test_autocast_leaves_float64_as_it_is(op: str, backend: str):
    inputs = wide(make_inputs(WIDE))
    with torch.autocast("cpu", torch.bfloat16):
        output = apply(op, [inputs[name] for name in NAMES[op]], inputs["routes"], backend=backend)
    assert output.dtype == torch.float64
    torch.testing.assert_close(output, by_loop(op, inputs)["output"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_kept_are_the_arguments_and_numbers_per_copy(op: str):
    inputs = make_inputs(Case([16] * 8, 12, 30))
    leaves = [inputs[name].requires_grad_() for name in NAMES[op]]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        apply(op, leaves, inputs["routes"])
    of_copies = [tensor for tensor in kept if tensor.data_ptr() not in {leaf.data_ptr() for leaf in leaves}]
    assert all(tensor.ndim == 1 and len(tensor) <= 128 for tensor in of_copies)
    assert sum(tensor.is_floating_point() for tensor in of_copies) == (1 if op == "experts" else 0)
