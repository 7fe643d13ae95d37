"""sum_copies: the kernel in Triton's interpreter, and its reference, against numpy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.sum_copies import RowCopies, sum_copies
from kernels.sum_copies.reference import reference

Interpreted = Callable[..., Any]


def summed(copies_CN: Tensor, index_C: Tensor, num_rows: int) -> Tensor:
    torch.use_deterministic_algorithms(True)  # torch.empty then holds NaN
    return sum_copies(copies_CN, RowCopies.of(index_C, num_rows=num_rows))


def by_numpy(copies_CN: Tensor, index_C: Tensor, num_rows: int) -> np.ndarray:
    sums = np.zeros((num_rows, copies_CN.shape[1]))
    np.add.at(sums, index_C.numpy(), copies_CN.double().numpy())
    return sums


CASES: dict[str, tuple[list[int], int, int]] = {  # the row of each copy, rows, width
    "C7_P5_N3": ([4, 0, 0, 2, 4, 4, 0], 5, 3),
    "C40_P33_N130_two_blocks_each_way": ([(7 * copy) % 33 for copy in range(40)], 33, 130),
    "C20_P3_N8_all_to_one": ([1] * 20, 3, 8),
    "C0_P4_N8_no_copies": ([], 4, 8),
    "C0_P0_N8_no_rows": ([], 0, 8),
}


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_and_the_reference_sum_as_numpy_does(interpreted: Interpreted, case: str) -> None:
    index, num_rows, width = CASES[case]
    copies_CN, index_C = torch.randn(len(index), width), torch.tensor(index, dtype=torch.int64)
    wanted = by_numpy(copies_CN, index_C, num_rows)
    for found in (interpreted(summed, copies_CN, index_C, num_rows), reference(copies_CN, index_C, num_rows=num_rows)):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-5)


@given(index=st.lists(st.integers(0, 6), max_size=30), width=st.integers(1, 9))
def test_any_copies_are_summed(interpreted: Interpreted, index: list[int], width: int) -> None:
    copies_CN, index_C = torch.randn(len(index), width), torch.tensor(index, dtype=torch.int32)
    found = interpreted(summed, copies_CN, index_C, 8)
    np.testing.assert_allclose(found.numpy(), by_numpy(copies_CN, index_C, 8), rtol=1e-5, atol=1e-5)


def test_a_sum_of_bf16_is_rounded_once(interpreted: Interpreted) -> None:
    """256 + 1 is 256 in bf16: a sum that was rounded after each copy would stay there."""
    copies_CN = torch.tensor([[256.0], *[[1.0]] * 8]).bfloat16()
    found = interpreted(summed, copies_CN, torch.zeros(9, dtype=torch.int64), 1)
    assert found.dtype == torch.bfloat16
    assert found.item() == 264.0


def test_the_copies_of_a_row_ascend() -> None:
    copies = RowCopies.of(torch.tensor([2, 0, 2, 0, 0]), num_rows=4)
    assert copies.order_C.tolist() == [1, 3, 4, 0, 2]
    assert copies.ends_P.tolist() == [3, 3, 5, 5]
    assert copies.order_C.dtype == copies.ends_P.dtype == torch.int32


def summed_in_order(values: list[float], order: list[int]) -> float:
    copies = RowCopies(torch.tensor(order, dtype=torch.int32), torch.tensor([len(order)], dtype=torch.int32))
    return sum_copies(torch.tensor(values)[:, None], copies).item()


@pytest.mark.parametrize(("order", "wanted"), [([0, 1, 2], 1.0), ([2, 0, 1], 0.0), ([1, 2, 0], 0.0), ([1, 0, 2], 1.0)])
def test_copies_are_added_in_the_order_that_is_given(interpreted: Interpreted, order: list[int], wanted: float) -> None:
    """In float32 1e8 + 1 is 1e8: the 1 is left over only where it comes last."""
    assert interpreted(summed_in_order, [1e8, -1e8, 1.0], order) == wanted


def checked_by_torch() -> dict[str, str]:
    from kernels.sum_copies.kernel import add

    copies = RowCopies.of(torch.tensor([2, 0, 2, 0, 0]), num_rows=4)
    arguments = (torch.ones(5, 3).bfloat16(), copies.order_C, copies.ends_P)
    return torch.library.opcheck(add, arguments, test_utils=("test_schema", "test_faketensor"), raise_exception=False)


def test_torch_finds_nothing_wrong_with_the_operation(interpreted: Interpreted) -> None:
    assert set(interpreted(checked_by_torch).values()) == {"SUCCESS"}


def test_tensors_on_a_cpu_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="sum_copies: the triton backend computes on a GPU, got tensors on cpu"):
        sum_copies(torch.zeros(2, 3), RowCopies.of(torch.zeros(2, dtype=torch.int64), num_rows=1))


def refused(copies_CN: Tensor) -> str:
    try:
        return str(summed(copies_CN, torch.zeros(3, dtype=torch.int64), 1))
    except ValueError as error:
        return str(error)


def test_copies_that_are_not_contiguous_are_refused(interpreted: Interpreted) -> None:
    assert "must be contiguous, got strides (1, 3): copy them" in interpreted(refused, torch.zeros(2, 3).mT)
