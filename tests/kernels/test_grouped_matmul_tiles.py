"""grouped_matmul's tiles: their order, the programs that walk over them, and how wide the compiled code loads."""

# pyright: reportArgumentType=false, reportCallIssue=false
# A launch passes numbers where a kernel declares tl.constexpr.

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import accumulate
from math import ceil
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from kernels.grouped_matmul import schedule
from kernels.grouped_matmul.tiles import count_tiles, tile_of
from tests.kernels.compare import assert_same
from tests.kernels.routes import Case, compute_in_small_tiles, inputs_of, loop

Interpreted = Callable[..., Any]
Tile = tuple[int, int, int]  # group, first copy, end of the group


def tiles_in_order(sizes: tuple[int, ...], block: int, bits: int) -> list[Tile]:
    """All tiles, by the step of 1 / 2**bits in which the middle of the tile lies on its group's way through the rows."""
    ends, found = list(accumulate(sizes)), []
    for group, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        count = ceil(Fraction(size, block))
        for j in range(count):
            step = ceil(Fraction(2 * j + 1, 2 * count) * 2**bits) - 1
            found.append((step, group, j, (group, end - size + j * block, end)))
    return [tile for *_, tile in sorted(found)]


@triton.jit
def write_tiles(offsets_ptr, out_ptr, G, bits, more, BLOCK: tl.constexpr, G_POWER: tl.constexpr):
    count = count_tiles(offsets_ptr, G, BLOCK, G_POWER)
    tl.store(out_ptr, count)
    for number in range(count + more):
        group, first, end = tile_of(tl.full([], 0, tl.int32) + number, offsets_ptr, G, BLOCK, G_POWER, bits)
        tl.store(out_ptr + 1 + 3 * number, group)
        tl.store(out_ptr + 2 + 3 * number, first)
        tl.store(out_ptr + 3 + 3 * number, end)


def tiles_of_the_kernel(sizes: tuple[int, ...], block: int, bits: int, more: int = 0) -> list[Tile]:
    """What tile_of says for one number after the other, and for `more` beyond what count_tiles counts."""
    offsets_G = torch.tensor(sizes).cumsum(0, dtype=torch.int32)
    out = torch.full((1 + 3 * (sum(sizes) + more),), -1, dtype=torch.int32)
    write_tiles[(1,)](offsets_G, out, len(sizes), bits, more, block, triton.next_power_of_2(len(sizes)))
    numbers = out[1 : 1 + 3 * (int(out[0]) + more)].reshape(-1, 3)
    return [(group, first, end) for group, first, end in numbers.tolist()]


@given(
    sizes=st.lists(st.integers(0, 40) | st.just(0), min_size=1, max_size=6).map(tuple),
    block=st.sampled_from([1, 4, 16]),
    bits=st.integers(0, 4),
)
def test_tiles_come_by_their_place_in_the_rows_and_each_once(
    interpreted: Interpreted, sizes: tuple[int, ...], block: int, bits: int
) -> None:
    sizes = tuple(
        size if block > 1 else size // 8 for size in sizes
    )  # fewer tiles: the interpreter takes 1 ms for each
    assert interpreted(tiles_of_the_kernel, sizes, block, bits) == tiles_in_order(sizes, block, bits)


def test_equal_groups_advance_together_and_without_bits_one_follows_the_other(interpreted: Interpreted) -> None:
    together, apart = (interpreted(tiles_of_the_kernel, (24, 24, 24), 8, bits) for bits in (2, 0))
    assert together == [(g, 24 * g + 8 * j, 24 * g + 24) for j in range(3) for g in range(3)]
    assert apart == [(g, 24 * g + 8 * j, 24 * g + 24) for g in range(3) for j in range(3)]


