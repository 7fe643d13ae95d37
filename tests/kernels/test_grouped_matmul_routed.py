"""grouped_matmul with routes: the Triton kernels in the interpreter, and the other backends, against a loop over copies."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.compare import assert_same
from tests.kernels.routes import ALL, Case, Inputs, compute, compute_in_small_tiles, inputs_of, loop

Interpreted = Callable[..., Any]
PLAIN_BACKENDS = ("torch", "loop", "reference")
CASES = {
    "C38_M13_N20_plain": Case((7, 1, 13, 0, 17), 13, 20),
    "C38_M13_N20_R9_read_through_an_index": Case((7, 1, 13, 0, 17), 13, 20, num_rows=9),
    "C38_M13_N20_P7_summed": Case((7, 1, 13, 0, 17), 13, 20, num_outputs=7),
    "C38_M12_N20_R9_P7_gate_before": Case((7, 1, 13, 0, 17), 12, 20, **ALL, gate_side="before"),
    "C38_M12_N20_R9_P7_gate_after": Case((7, 1, 13, 0, 17), 12, 20, **ALL, gate_side="after"),
    "C38_M12_N20_relu": Case((7, 1, 13, 0, 17), 12, 20, activation="relu"),
    "C38_M12_N20_R9_P7_relu_gate_before": Case((7, 1, 13, 0, 17), 12, 20, **ALL, activation="relu", gate_side="before"),
    "C38_M12_N20_R9_P7_relu_gate_after": Case((7, 1, 13, 0, 17), 12, 20, **ALL, activation="relu", gate_side="after"),
    "C24_M40_N36_several_column_tiles": Case((11, 0, 13), 40, 36, **ALL, gate_side="after"),
    "C24_M40_N36_several_column_tiles_relu": Case((11, 0, 13), 40, 36, **ALL, activation="relu", gate_side="after"),
    "C70_M8_N4_G3_one_has_all": Case((0, 70, 0), 8, 4, **ALL, gate_side="after"),
    "C0_M8_N4_G3_no_copies": Case((0, 0, 0), 8, 4, **ALL, gate_side="after"),
    "C0_M8_N4_G3_no_rows": Case((0, 0, 0), 8, 4, num_rows=0, num_outputs=0, gate_side="before", activation="relu"),
    "C5_M1_N1_G1": Case((5,), 1, 1, num_rows=2, num_outputs=2, gate_side="after"),
    "C6_M4_N8_G9_more_groups_than_copies": Case((0, 1, 0, 2, 0, 0, 3, 0, 0), 4, 8, **ALL, gate_side="before"),
}


def compute_all_in_small_tiles(case: Case, inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """The gradient of the weights too."""
    import kernels.grouped_matmul.weight_gradient as weights

    with patch.object(weights, "weight_tiles_for", lambda dtype: (weights.Tiles(16, 16, 16, 4, 2),)):
        return compute_in_small_tiles(case, inputs, backend)


@pytest.mark.parametrize("function", [compute, compute_all_in_small_tiles])
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_equal_the_loop(interpreted: Interpreted, case: str, function: Callable[..., Any]) -> None:
    inputs = inputs_of(CASES[case])
    assert_same(interpreted(function, CASES[case], inputs, "triton"), loop(CASES[case], inputs))


@pytest.mark.parametrize("backend", PLAIN_BACKENDS)
@pytest.mark.parametrize("case", [name for name in CASES if "M12" in name or "M8" in name])
def test_the_other_backends_equal_the_loop(case: str, backend: str) -> None:
    inputs = inputs_of(CASES[case])
    assert_same(compute(CASES[case], inputs, backend), loop(CASES[case], inputs))


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple),
    widths=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    num_rows=st.none() | st.integers(1, 9),
    num_outputs=st.none() | st.integers(1, 9),
    activation=st.sampled_from(["none", "relu"]),
    gate_side=st.sampled_from([None, "before", "after"]),
)
def test_any_routes_equal_the_loop(
    interpreted: Interpreted, sizes: tuple[int, ...], widths: tuple[int, int], **options: Any
) -> None:
    case = Case(sizes, *widths, **options)
    inputs = inputs_of(case)
    assert_same(interpreted(compute, case, inputs, "triton"), loop(case, inputs))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_half_precision_is_as_exact_as_its_rounding(interpreted: Interpreted, dtype: str, activation: str) -> None:
    case = Case((7, 1, 13, 0, 17), 12, 20, **ALL, activation=activation, gate_side="after", dtype=dtype)
    inputs = inputs_of(case)
    found = interpreted(compute, case, inputs, "triton")
    assert found["output"].dtype == found["gradient of rows"].dtype == getattr(torch, dtype)
    # copies are rounded once each before they are summed: 2^-8 of the largest of about 10 numbers of size 3
    assert_same(found, loop(case, inputs), tolerance=6e-2 if dtype == "bfloat16" else 8e-3)


def inside_nan(tensor: Tensor) -> Tensor:
    """The same numbers as a slice of a larger, odd-sized block of NaN."""
    block = torch.full([size + 3 for size in tensor.shape], float("nan"), dtype=tensor.dtype)
    return block[tuple(slice(1, 1 + size) for size in tensor.shape)].copy_(tensor)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "every_second_row": lambda tensor: tensor.repeat_interleave(2, dim=-2)[..., ::2, :],
    "transposed": lambda tensor: tensor.mT.contiguous().mT,
    "inside_nan": inside_nan,
    "expanded": lambda tensor: tensor[..., :1].expand(tensor.shape),
}


@pytest.mark.parametrize("which", ["rows", "weights", "gradient"])
@pytest.mark.parametrize("strides", STRIDES)
def test_strides_do_not_matter(interpreted: Interpreted, which: str, strides: str) -> None:
    case = Case((4, 0, 7), 24, 20, num_rows=6, num_outputs=5, gate_side="after")
    inputs = inputs_of(case)
    inputs[which] = STRIDES[strides](inputs[which])
    assert not inputs[which].is_contiguous()
    assert_same(interpreted(compute_all_in_small_tiles, case, inputs, "triton"), loop(case, inputs))


def test_nan_stays_in_its_group(interpreted: Interpreted) -> None:
    case = Case((3, 4, 0, 5), 8, 4, gate_side="after", activation="relu")
    inputs = inputs_of(case)
    for name in ("rows", "gradient"):
        inputs[name][3:7] = float("nan")
    inputs["weights"][1] = float("nan")
    found = interpreted(compute, case, inputs, "triton")
    assert found["output"][3:7].isnan().all()
    clean = [0, 1, 2, 7, 8, 9, 10, 11]
    for name in ("output", "gradient of rows", "gradient of gates"):
        assert found[name][clean].isfinite().all(), name
    assert found["gradient of weights"][[0, 2, 3]].isfinite().all()


def test_a_group_without_copies_and_a_row_without_copies_get_exact_zeros(interpreted: Interpreted) -> None:
    case = Case((3, 0, 2), 8, 4, num_rows=4, num_outputs=3, gate_side="after")
    inputs = inputs_of(case)
    inputs["row_index"], inputs["output_index"] = torch.tensor([0, 2, 2, 3, 0]), torch.tensor([0, 2, 2, 0, 0])
    found = interpreted(compute, case, inputs, "triton")
    assert torch.equal(found["gradient of weights"][1], torch.zeros(8, 4))
    assert torch.equal(found["gradient of rows"][1], torch.zeros(8))
    assert torch.equal(found["output"][1], torch.zeros(4))


def copies_of_one_row_in_order() -> tuple[Tensor, Tensor]:
    """Sums of numbers whose float32 sum depends on the order, by the kernel and one after the other."""
    from kernels.sum_copies import RowCopies, sum_copies

    copies_CN = (torch.randn(40, 3) * 10.0 ** torch.randint(-4, 5, (40, 1))).float()
    index_C = torch.randint(0, 3, (40,), dtype=torch.int32)
    one_by_one = torch.zeros(4, 3)
    for copy, row in enumerate(index_C.tolist()):
        one_by_one[row] += copies_CN[copy]
    return sum_copies(copies_CN, RowCopies.of(index_C, num_rows=4)), one_by_one


def test_copies_are_summed_in_ascending_order_bit_for_bit(interpreted: Interpreted) -> None:
    found, wanted = interpreted(copies_of_one_row_in_order)
    assert torch.equal(found, wanted)
