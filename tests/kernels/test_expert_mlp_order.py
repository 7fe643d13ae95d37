"""The order in which expert_mlp goes through its tiles, and the rows that it therefore reads from memory."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.expert_mlp import traffic
from kernels.grouped_matmul import schedule
from tests.kernels.test_expert_mlp import Case, by_kernel, make_inputs
from tests.kernels.test_grouped_matmul_tiles import Tile, tiles_in_order

Run = Callable[..., Any]


def rows_from_memory(tiles: list[Tile], row_C: list[int], *, kept: int) -> int:
    """Rows that miss a cache of the `kept` last used rows and results, where a tile reads its copies' rows and writes their results."""
    cache: OrderedDict[int, None] = OrderedDict()
    missed = 0
    for _, first, end in tiles:
        for copy in range(first, min(first + 128, end)):
            missed += row_C[copy] not in cache
            for each in (row_C[copy], -copy - 1):
                cache[each] = None
                cache.move_to_end(each)
            while len(cache) > kept:
                cache.popitem(last=False)
    return missed


@pytest.mark.parametrize(
    ("zipf", "told"), [(0.0, {"place": 67, "group": 220}), (1.0, {"place": 67, "tile": 217, "group": 244})]
)
def test_the_megabytes_of_rows_that_each_order_of_tiles_reads_from_memory(zipf: float, told: dict[str, int]) -> None:
    """The 262M shape, 4 of 32 experts by Gumbel's trick; an L2 of 50 MiB without the 16 MiB of weights, in rows of 2 KiB."""
    random = np.random.default_rng(0)
    expert_TK = np.argsort(random.gumbel(size=(32768, 32)) - zipf * np.log(np.arange(1, 33)), axis=1)[:, -4:]
    row_C = (np.argsort(expert_TK.reshape(-1), kind="stable") // 4).tolist()
    sizes = tuple(np.bincount(expert_TK.reshape(-1), minlength=32).tolist())
    by_place, by_group = (tiles_in_order(sizes, 128, bits) for bits in (5, 0))
    starts = {group: end - sizes[group] for group, _, end in by_group}
    by_tile = sorted(by_group, key=lambda tile: (tile[1] - starts[tile[0]], tile[0]))
    orders = {"place": by_place, "tile": by_tile, "group": by_group}
    for name, megabytes in told.items():
        found = rows_from_memory(orders[name], row_C, kept=((50 - 16) << 20) // 2048)
        assert abs(found * 2048 / 1e6 - megabytes) < 1, name
        assert str(megabytes) in (traffic.__doc__ or "")


def order_of_a_launch(inputs: dict[str, Any], cache: int) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Forward and backward: the first of the results that each tile writes, as its place among the copies."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    stores: list[list[int]] = []
    call, store = GridExecutor.__call__, InterpreterBuilder.create_masked_store

    def launch(self, *args, **kwargs):
        written: list[int] = []
        if self.fn.__name__ in ("_forward_kernel", "_backward_kernel"):
            stores.append(written)

        def recorded(self, ptrs, value, mask, *rest):
            if mask.data.any() and ptrs.data.ndim == 2:
                written.append(int(ptrs.data.min()))
            return store(self, ptrs, value, mask, *rest)

        with patch.object(InterpreterBuilder, "create_masked_store", recorded):
            return call(self, *args, **kwargs)

    with patch.object(schedule, "L2_BYTES", cache), patch.object(GridExecutor, "__call__", launch):
        found = by_kernel(inputs)
    return stores, found


@pytest.mark.parametrize(("cache", "tiles"), [(4 * 16 * 16 * 4 * 2, [0, 4, 1, 2, 5, 3]), (0, [0, 1, 2, 3, 4, 5])])
def test_groups_advance_together_while_their_weights_fit_in_the_cache(
    cache: int, tiles: list[int], interpreted: Run
) -> None:
    """4 and 2 tiles of 32 copies, in 4 steps; two matrices of two groups; each order gives the same, bit for bit."""
    inputs = make_inputs(Case([128, 64], 16, 16, 20, 16))
    (forward, backward), found = interpreted(order_of_a_launch, inputs, cache)
    assert [(place - min(forward)) // (32 * 16 * 4) for place in forward] == tiles
    last = backward[2::3]  # gated, the hidden gradient, then the result of the copy
    assert [(place - min(last)) // (32 * 16 * 4) for place in last] == tiles
    assert all(torch.equal(found[name], each) for name, each in interpreted(by_kernel, inputs).items())