def test_a_group_that_few_chose_does_not_run_ahead(interpreted: Interpreted) -> None:
    """Of 8 and 2 tiles the two stand a quarter and three quarters of the way through, not before the others."""
    groups = [group for group, _, _ in interpreted(tiles_of_the_kernel, (64, 16), 8, 3)]
    assert groups == [0, 0, 1, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("bits", [0, 3])
def test_beyond_the_last_tile_there_are_no_copies(interpreted: Interpreted, bits: int) -> None:
    found = interpreted(tiles_of_the_kernel, (7, 0, 9), 4, bits, 5)
    assert [first < end for _, first, end in found] == [True] * 5 + [False] * 5


def test_groups_advance_together_while_their_weights_fit_in_half_of_the_cache() -> None:
    def bits(weight_bytes: int, copies: int = 131072) -> int:
        return schedule.order_bits(
            copies=copies, groups=32, block=128, weight_bytes=weight_bytes, device=torch.device("cpu")
        )

    assert bits(25 << 20) == 5, "131,072 / (128 * 32) = 32 tiles of a group"
    assert bits((25 << 20) + 1) == 0
    assert bits(1, copies=100) == bits(1, copies=0) == 0


def test_a_gpu_is_asked_for_its_cache_and_its_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 multiprocessors, each with 16 warps of 128 registers and 227 KiB for its programs."""
    gpu = torch.device("cuda")
    properties = SimpleNamespace(L2_cache_size=1000, multi_processor_count=10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    sizes: dict[str, Any] = {"copies": 4096, "groups": 4, "block": 128, "device": gpu}
    assert [schedule.order_bits(weight_bytes=each, **sizes) for each in (500, 501)] == [3, 0]

    def programs(most: int = 1000, warps: int = 4, shared: int = 1024, wide: bool = False) -> int:
        return schedule.num_programs(most, warps=warps, shared=shared, wide=wide, device=gpu)

    assert [programs(), programs(wide=True), programs(warps=8), programs(most=7)] == [40, 20, 20, 7]
    assert [programs(shared=kib << 10) for kib in (75, 76, 113, 114, 228)] == [30, 20, 20, 10, 10]


@contextmanager
def grids() -> Iterator[list[tuple[str, int]]]:
    """Inside, every launch adds its kernel and its number of programs."""
    from triton.runtime.interpreter import GridExecutor

    found: list[tuple[str, int]] = []
    call = GridExecutor.__call__

    def launch(self, *args, **kwargs):
        found.append((self.fn.__name__, torch.Size(self.grid).numel()))
        return call(self, *args, **kwargs)

    with patch.object(GridExecutor, "__call__", launch):
        yield found


def launch_with(case: Case, inputs: dict[str, Any], most: int) -> tuple[list[tuple[str, int]], dict[str, Any]]:
    """A forward and a backward pass in tiles of 16 x 16 on a device that holds so many programs."""
    with patch.object(schedule, "WITHOUT_DEVICE", most), grids() as found:
        return found, compute_in_small_tiles(case, inputs, "triton")


@pytest.mark.parametrize("most", [1, 3, 100])
def test_a_launch_has_no_more_programs_than_a_device_holds_and_each_walks_over_its_tiles(
    interpreted: Interpreted, most: int
) -> None:
    """Forward 3 tiles of rows by 3 of columns, backward 3 by 2; 2 groups, of which each may have one tile more."""
    case = Case((30, 0, 7), 20, 40, num_rows=9, num_outputs=7, gate_side="after")
    inputs = inputs_of(case)
    found, values = interpreted(launch_with, case, inputs, most)
    assert [programs for name, programs in found if name == "multiply"] == [min(most, 3 * 6), min(most, 2 * 6)]
    assert_same(values, loop(case, inputs))


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("columns", [(32, 16), (16, 32)], ids=str)
def test_the_gates_gradient_is_the_sum_over_the_column_tiles_that_were_written(
    interpreted: Interpreted, columns: tuple[int, ...], activation: str
) -> None:
    """There is memory for as many as the narrowest tiles make, NaN where nothing is written: widths of 40 are 3 of them, or 2."""
    case = Case((11, 0, 13), 40, 40, num_rows=9, num_outputs=7, gate_side="after", activation=activation)
    inputs = inputs_of(case)
    assert_same(interpreted(compute_in_small_tiles, case, inputs, "triton", columns), loop(case, inputs))


def order_of_a_launch(weights_fit: bool) -> list[int]:
    """The group of each tile, in the order in which one program stores them: the first copy of a tile names its group."""
    from triton.runtime.interpreter import InterpreterBuilder

    from kernels.grouped_matmul import kernel

    rows = kernel.Rows(torch.ones(32, 16), torch.arange(32).repeat(2))
    offsets_G, stored = torch.tensor([32, 64], dtype=torch.int32), []
    store = InterpreterBuilder.create_masked_store

    def recorded(self, ptrs, value, mask, *rest):
        stored.append(ptrs.data.min())
        return store(self, ptrs, value, mask, *rest)

    with (
        patch.object(schedule, "WITHOUT_DEVICE", 1),
        patch.object(schedule, "L2_BYTES", 2 * 2 * 16 * 16 * 4 - 2 * (not weights_fit)),
        patch.object(InterpreterBuilder, "create_masked_store", recorded),
    ):
        kernel.launch_multiply(
            rows,
            torch.ones(2, 16, 16),
            offsets_G,
            None,
            tiles=kernel.Tiles(rows=8, columns=16, depth=16, warps=4, stages=2),
        )
    return [int(address - min(stored)) // (32 * 16 * 4) for address in stored]


def test_a_launch_takes_the_order_by_the_bytes_of_its_weights(interpreted: Interpreted) -> None:
    assert interpreted(order_of_a_launch, True) == [0, 1] * 4
    assert interpreted(order_of_a_launch, False) == [0] * 4 + [1] * 4


def widths_in_the_code(target: str) -> dict[str, tuple[set[int], set[int]]]:
    """Of each kernel at D 412 in bf16: bytes of its asynchronous copies, bits of its plain loads and stores of 16-bit numbers."""
    from kernels.grouped_matmul.forms import launch_forward
    from kernels.grouped_matmul.kernel import Rows, launch_weight_gradient
    from kernels.sum_copies.kernel import add
    from kernels.tools import TARGETS, launches_compiled

    rows = Rows(torch.empty(64, 412, dtype=torch.bfloat16), torch.empty(64, dtype=torch.int64))
    ends = torch.empty(16, dtype=torch.int32)
    with launches_compiled(TARGETS[target]) as kernels:
        launch_forward(torch.bfloat16, width=412)
        launch_weight_gradient(rows, Rows(torch.empty(64, 128, dtype=torch.bfloat16), None), ends, None)
        add(rows.values, torch.empty(64, dtype=torch.int32), ends)
    found = {}
    for kernel in kernels:
        copies = re.findall(r"cp\.async\.c[ag][^;]*?\], 0x([0-9a-f]+)", kernel.asm["ptx"])
        plain = re.findall(r"(?:ld|st)\.global\S*\.b16\b", kernel.asm["ptx"])
        found[kernel.name] = ({int(size, 16) for size in copies}, plain)
    return found


def test_rows_of_412_numbers_are_loaded_8_bytes_at_a_time_and_not_2() -> None:
    assert widths_in_the_code("sm_90") == {
        "multiply": ({8, 16}, []),
        "weight_gradient": ({8, 16}, []),
        "sum_kernel": (set(), []),
    }


def test_programs_fit_on_a_multiprocessor_as_the_table_of_registers_says() -> None:
    """On sm_90, every form of multiply, by the registers and the shared memory that its tile was compiled to."""
    from benchmarks.kernels.compile_table import README, read_table
    from kernels.grouped_matmul.kernel import TILES, TILES_FP32

    tiles = {"bf16": TILES, "fp16": TILES, "fp32": TILES_FP32}
    for place, cell in read_table(README.read_text()).items():
        if (place.op, place.target) != ("grouped_matmul", "sm_90") or not place.kernel.startswith("multiply"):
            continue
        dtype, kind = place.form.split(" ", 1)
        shapes = {f"forward {each.rows} x {each.columns}": each for each in tiles[dtype]}
        tile = shapes.get(kind, tiles[dtype][0])
        shared = (tile.rows + tile.columns) * tile.depth * tile.stages * (4 if dtype == "fp32" else 2)
        wide = "backward" in kind and dtype != "fp32"
        programs = schedule.resident(warps=tile.warps, shared=shared, wide=wide)
        assert programs * tile.warps * 32 * cell.registers <= 65536, (place, programs)
        assert programs * cell.shared <= 227 << 10, (place, programs)
