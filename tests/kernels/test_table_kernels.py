"""peer_experts, peer_products and embedding_bag in Triton's interpreter: output and every gradient against loops in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.tables.routes import TableRoutes
from tests.kernels.compare import assert_same
from tests.kernels.tables import CASES, NAMES, Case, by_kernel, by_loop, make_inputs

Run = Callable[..., Any]
OPS = tuple(NAMES)
GRADIENTS = ("gradient", "gradient_of_products")
HARD = Case([9, 0, 5, 12], 12, 10, rows=7, only=[0, 4, 5, 9])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_a_loop(op: str, name: str, interpreted: Run) -> None:
    inputs = make_inputs(CASES[name])
    assert_same(interpreted(by_kernel, op, inputs), by_loop(op, inputs))


def with_relu(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return by_kernel("experts", inputs, activation="relu")


def test_relu_equals_a_loop(interpreted: Run) -> None:
    inputs = make_inputs(HARD)
    inputs["rows"][inputs["routes"].row_C[0]] = 0.0  # z is 0 for its copies, where relu has slope 0
    assert_same(interpreted(with_relu, inputs), by_loop("experts", inputs, activation="relu"))


@pytest.mark.parametrize("places", [1, 3, 26, 128])
def test_however_the_sorted_places_are_shared_out(places: int, interpreted: Run) -> None:
    inputs = make_inputs(HARD)
    assert_same(interpreted(by_kernel, "experts", inputs, places), by_loop("experts", inputs))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("rows", "tables"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
def test_rows_and_tables_may_have_sixteen_bits_and_each_result_is_rounded_once(
    op: str, rows: torch.dtype, tables: torch.dtype, interpreted: Run
) -> None:
    inputs = make_inputs(HARD, rows=rows, tables=tables)
    found, wanted = interpreted(by_kernel, op, inputs), by_loop(op, inputs)
    dtypes = {
        "output": tables if op == "bag" else rows,
        "rows": rows,
        "up": tables,
        "down": tables,
        "gates": torch.float32,
    }
    if op == "products":
        dtypes["output"] = torch.float32
    if op == "bag":  # its output has the dtype of the table, and so has the gradient that it is given
        wanted = by_loop(op, inputs | {"gradient": inputs["gradient"].to(tables)})
    for name, tensor in found.items():
        assert tensor.dtype == dtypes[name], name
        # Triton's interpreter cuts float32 to bf16 and does not round it.
        allowed = {torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}[tensor.dtype]
        worst = ((tensor.double() - wanted[name]).abs() - 1.01 * allowed * wanted[name].abs()).max()
        assert worst < 5e-6, (name, worst)


@pytest.mark.parametrize("op", OPS)
def test_two_runs_are_bit_equal(op: str, interpreted: Run) -> None:
    inputs = make_inputs(HARD)
    first, second = (interpreted(by_kernel, op, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_entries_that_nobody_reads_and_rows_without_copies_are_exact_zeros(interpreted: Run) -> None:
    found = interpreted(by_kernel, "experts", make_inputs(HARD))
    unread = [1, 2, 3, 6, 7, 8]
    assert not found["up"][unread].any()
    assert not found["down"][unread].any()
    assert found["up"][[0, 4, 5, 9]].all()
    assert not found["output"][1].any()


def test_the_parts_of_an_entry_are_added_in_order(interpreted: Run) -> None:
    """1e8 + 1 - 1e8 in float32 is 0, and 1 in any order that adds the 1 last; a program has one place."""
    inputs = make_inputs(Case([4], 2, 1)) | {"gradient": torch.ones(1, 2)}
    inputs["gates"] = torch.tensor([1e8, 1.0, -1e8, 0.0])
    assert not interpreted(by_kernel, "bag", inputs, 1)["down"].any()
    inputs["gates"] = torch.tensor([1e8, -1e8, 0.0, 1.0])
    assert (interpreted(by_kernel, "bag", inputs, 1)["down"] == 1.0).all()


def renamed(routes: TableRoutes, new_L: Tensor) -> TableRoutes:
    """The routes where entry e has become new_L[e]."""
    return TableRoutes.of(
        new_L[routes.entry_C], routes.row_C, routes.output_C, num_rows=routes.num_rows, num_outputs=routes.num_outputs
    )


def test_the_order_of_the_entries_in_the_table_changes_no_bit_of_the_output(interpreted: Run) -> None:
    """Invariant 12: the gradients of the tables move with their rows."""
    inputs = make_inputs(HARD)
    new_L = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    old_L = new_L.argsort()
    moved = inputs | {
        "up": inputs["up"][old_L],
        "down": inputs["down"][old_L],
        "routes": renamed(inputs["routes"], new_L),
    }
    found, other = interpreted(by_kernel, "experts", inputs), interpreted(by_kernel, "experts", moved)
    assert all(torch.equal(found[name], other[name]) for name in ("output", "rows", "gates"))
    assert_same({name: other[name][new_L] for name in ("up", "down")}, {name: found[name] for name in ("up", "down")})


def test_tokens_in_another_order_get_the_same_bits(interpreted: Run) -> None:
    """Invariant 13, for tokens of 5 copies each."""
    inputs = make_inputs(Case([5] * 4, 12, 10))
    order_T = torch.tensor([2, 0, 3, 1])
    entry_C = inputs["routes"].entry_C.view(4, 5)[order_T].flatten()
    routes = TableRoutes.of(entry_C, inputs["routes"].row_C, inputs["routes"].row_C, num_rows=4, num_outputs=4)
    moved = inputs | {name: inputs[name][order_T] for name in ("rows", "gradient")} | {"routes": routes}
    moved["gates"] = inputs["gates"].view(4, 5)[order_T].flatten()
    found, other = interpreted(by_kernel, "experts", inputs), interpreted(by_kernel, "experts", moved)
    assert all(torch.equal(found[name][order_T], other[name]) for name in ("output", "rows"))
    assert_same({name: other[name] for name in ("up", "down")}, {name: found[name] for name in ("up", "down")})


def test_identical_tokens_that_all_choose_one_expert(interpreted: Run) -> None:
    """Invariants 4 and 14: what several heads choose counts as often; here 3 tokens with 2 copies each of expert 1."""
    inputs = make_inputs(Case([2, 2, 2], 7, 4, only=[1])) | {"gates": torch.ones(6)}
    inputs["rows"] = inputs["rows"][:1].expand(3, 7).contiguous()
    output_D = 2.0 * F.gelu(inputs["rows"][0] @ inputs["up"][1]) * inputs["down"][1]
    found = interpreted(by_kernel, "experts", inputs)
    assert_same({"output": found["output"]}, {"output": output_D.expand(3, 7)})
    assert_same(found, by_loop("experts", inputs))


def sharded(inputs: dict[str, Any], num_owners: int, num_slices: int) -> dict[str, Tensor]:
    """The ranks of invariant 15 one after the other: entries by owner, columns in slices; z is summed over slices, outputs over owners."""
    from tests.kernels.tables import apply

    leaves = {name: inputs[name].detach().requires_grad_() for name in NAMES["experts"]}
    routes: TableRoutes = inputs["routes"]
    output_PD = torch.zeros_like(inputs["gradient"])
    for owner in range(num_owners):
        held = torch.arange(owner, len(leaves["up"]), num_owners)
        copies = (routes.entry_C % num_owners == owner).nonzero()[:, 0]
        gates_C = leaves["gates"][copies]
        row_C, output_C = routes.row_C[copies], routes.output_C[copies]
        there = TableRoutes.of(
            routes.entry_C[copies] // num_owners,
            row_C,
            output_C,
            num_rows=routes.num_rows,
            num_outputs=routes.num_outputs,
        )
        tables = {name: leaves[name][held] for name in ("up", "down")}
        if num_slices == 1:
            output_PD = output_PD + apply("experts", {"rows": leaves["rows"], **tables, "gates": gates_C}, there)
            continue
        rows, ups, downs = (each.chunk(num_slices, 1) for each in (leaves["rows"], tables["up"], tables["down"]))
        z_C = torch.stack([apply("products", {"rows": x, "up": u}, there) for x, u in zip(rows, ups, strict=True)]).sum(
            0
        )
        weights_C = gates_C * F.gelu(z_C)
        output_PD = output_PD + torch.cat([apply("bag", {"down": v, "gates": weights_C}, there) for v in downs], 1)
    found = torch.autograd.grad(output_PD, list(leaves.values()), inputs["gradient"])
    return {"output": output_PD.detach(), **dict(zip(leaves, found, strict=True))}


@pytest.mark.parametrize(
    ("owners", "slices"), [(4, 1), (1, 4), (2, 2), (10, 1)], ids=["R", "D", "2-D", "R_empty_ranks"]
)
def test_tables_that_are_split_by_rows_by_columns_or_both_give_the_same(
    owners: int, slices: int, interpreted: Run
) -> None:
    """Invariants 15 and 18: 4 of 10 entries are read, so that of 10 owners most have no copies."""
    inputs = make_inputs(HARD)
    assert_same(interpreted(sharded, inputs, owners, slices), by_loop("experts", inputs))


def with_other_strides(op: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    strided = {name: inputs[name].mT.contiguous().mT for name in ("rows", "up", "down")}
    routes = inputs["routes"]
    entry_C = routes.entry_C.int().repeat_interleave(2)[::2]
    gates = inputs["gates"].repeat_interleave(2)[::2]
    routes = replace(routes, entry_C=entry_C)
    gradients = {name: inputs[name].flatten()[:1].expand(inputs[name].shape) for name in GRADIENTS}
    return by_kernel(op, inputs | strided | gradients | {"gates": gates, "routes": routes})


@pytest.mark.parametrize("op", OPS)
def test_strides_and_the_width_of_the_entries_do_not_matter(op: str, interpreted: Run) -> None:
    """A gradient of stride 0 is what the sum of an output gives back."""
    inputs = make_inputs(HARD)
    found = interpreted(with_other_strides, op, inputs)
    for name in GRADIENTS:
        inputs[name] = torch.full_like(inputs[name], float(inputs[name].flatten()[0]))
    wanted = interpreted(by_kernel, op, inputs)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_nan_stays_with_its_row_its_output_and_its_entries(interpreted: Run) -> None:
    inputs = make_inputs(Case([2, 2, 2], 8, 6))
    routes = TableRoutes.of(torch.arange(6), *[inputs["routes"].row_C] * 2, num_rows=3, num_outputs=3)
    rows = inputs["rows"].clone()
    rows[1] = float("nan")
    inputs |= {"routes": routes, "rows": rows}
    found = interpreted(by_kernel, "experts", inputs)
    for name in ("output", "rows"):
        assert found[name].isnan().any(1).tolist() == [False, True, False], name
    for name in ("up", "down"):
        assert found[name].isnan().any(1).tolist() == [False, False, True, True, False, False], name


def test_no_tile_is_timed_twice(interpreted: Run) -> None:
    for width in (1, 16, 100, 128, 256, 1024):
        for copies in (1, 4, 16, 128, 300):
            tiles = interpreted(tiles_of, width, copies)
            assert len(set(tiles)) == len(tiles) > 0


def tiles_of(width: int, copies: int) -> list[tuple[int, int, int]]:
    from kernels.tables.by_row import products_tiles

    tiles = products_tiles(torch.empty(1, width, dtype=torch.bfloat16), copies)
    return [(each.copies, each.columns, each.warps) for each in tiles]


def keys_of_tables(sizes: list[int]) -> list[list[str]]:
    """What the tiles of both passes are kept by, for tables of so many rows; from 8 rows on a table is large."""
    from kernels.tables import by_row

    found: list[list[str]] = []

    def first(tiles: list[Any], launch: Any, *, key: Any, device: torch.device) -> Any:
        found[-1].append(str(key))
        return tiles[0]

    entry_C, ends_R, weights_C = torch.zeros(3, dtype=torch.int64), torch.tensor([3], dtype=torch.int32), torch.ones(3)
    with patch.object(by_row, "fastest", first), patch.object(by_row, "LARGE_TABLE", 8):
        for size in sizes:
            found.append([])
            by_row.weighted_sums(torch.ones(size, 4), weights_C, entry_C, ends_R, dtype=torch.float32)
            by_row.products(torch.ones(1, 4), torch.ones(size, 4), entry_C, ends_R)
    return found


def test_a_large_table_takes_the_tiles_that_were_measured_on_a_smaller_one(interpreted: Run) -> None:
    """model/part_choice.py measures no larger one."""
    small, large, larger = interpreted(keys_of_tables, [7, 8, 1000])
    assert len(large) == 2
    assert small != large == larger
