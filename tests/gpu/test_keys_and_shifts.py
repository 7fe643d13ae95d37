"""product_key_topk and shift_mix on a GPU: output and gradients against the reference in float64, the choice itself, and bit for bit twice.

Uninitialised memory holds NaN in one of the runs, as in test_kernels.py.
"""

import pytest
import torch
from torch import Tensor

from kernels.product_key_topk import product_key_topk
from kernels.product_key_topk.reference import reference as choose_reference
from kernels.shift_mix import BOUNDARIES, shift_mix, shift_mix_step
from kernels.shift_mix.reference import reference as mix_reference
from tests.gpu.cases import DTYPES, TOLERANCE, assert_close, full_or_tiny, normal, on_a_grid
from tests.gpu.test_kernels import check

pytestmark = pytest.mark.gpu

# T, H, K, J, C, heads with their own queries and keys
CHOICES = full_or_tiny(
    [
        (1000, 8, 16, 1024, 64, "queries"),
        (515, 4, 32, 512, 128, "both"),
        (67, 4, 8, 155, 206, "keys"),
        (33, 1, 64, 300, 7, "both"),
        (40, 2, 9, 3, 1, "both"),
        (1, 1, 1, 1, 1, "both"),
        (0, 2, 5, 12, 16, "both"),
    ],
    [(5, 2, 4, 5, 6, "keys"), (0, 2, 4, 5, 6, "both")],
)


@pytest.mark.parametrize("sizes", CHOICES, ids=str)
def test_product_key_topk_equals_its_reference(device: torch.device, sizes: tuple):
    """On a grid, where products are exact: equal scores abound, and the choice must be the same in every place."""
    tokens, heads, picks, num_keys, width, own = sizes
    queries = on_a_grid(normal(tokens, heads if own != "keys" else 1, 2, width, seed=1, device=device))
    keys = on_a_grid(normal(heads if own != "queries" else 1, 2, num_keys, width, seed=2, device=device))
    check(
        lambda queries, keys: product_key_topk(queries, keys, top_k=picks, backend="triton").scores_THK,
        lambda queries, keys: choose_reference(queries, keys, top_k=picks)[0],
        {"queries": queries, "keys": keys},
        torch.float32,
    )
    choice = product_key_topk(queries, keys, top_k=picks, backend="triton")
    wanted = choose_reference(queries.double(), keys.double(), top_k=picks)
    assert torch.equal(choice.first_THK, wanted[1])
    assert torch.equal(choice.second_THK, wanted[2])


# B, S, D, X, shifts, the lengths of documents (over and over)
MIXES = full_or_tiny(
    [
        (4, 256, 412, 1, (16,), (100,)),
        (2, 1000, 1024, 1024, (128,), (1, 300, 7)),
        (3, 130, 96, 3, (1, 4, 64), None),
        (1, 50, 3, 1, (64,), None),
        (0, 5, 8, 1, (8,), None),
    ],
    [(2, 9, 12, 3, (4, 2, 1), (5, 4)), (0, 9, 12, 1, (2,), None)],
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("sizes", MIXES, ids=str)
def test_shift_mix_equals_its_reference(device: torch.device, sizes: tuple, boundary: str, dtype: torch.dtype):
    rows, length, width, factors, shifts, documents = sizes
    ids = None
    if documents is not None:
        runs = torch.tensor(documents * length).cumsum(0)
        ids = torch.searchsorted(runs, torch.arange(length), right=True).expand(rows, -1).to(device)
    rest = {"shifts": shifts, "boundary": boundary, "document_ids_BS": ids}
    leaves = {
        "u": normal(rows, length, width, seed=1, device=device).to(dtype),
        "a": normal(factors, seed=2, device=device),
        "b": normal(factors, seed=3, device=device),
    }
    check(
        lambda u, a, b: shift_mix(u, a, b, **rest, backend="triton"),
        lambda u, a, b: mix_reference(u, a, b, **rest),
        leaves,
        dtype,
    )


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_decoding_step_after_step_equals_the_whole_row(device: torch.device, boundary: str):
    u, a, b = (normal(*shape, seed=n, device=device) for n, shape in enumerate(((2, 11, 412), (4,), (4,))))
    for shift in (1, 4):
        ring = torch.full((2, shift, 412), float("nan"), device=device)
        parts: list[Tensor] = [
            shift_mix_step(u[:, t], ring, a, b, position=t, boundary=boundary, backend="triton") for t in range(11)
        ]
        wanted = mix_reference(u.double(), a.double(), b.double(), shifts=(shift,), boundary=boundary)
        assert_close({"output": torch.stack(parts, dim=1)}, {"output": wanted}, TOLERANCE[torch.float32])
