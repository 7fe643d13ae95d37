"""The byte models, against bytes counted in Triton's interpreter; and no element is written by two programs."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch

from kernels.grouped_matmul import schedule, traffic
from kernels.grouped_matmul.traffic import Shape
from kernels.sort_routes import sort_routes
from kernels.sort_routes import traffic as sort_traffic
from tests.kernels.memory import launches_of, recorded_launches

Interpreted = Callable[..., Any]


def small(
    sizes: tuple[int, ...], rows: int, outputs: int, width_in: int, width_out: int, *, tile: tuple[int, int]
) -> Shape:
    """In fp32, the weights' gradient in the same tiles, 16 copies a step."""
    return Shape(
        sizes=sizes, rows=rows, outputs=outputs, width_in=width_in, width_out=width_out, itemsize=4, tile=tile,
        weight_tile=(*tile, 16),
    )  # fmt: skip


SHAPES = {
    "odd": small((7, 1, 13, 0, 17), 9, 5, 13, 20, tile=(16, 16)),
    "wide": small((70, 2), 24, 36, 40, 33, tile=(32, 16)),
    "one_has_all": small((0, 33, 0), 33, 3, 16, 130, tile=(64, 64)),
    "in_parts": small((70, 2, 61), 24, 36, 40, 33, tile=(64, 64)),
}


def count(name: str) -> tuple[list[Any], list[Any]]:
    """The launches of a forward and a backward pass in which every row and output row has a copy, and the models of them."""
    shape = SHAPES[name]
    from kernels.grouped_matmul import kernel, op, weight_gradient
    from kernels.sum_copies import RowCopies

    copies = torch.arange(shape.copies)
    offsets_G = torch.tensor(shape.sizes).cumsum(0, dtype=torch.int32)
    given = (torch.ones(shape.rows, shape.width_in), torch.ones(len(shape.sizes), shape.width_in, shape.width_out))
    row_index, output_index = copies % shape.rows, copies.flip(0) % shape.outputs
    given = (*given, torch.ones(shape.copies), offsets_G, row_index, output_index)
    outputs, rows = (RowCopies.of(output_index, num_rows=shape.outputs), RowCopies.of(row_index, num_rows=shape.rows))
    fill, shortest = (16, 16) if name == "in_parts" else (264, 512)
    with (
        patch.object(kernel, "tiles_for", lambda dtype: (kernel.Tiles(*shape.tile, 16, 4, 2),)),
        patch.object(weight_gradient, "weight_tiles_for", lambda dtype: (kernel.Tiles(*shape.weight_tile, 4, 2),)),
        patch.multiple(schedule, PROGRAMS_OF_A_GPU=fill, SHORTEST_PART=shortest),
        recorded_launches() as launches,
    ):
        op.forward(*given, outputs.order_C, outputs.ends_P, rows.order_C, rows.ends_P, False, False)
        gradient = torch.ones(shape.outputs, shape.width_out)
        op.backward(gradient, *given, rows.order_C, rows.ends_P, False, False, True, True, True)
        models = [*traffic.forward(shape).items(), *traffic.backward(shape).items()]
    return launches, models


@pytest.mark.parametrize("name", SHAPES)
def test_the_model_of_grouped_matmul_counts_every_byte(interpreted: Interpreted, name: str) -> None:
    found, wanted = interpreted(count, name)
    assert len(found) == len(wanted)
    for launch, (label, model) in zip(found, wanted, strict=True):
        assert (launch.asked, launch.read, launch.written) == (model.asked, model.read, model.written), label


def test_the_shape_in_parts_has_parts(interpreted: Interpreted) -> None:
    assert [label for label, _ in interpreted(count, "in_parts")[1]][-2:] == ["weight gradient", "sum of parts"]
    assert not any("parts" in label for label, _ in interpreted(count, "wide")[1])


@pytest.mark.parametrize("name", SHAPES)
def test_no_element_is_written_twice_in_a_launch_of_grouped_matmul(interpreted: Interpreted, name: str) -> None:
    for launch in interpreted(count, name)[0]:
        assert launch.asked_to_write == launch.written, launch.kernel


def count_sort(num_ids: int, num_groups: int) -> list[Any]:
    ids = torch.arange(num_ids) % num_groups
    return launches_of(sort_routes, ids, num_groups=num_groups, backend="triton")


@pytest.mark.parametrize(("num_ids", "num_groups"), [(300, 5), (128, 70), (1, 1)])
def test_the_model_of_sort_routes_counts_every_byte_and_none_is_written_twice(
    interpreted: Interpreted, num_ids: int, num_groups: int
) -> None:
    found = interpreted(count_sort, num_ids, num_groups)
    model = sort_traffic.launches(ids=num_ids, groups=num_groups)
    wanted = [(each.asked, each.read, each.written) for each in model.values()]
    assert [(launch.asked, launch.read, launch.written) for launch in found] == wanted
    assert all(launch.asked_to_write == launch.written for launch in found)


def test_nothing_is_below_the_bound_and_the_bound_is_what_a_fused_kernel_would_move() -> None:
    shape = Shape(sizes=(256,) * 64, rows=4096, outputs=4096, width_in=512, width_out=128)
    assert sum(each.read + each.written for each in traffic.forward(shape).values()) > traffic.forward_bound(shape)
    assert sum(each.read + each.written for each in traffic.backward(shape).values()) > traffic.backward_bound(shape)
    # 4,096 tokens x (512 + 128) x 2 bytes, 64 matrices of 512 x 128 x 2, 16,384 copies x 20
    assert traffic.forward_bound(shape) == 5_242_880 + 8_388_608 + 327_680
