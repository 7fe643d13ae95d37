"""sort_routes: the kernels in Triton's interpreter against numpy's stable sort."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.sort_routes import sort_routes

Interpreted = Callable[..., Any]


def random_ids(*shape: int, num_groups: int, seed: int = 0) -> Tensor:
    return torch.randint(num_groups, shape, generator=torch.Generator().manual_seed(seed))


# ids, number of groups; a program of the kernel takes whole steps of 128 ids
CASES: dict[str, tuple[Tensor, int]] = {
    "N0_K2_G3_no_rows": (torch.zeros(0, 2, dtype=torch.int64), 3),
    "N5_K1_G1_one_group": (torch.zeros(5, 1, dtype=torch.int64), 1),
    "N1_K1_G7": (torch.tensor([[4]]), 7),
    "N128_K1_G4_one_whole_step": (random_ids(128, 1, num_groups=4), 4),
    "N67_K3_G5_not_a_multiple_of_a_step": (random_ids(67, 3, num_groups=5), 5),
    "N100_K3_G9_all_to_one": (torch.full((100, 3), 6), 9),
    "N40_K2_G80_ids_spell_the_shape": (torch.arange(80).view(40, 2), 80),
    "N40_K2_G80_backwards": (torch.arange(80).flip(0).view(40, 2), 80),
    "N130_K2_G2048_most_groups": (random_ids(130, 2, num_groups=2048), 2048),
    "N130_K2_G1023_first_and_last": (torch.tensor([0, 1022]).repeat(130, 1), 1023),
    "N499_K2_G3_eight_programs": (random_ids(499, 2, num_groups=3), 3),
    "transposed": (random_ids(3, 50, num_groups=4).mT, 4),
    "every_second": (random_ids(50, 6, num_groups=4)[:, ::2], 4),
}


def sort_interpreted(ids_NK: Tensor, num_groups: int) -> tuple[Tensor, ...]:
    torch.use_deterministic_algorithms(True)  # torch.empty then holds the largest integer
    found = sort_routes(ids_NK, num_groups=num_groups, backend="triton")
    return found.order_C, found.offsets_G, found.inverse_C


def sort_in_few_programs(ids_NK: Tensor, num_groups: int) -> tuple[Tensor, ...]:
    """Two programs at most, so that each one takes several steps."""
    import kernels.sort_routes.kernel as kernel

    before, kernel.MAX_PROGRAMS = kernel.MAX_PROGRAMS, 2
    try:
        return sort_interpreted(ids_NK, num_groups)
    finally:
        kernel.MAX_PROGRAMS = before


def assert_sorted(found: tuple[Tensor, ...], ids_NK: Tensor, num_groups: int) -> None:
    ids = ids_NK.reshape(-1).numpy()
    order = np.argsort(ids, kind="stable")
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(ids))
    ends = [int((ids <= group).sum()) for group in range(num_groups)]
    for name, actual, wanted in zip(("order", "offsets", "inverse"), found, (order, ends, inverse), strict=True):
        assert actual.dtype == torch.int32, name
        np.testing.assert_array_equal(actual.numpy(), wanted, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_sort_as_numpy_does(interpreted: Interpreted, case: str) -> None:
    ids_NK, num_groups = CASES[case]
    assert_sorted(interpreted(sort_interpreted, ids_NK.clone(), num_groups), ids_NK, num_groups)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_sorts_as_numpy_does(case: str) -> None:
    ids_NK, num_groups = CASES[case]
    found = sort_routes(ids_NK, num_groups=num_groups)
    assert_sorted((found.order_C, found.offsets_G, found.inverse_C), ids_NK, num_groups)


@given(
    ids=st.lists(st.integers(0, 5), max_size=600),
    num_groups=st.integers(6, 9),
    dtype=st.sampled_from(["int32", "int64"]),
)
def test_any_ids_are_sorted(interpreted: Interpreted, ids: list[int], num_groups: int, dtype: str) -> None:
    ids_C = torch.tensor(ids, dtype=getattr(torch, dtype))
    assert_sorted(interpreted(sort_in_few_programs, ids_C, num_groups), ids_C, num_groups)


@pytest.mark.parametrize("num_rows", [0, 1, 255, 256, 257, 700])
def test_a_program_with_several_steps_continues_where_it_was(interpreted: Interpreted, num_rows: int) -> None:
    ids_C = random_ids(num_rows, num_groups=7)
    assert_sorted(interpreted(sort_in_few_programs, ids_C, 7), ids_C, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids_NK": torch.zeros(3, 2)}, r"ids must be int32 or int64, got torch\.float32"),
        ({"num_groups": 0}, "at least 1 group .* got 0 groups and 6 ids"),
        ({"num_groups": 3}, r"ids must be in \[0, num_groups\), got 0 to 5 for 3 groups"),
        ({"ids_NK": torch.tensor([-1])}, "got -1 to -1 for 6 groups"),
        ({"backend": "cuda"}, "must be one of auto, triton, reference, got 'cuda'"),
        ({"backend": "triton"}, "computes on a GPU, got tensors on cpu: move them to a GPU, or choose another backend"),
    ],
)
def test_bad_input_is_one_sentence_with_the_remedy(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"ids_NK": torch.arange(6).view(3, 2), "num_groups": 6, "backend": "auto"} | change
    with pytest.raises(ValueError, match=message):
        sort_routes(call.pop("ids_NK"), **call)
