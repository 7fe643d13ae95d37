"""The gradient of the weights: in one part or several, by how many programs, added in which order."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from kernels.grouped_matmul import schedule
from kernels.grouped_matmul.schedule import part_length
from tests.kernels.routes import indices, normal
from tests.kernels.test_grouped_matmul_tiles import grids

Interpreted = Callable[..., Any]


def test_copies_are_cut_where_groups_and_tiles_do_not_fill_a_gpu() -> None:
    """264 programs for an H100; 47M: 65,536 copies in 16 groups, 4 tiles each; 262M: 32 groups of 8 tiles fill it."""
    assert part_length(copies=65536, groups=16, tiles=4, block=64) == 20 * 64, (
        "a quarter of 4,096, and a quarter of that more"
    )
    assert part_length(copies=131072, groups=32, tiles=8, block=64) is None
    assert part_length(copies=16 * 1023, groups=16, tiles=4, block=64) is None, "parts of fewer than 512 copies"
    assert part_length(copies=16 * 1024, groups=16, tiles=4, block=64) == 10 * 64
    assert part_length(copies=1 << 20, groups=1, tiles=1, block=64) == 78 * 64, "264 parts of 3,972, and a quarter more"


def gradient_in_parts(
    sizes: tuple[int, ...], rows: Tensor, row_index: Tensor | None, gradient: Tensor, gates: Tensor | None, fill: int
) -> tuple[list[tuple[str, int]], Tensor]:
    """With tiles of 16 x 16, steps of 16 copies, parts of at least 16, and `fill` programs that fill the device."""
    from kernels.grouped_matmul.kernel import Rows, Tiles, launch_weight_gradient

    torch.use_deterministic_algorithms(True)  # torch.empty then holds NaN
    offsets_G = torch.tensor(list(accumulate(sizes)), dtype=torch.int32)
    with (
        patch.object(schedule, "SHORTEST_PART", 16),
        patch.object(schedule, "PROGRAMS_OF_A_GPU", fill),
        grids() as found,
    ):
        out = launch_weight_gradient(
            Rows(rows, row_index), Rows(gradient, None), offsets_G, gates, tiles=Tiles(16, 16, 16, 4, 2)
        )
    return found, out


# sizes, programs that fill the device, programs of the product in 2 tiles of 16 x 16, whether in parts (of 32 copies)
CASES = {
    "one_part": ((40, 30), 4, 2 * 2, False),
    "two_parts_each": ((40, 30), 8, (3 + 2) * 2, True),
    "uneven": ((1, 140, 0, 17), 16, (5 + 4) * 2, True),
    "one_huge_and_15_empty": ((0,) * 7 + (520,) + (0,) * 8, 64, (17 + 16) * 2, True),
}


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_sum_over_the_copies_however_they_are_cut(
    interpreted: Interpreted, name: str, gated: bool
) -> None:
    sizes, fill, programs, in_parts = CASES[name]
    C = sum(sizes)
    rows, gradient, index = normal(9, 20, seed=1), normal(C, 12, seed=2), indices(C, 9, seed=3)
    gates = normal(C, seed=4) if gated else None
    found, out = interpreted(gradient_in_parts, sizes, rows, index, gradient, gates, fill)
    assert found == [("weight_gradient", programs), *([("sum_parts", len(sizes))] if in_parts else [])]
    right = gradient.double() if gates is None else gradient.double() * gates.double()[:, None]
    copies = rows.double()[index]
    for group, (size, end) in enumerate(zip(sizes, accumulate(sizes), strict=True)):
        wanted = sum((copies[c, :, None] * right[c] for c in range(end - size, end)), torch.zeros(20, 12).double())
        torch.testing.assert_close(out[group].double(), wanted, rtol=1e-4, atol=1e-4)
        assert size or torch.equal(out[group], torch.zeros(20, 12))


@pytest.mark.parametrize(("values", "wanted"), [((1e8, -1e8, 1.0), 1.0), ((1e8, 1.0, -1e8), 0.0)])
def test_parts_are_added_in_ascending_order(interpreted: Interpreted, values: tuple[float, ...], wanted: float) -> None:
    """In float32 1e8 + 1 is 1e8. Parts of 32 copies; the first copy of each part is not zero."""
    rows, gradient = torch.zeros(76, 1), torch.ones(76, 1)
    rows[[0, 32, 64], 0] = torch.tensor(values)
    found, out = interpreted(gradient_in_parts, (76,), rows, None, gradient, None, 3)
    assert [name for name, _ in found] == ["weight_gradient", "sum_parts"]
    assert out.item() == wanted


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 8.0), (torch.float16, 1.0)], ids=str)
def test_the_parts_of_a_half_precision_gradient_are_rounded_once(
    interpreted: Interpreted, dtype: torch.dtype, step: float
) -> None:
    """2,048 + step is 2,048: a first part rounded before the second is added would lose its step."""
    rows, gradient = torch.zeros(76, 1, dtype=dtype), torch.ones(76, 1, dtype=dtype)
    rows[[0, 1, 32], 0] = torch.tensor([2048.0, step, step], dtype=dtype)
    _, out = interpreted(gradient_in_parts, (76,), rows, None, gradient, None, 3)
    assert out.dtype == dtype
    assert out.item() == 2048.0 + 2 * step
