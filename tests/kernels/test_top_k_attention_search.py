"""The search of top_k_attention: what its places hold, and how often it goes along the keys."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.top_k_attention import MAX_TOP_K, MAX_WIDTH
from kernels.top_k_attention.kernel import Tiles, tiles_for
from tests.kernels.memory import launches_of

Run = Callable[..., Any]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def every_tile(name: str, dtype: torch.dtype, width: int, top_k: int) -> list[Tiles]:
    """For NVIDIA's and AMD's warps."""
    options = {"dtype": dtype, "width": width, "top_k": top_k}
    return [tiles for warp_size in (32, 64) for tiles in tiles_for(name, **options, warp_size=warp_size)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_places_of_a_tile_hold_twice_top_k_scores_and_not_four_times(dtype: torch.dtype) -> None:
    """Twice: two sweeps are enough. Not four times: what is held lies in registers."""
    for top_k in range(1, MAX_TOP_K + 1):
        for tiles in every_tile("thresholds", dtype, MAX_WIDTH, top_k):
            places = tiles.held * tiles.n
            assert 2 * top_k <= places, (top_k, tiles)
            assert places < 4 * top_k or tiles.held == 4, (top_k, tiles)


def sweeps(dtype: torch.dtype, top_k: int) -> float:
    """Along 2,048 keys with random scores, the mean of a few blocks of queries: the keys that are read over those that there are."""
    from kernels.top_k_attention import kernel

    m = every_tile("thresholds", dtype, 16, top_k)[0].m
    generator = torch.Generator().manual_seed(0)
    q_BHSC, k_BHMC = (torch.randn(2, 1, length, 16, generator=generator).to(dtype) for length in (m, 2048))
    launches = launches_of(kernel.thresholds, q_BHSC, k_BHMC, None, top_k=top_k, precision="ieee")
    return (launches[0].asked - q_BHSC.nbytes) / k_BHMC.nbytes


@pytest.mark.parametrize(("dtype", "top_k"), [(torch.float32, 128), (torch.bfloat16, 256)], ids=str)
def test_random_scores_are_searched_in_two_sweeps(dtype: torch.dtype, top_k: int, interpreted: Run) -> None:
    assert 1.0 <= interpreted(sweeps, dtype, top_k) <= 2.2


def test_all_kernels_make_their_scores_by_the_same_tile() -> None:
    """Else a score could differ by a bit between the search and the product, and a query keep a key too many or too few."""
    names = ("thresholds", "forward", "queries", "keys")
    for dtype in DTYPES:
        for width in (16, 64, MAX_WIDTH):
            calls = [(name, top_k) for name in names for top_k in (0, 1, 64, MAX_TOP_K)]
            found = {(tiles.m, tiles.n) for name, top_k in calls for tiles in every_tile(name, dtype, width, top_k)}
            assert len(found) == 1, (dtype, width, found)
