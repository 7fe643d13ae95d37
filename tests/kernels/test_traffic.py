"""The byte models, against bytes counted in Triton's interpreter; and no element is written by two programs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.grouped_matmul import traffic
from kernels.grouped_matmul.traffic import Shape
from kernels.sort_routes import sort_routes
from kernels.sort_routes import traffic as sort_traffic

Interpreted = Callable[..., Any]
SHAPES = {
    "odd": Shape(sizes=(7, 1, 13, 0, 17), rows=9, outputs=5, width_in=13, width_out=20, itemsize=4, tile=(16, 16)),
    "wide": Shape(sizes=(70, 2), rows=24, outputs=36, width_in=40, width_out=33, itemsize=4, tile=(32, 16)),
    "one_has_all": Shape(sizes=(0, 33, 0), rows=33, outputs=3, width_in=16, width_out=130, itemsize=4, tile=(64, 64)),
}


def count(shape: Shape) -> list[Any]:
    """The launches of a forward and a backward pass in which every row and output row has a copy."""
    import kernels.grouped_matmul.kernel as kernel
    from tests.kernels.memory import recorded_launches

    before = kernel.tiles_for
    kernel.tiles_for = lambda dtype: (kernel.Tiles(*shape.tile, 16, 4, 2),)
    copies = torch.arange(shape.copies)
    offsets_G = torch.tensor(shape.sizes).cumsum(0, dtype=torch.int32)
    given = (torch.ones(shape.rows, shape.width_in), torch.ones(len(shape.sizes), shape.width_in, shape.width_out))
    routes = (torch.ones(shape.copies), offsets_G, copies % shape.rows, copies.flip(0) % shape.outputs)
    try:
        with recorded_launches() as launches:
            kernel.forward(*given, *routes, shape.outputs, False, False)
            gradient = torch.ones(shape.outputs, shape.width_out)
            kernel.backward(gradient, *given, *routes, False, False, True, True, True)
    finally:
        kernel.tiles_for = before
    return launches


@pytest.mark.parametrize("name", SHAPES)
def test_the_model_of_grouped_matmul_counts_every_byte(interpreted: Interpreted, name: str) -> None:
    found = interpreted(count, SHAPES[name])
    wanted = [*traffic.forward(SHAPES[name]).items(), *traffic.backward(SHAPES[name]).items()]
    assert len(found) == len(wanted)
    for launch, (label, model) in zip(found, wanted, strict=True):
        assert (launch.asked, launch.read, launch.written) == (model.asked, model.read, model.written), label


@pytest.mark.parametrize("name", SHAPES)
def test_no_element_is_written_twice_in_a_launch_of_grouped_matmul(interpreted: Interpreted, name: str) -> None:
    for launch in interpreted(count, SHAPES[name]):
        assert launch.asked_to_write == launch.written, launch.kernel


def count_sort(num_ids: int, num_groups: int) -> list[Any]:
    from tests.kernels.memory import recorded_launches

    with recorded_launches() as launches:
        sort_routes(torch.arange(num_ids) % num_groups, num_groups=num_groups, backend="triton")
    return launches


@pytest.mark.parametrize(("num_ids", "num_groups"), [(300, 5), (128, 70), (1, 1)])
def test_the_model_of_sort_routes_counts_every_byte_and_none_is_written_twice(
    interpreted: Interpreted, num_ids: int, num_groups: int
) -> None:
    found = interpreted(count_sort, num_ids, num_groups)
    model = sort_traffic.launches(ids=num_ids, groups=num_groups)
    assert [(launch.asked, launch.read, launch.written) for launch in found] == list(model.values())
    assert all(launch.asked_to_write == launch.written for launch in found)


def test_nothing_is_below_the_bound_and_the_bound_is_what_a_fused_kernel_would_move() -> None:
    shape = Shape(sizes=(256,) * 64, rows=4096, outputs=4096, width_in=512, width_out=128)
    assert sum(each.read + each.written for each in traffic.forward(shape).values()) > traffic.forward_bound(shape)
    assert sum(each.read + each.written for each in traffic.backward(shape).values()) > traffic.backward_bound(shape)
    # 4,096 tokens x (512 + 128) x 2 bytes, 64 matrices of 512 x 128 x 2, 16,384 copies x 20
    assert traffic.forward_bound(shape) == 5_242_880 + 8_388_608 + 327_680
