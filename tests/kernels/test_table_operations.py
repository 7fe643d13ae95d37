"""The table operations as operations: their bytes, what they save, torch.compile, opcheck, autocast, addresses beyond 2**31."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from kernels.embedding_bag import traffic as bag_traffic
from kernels.peer_experts import traffic
from kernels.tables.adam import RowAdam
from kernels.tables.routes import TableRoutes
from kernels.tables.traffic import Shape
from tests.kernels.compare import assert_same, compiled
from tests.kernels.memory import Launch, assert_touched, bytes_saved, recorded_launches
from tests.kernels.tables import NAMES, Case, apply, by_kernel, by_loop, make_inputs

Run = Callable[..., Any]
PLACES = 4
SMALL = Case([9, 1, 5, 12], 12, 10, only=[0, 4, 5, 9])
CASES = {
    "runs_cross_programs": SMALL,
    "one_program": Case([1, 2], 20, 6),
    "one_entry_has_all": Case([9, 5], 5, 4, only=[2]),
    "other_received_rows": Case([9, 1, 5, 12], 12, 10, rows=5),
}


def every_row_has_a_copy(case: Case) -> dict[str, Any]:
    inputs = make_inputs(case)
    routes = inputs["routes"]
    if case.rows is not None:
        row_C = (torch.arange(sum(case.copies)) % case.rows).sort().values
        inputs["routes"] = TableRoutes.of(
            routes.entry_C, row_C, routes.output_C, num_rows=case.rows, num_outputs=len(case.copies)
        )
    return inputs


def shape_of(case: Case, routes: TableRoutes) -> Shape:
    """With the entries whose copies span several programs, and their parts, counted one by one."""
    sorted_C = routes.entry_C[routes.order_C].tolist()
    programs: dict[int, set[int]] = {}
    for place, entry in enumerate(sorted_C):
        programs.setdefault(entry, set()).add(place // PLACES)
    several = [len(each) for each in programs.values() if len(each) > 1]
    return Shape(
        copies=len(sorted_C), rows=routes.num_rows, outputs=routes.num_outputs, entries=case.entries, touched=len(programs),
        d_model=case.width, row_size=4, table_size=4, places=PLACES, spanning=len(several), parts=sum(several),
    )  # fmt: skip


def both_passes(op: str, inputs: dict[str, Any], adam: bool) -> list[Launch]:
    from kernels.tables import by_entry

    leaves = {name: inputs[name].requires_grad_() for name in NAMES[op]}
    adams = tuple(RowAdam.zeros(leaves[name], lr=0.1) for name in ("up", "down") if name in leaves)
    options: dict[str, Any] = {"adam": adams if op == "experts" else adams[0]} if adam else {}
    with patch.multiple(by_entry, PLACES=PLACES, PARTS=2), recorded_launches() as launches:
        output = apply(op, leaves, inputs["routes"], **options)
        output.backward(inputs["gradient"])
    return launches


@pytest.mark.parametrize("adam", [False, True], ids=["gradient", "adam"])
@pytest.mark.parametrize("op", ["experts", "bag"])
@pytest.mark.parametrize("name", CASES)
def test_the_byte_model_is_what_the_kernels_touch_and_nothing_is_written_twice(
    name: str, op: str, adam: bool, interpreted: Run
) -> None:
    inputs = every_row_has_a_copy(CASES[name])
    found = interpreted(both_passes, op, inputs, adam)
    shape, model = shape_of(CASES[name], inputs["routes"]), {"experts": traffic, "bag": bag_traffic}[op]
    wanted = {
        **{f"forward {part}": each for part, each in model.forward(shape).items()},
        **model.backward(shape, adam=adam),
    }
    wanted = {part: each for part, each in wanted.items() if "zeros" not in part}  # torch writes them
    assert_touched(found, wanted.values())


def places() -> int:
    from kernels.tables import by_entry

    return by_entry.PLACES


def test_the_model_knows_how_many_places_a_program_has(interpreted: Run) -> None:
    assert interpreted(places) == Shape.places


def test_the_gigabytes_of_the_specification_and_of_the_docstring() -> None:
    """Section 4.1 counts ids, gates and z as 8 bytes of a copy forward and 16 backward; within 10 % (invariant 21)."""
    shape = traffic.layer(tokens=8192)
    t, a, d, b = 8192, 128, 1024, 2
    forward, backward = traffic.forward(shape), traffic.backward(shape)
    tokens = [backward["products"], backward["sums"]]
    tables = [each for part, each in backward.items() if "," in part]
    assert sum(each.total for each in forward.values()) == pytest.approx(
        t * (2 * a * d * b + 2 * d * b + 8 * a), rel=0.1
    )
    assert sum(each.total for each in tokens) == pytest.approx(t * (2 * a * d * b + 3 * d * b + 16 * a), rel=0.1)
    assert shape.touched / 1024**2 == pytest.approx(0.632, abs=0.001)
    dense = (
        7 * 4 * 2 * shape.entries * shape.d_model
    )  # gradient, weights and moments: read and, but for the first, written
    adam = traffic.backward(replace(shape, table_size=4), adam=True)
    told = [
        sum(each.total for each in forward.values()), sum(each.read + each.written for each in forward.values()),
        2 * shape.copies * 2 * d * b, sum(each.total for each in tokens), sum(each.read + each.written for each in tokens),
        sum(each.total for each in tables), 2 * shape.table_bytes, 2 * shape.touched_bytes,
        sum(each.total for part, each in adam.items() if "," in part), dense,
    ]  # fmt: skip
    assert [f"{each / 1e9:.{1 if each > 2e10 else 2}f}" for each in told] == [
        "4.36", "2.78", "8.59", "4.37", "2.79", "7.36", "4.29", "2.71", "33.0", "60.1",
    ]  # fmt: skip
    assert all(f"{each / 1e9:.{1 if each > 2e10 else 2}f}" in (traffic.__doc__ or "") for each in told)


def test_nothing_is_below_its_bound() -> None:
    for tokens in (512, 8192, 65536):
        shape = traffic.layer(tokens=tokens)
        for model in (traffic, bag_traffic):
            for launches, backward in ((model.forward(shape), False), (model.backward(shape), True)):
                bound = model.backward_bound(shape) if backward else model.forward_bound(shape)
                assert sum(each.read + each.written for each in launches.values()) >= bound
                assert sum(each.total for each in launches.values()) - model.must_move(shape, backward=backward) >= 0


@pytest.mark.parametrize("tokens", [3, 8192])
def test_what_must_move_is_counted_copy_after_copy(tokens: int) -> None:
    """128 copies of a token, 1,024 numbers of 16 bits in a row, ids of 8 bytes, gates, z and ends of 4; a million rows."""
    shape = traffic.layer(tokens=tokens)
    row, copies, dense = 2048, 128 * tokens, 2048 * 1024**2
    # each copy reads a row of each table
    read, ids_and_gates = copies * row, copies * (8 + 4)
    assert bag_traffic.must_move(shape, backward=False) == read + ids_and_gates + tokens * (row + 4)
    assert traffic.must_move(shape, backward=False) == 2 * read + ids_and_gates + tokens * (2 * row + 2 * 4)
    # order, output row and the gates' gradient; for PEER also z and the received row, and the rows' gradient
    of_bag = copies * (4 + 8 + 4)
    assert bag_traffic.must_move(shape, backward=True) == read + ids_and_gates + of_bag + tokens * (row + 4) + dense
    of_peer = of_bag + copies * (4 + 8)
    wanted = 2 * read + ids_and_gates + of_peer + tokens * (3 * row + 2 * 4) + 2 * dense
    assert traffic.must_move(shape, backward=True) == wanted


def saved(inputs: dict[str, Any]) -> int:
    """Without the tables."""
    leaves = {name: inputs[name].requires_grad_() for name in NAMES["experts"]}
    return bytes_saved(lambda: apply("experts", leaves, inputs["routes"]), beside=[leaves["up"], leaves["down"]])


def test_only_rows_gates_routes_and_a_number_per_copy_are_saved(interpreted: Run) -> None:
    inputs = make_inputs(SMALL)
    assert interpreted(saved, inputs) == traffic.saved(shape_of(SMALL, inputs["routes"]))


def in_one_graph(op: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {name: inputs[name] for name in NAMES[op]}
    gradient = inputs["gradient_of_products" if op == "products" else "gradient"]
    return compiled(
        lambda *tensors: apply(op, dict(zip(leaves, tensors, strict=True)), inputs["routes"]), leaves, gradient
    )


@pytest.mark.parametrize("op", NAMES)
def test_compile_sees_one_graph_with_the_same_result(op: str, interpreted: Run) -> None:
    found, wanted = interpreted(in_one_graph, op, make_inputs(SMALL)), by_loop(op, make_inputs(SMALL))
    assert_same(found, {name: 2.0 * tensor for name, tensor in wanted.items()}, tolerance=4e-6)


def checked_by_torch(inputs: dict[str, Any]) -> list[str]:
    from kernels.embedding_bag import op as bag
    from kernels.peer_experts import op as experts
    from kernels.tables.op import adam_op

    routes = inputs["routes"]
    rows, up, down, gates = (inputs[name].requires_grad_() for name in NAMES["experts"])
    index = (routes.entry_C, routes.row_C, routes.output_C, routes.order_C, routes.row_ends_R, routes.output_ends_P)
    in_bag = (routes.entry_C, routes.output_C, routes.order_C, routes.output_ends_P)
    in_products = (routes.entry_C, routes.row_C, routes.order_C, routes.row_ends_R)
    adam = RowAdam.zeros(up, lr=0.1)
    stepped = (
        up.detach().clone(),
        *adam.state,
        rows.detach(),
        routes.row_C,
        gates.detach(),
        routes.entry_C,
        routes.order_C,
    )
    found = [
        torch.library.opcheck(
            experts.forward_op, (rows, up, down, gates, *index, False, [], []), raise_exception=False
        ),
        torch.library.opcheck(experts.partial_op, (rows, up, *in_products, [], []), raise_exception=False),
        torch.library.opcheck(bag.forward_op, (down, gates, *in_bag, torch.float32, [], []), raise_exception=False),
        torch.library.opcheck(adam_op, (*stepped, adam.settings), raise_exception=False),
    ]
    return [str(each) for each in found]


def test_torch_finds_nothing_wrong_with_the_operations(interpreted: Run) -> None:
    for found in interpreted(checked_by_torch, make_inputs(SMALL)):
        assert found.count("'SUCCESS'") == 4, found


def under_autocast(op: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.float16):
        return by_kernel(op, inputs)


@pytest.mark.parametrize("op", ["experts", "bag"])
def test_autocast_rounds_rows_and_results_and_leaves_the_tables(op: str, interpreted: Run) -> None:
    inputs = make_inputs(SMALL)
    found = interpreted(under_autocast, op, inputs)
    assert found["output"].dtype == torch.float16
    assert all(found[name].dtype == torch.float32 for name in NAMES[op])
    assert_same(found, by_loop(op, inputs), tolerance=5e-3)


def asked_for(inputs: dict[str, Any], name: str) -> dict[str, Tensor]:
    leaves = {each: inputs[each].requires_grad_(each == name) for each in NAMES["experts"]}
    output = apply("experts", leaves, inputs["routes"])
    return {name: torch.autograd.grad(output, [leaves[name]], inputs["gradient"])[0]}


@pytest.mark.parametrize("name", NAMES["experts"])
def test_one_gradient_alone_is_the_same(name: str, interpreted: Run) -> None:
    inputs = make_inputs(SMALL)
    assert_same(interpreted(asked_for, inputs, name), {name: by_loop("experts", inputs)[name]})


def last_rows_of_a_large_table() -> dict[str, Tensor]:
    """Entries around number 2**31 / D of a table, of which the system gives memory to the pages that are touched, a few."""
    from kernels.tables.by_entry import add_runs
    from kernels.tables.by_row import products, weighted_sums

    width, places = 1024, [2**21 - 1, 2**21, 2**21 + 1]
    table_LD, out_LD = (torch.empty(2**21 + 2, width, dtype=torch.float16) for _ in range(2))
    held = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).half()
    table_LD[places] = held
    entry_C, index_C, gates_C = torch.tensor(places).int(), torch.tensor([0, 0, 1]), torch.tensor([1.0, 2.0, 3.0])
    ends = torch.tensor([2, 3], dtype=torch.int32)
    add_runs(held[:2], index_C, gates_C, entry_C, torch.arange(3, dtype=torch.int32), out_LD)
    return {
        "sums": weighted_sums(table_LD, gates_C, entry_C, ends, dtype=torch.float32),
        "products": products(held[:2], table_LD, entry_C, ends).products_C,
        "gradient": out_LD[places],
        "held": held,
    }


def test_tables_of_more_than_two_to_the_31_numbers_are_read_and_written_where_they_should_be(interpreted: Run) -> None:
    """Invariant 18: an offset of 32 bits would wrap to an address outside."""
    found = interpreted(last_rows_of_a_large_table)
    held = found.pop("held").double()
    wanted = {
        "sums": torch.stack([held[0] + 2 * held[1], 3 * held[2]]),
        "products": (held[[0, 0, 1]] * held).sum(1),
        "gradient": torch.stack([held[0], 2 * held[0], 3 * held[1]]),
    }
    assert_same(found, wanted, tolerance=1e-3)
