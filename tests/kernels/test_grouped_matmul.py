"""grouped_matmul: every backend against the reference, and the reference against numpy."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kernels.grouped_matmul import choose_backend, grouped_matmul
from kernels.grouped_matmul.reference import reference

# rows of each group, width in, width out
SHAPES = {
    "R12_M8_N4_G3_even": ([4, 4, 4], 8, 4),
    "R38_M12_N20_G5_odd": ([7, 1, 13, 0, 17], 12, 20),
    "R9_M16_N8_G4_first_and_last_empty": ([0, 5, 4, 0], 16, 8),
    "R21_M8_N12_G4_one_has_all": ([0, 0, 21, 0], 8, 12),
    "R6_M4_N8_G1": ([6], 4, 8),
    "R1_M4_N4_G7_more_groups_than_rows": ([0, 0, 0, 1, 0, 0, 0], 4, 4),
    "R0_M8_N4_G3_no_rows": ([0, 0, 0], 8, 4),
    "R2051_M64_N128_G16_many": ([0, 250, 3, 97, 1, 128, 129, 127, 500, 31, 33, 64, 300, 200, 100, 88], 64, 128),
}
UNALIGNED = {"R10_M7_N5_G3_odd_widths": ([3, 0, 7], 7, 5), "R5_M1_N1_G2_scalars": ([2, 3], 1, 1)}
BACKEND_AND_SHAPE = [
    *(pytest.param(backend, *SHAPES[name], id=f"{backend}-{name}") for backend in ("torch", "loop") for name in SHAPES),
    *(pytest.param("loop", *UNALIGNED[name], id=f"loop-{name}") for name in UNALIGNED),
]
BACKENDS = pytest.mark.parametrize("backend", ["torch", "loop", "reference"])


def ends(sizes: list[int]) -> Tensor:
    return torch.tensor(list(accumulate(sizes)), dtype=torch.int32)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(rows: Tensor, weights: Tensor, sizes: list[int], backend: str, gradient: Tensor | None = None) -> None:
    """Output and gradients of the backend equal the reference's in float64, on leaves that hold the same numbers.

    `rows` and `weights` keep their strides: the leaves are the tensors themselves.
    """
    rows, weights = rows.detach().requires_grad_(), weights.detach().requires_grad_()
    expected_rows = rows.detach().double().requires_grad_()
    expected_weights = weights.detach().double().requires_grad_()
    output = grouped_matmul(rows, weights, offsets_G=ends(sizes), backend=backend)
    expected = reference(expected_rows, expected_weights, offsets_G=ends(sizes))
    gradient = normal(*expected.shape, seed=2) if gradient is None else gradient
    output.backward(gradient)
    expected.backward(gradient.double())
    for name, actual, wanted in [
        ("output", output, expected),
        ("gradient of rows", rows.grad, expected_rows.grad),
        ("gradient of weights", weights.grad, expected_weights.grad),
    ]:
        assert actual is not None, name
        assert wanted is not None, name
        wanted = wanted.to(actual.dtype)
        # 1e-4: the gradient of the weights sums up to 500 products of size 1 in fp32.
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_the_reference_multiplies_each_row_by_the_weights_of_its_group() -> None:
    sizes, rows, weights = [2, 0, 3], normal(5, 3).double(), normal(3, 3, 2).double()
    group_of_row = np.repeat(np.arange(3), sizes)
    expected = [row @ weights.numpy()[group] for row, group in zip(rows.numpy(), group_of_row, strict=True)]
    actual = reference(rows, weights, offsets_G=ends(sizes)).numpy()
    np.testing.assert_allclose(actual, np.stack(expected), rtol=1e-12)


@pytest.mark.parametrize(("backend", "sizes", "width_in", "width_out"), BACKEND_AND_SHAPE)
def test_output_and_gradients_equal_the_reference(
    backend: str, sizes: list[int], width_in: int, width_out: int
) -> None:
    assert_same(normal(sum(sizes), width_in), normal(len(sizes), width_in, width_out, seed=1), sizes, backend)


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    width_in=st.integers(1, 6),
    width_out=st.integers(1, 6),
    backend=st.sampled_from(["torch", "loop"]),
)
def test_any_group_sizes_equal_the_reference(sizes: list[int], width_in: int, width_out: int, backend: str) -> None:
    width_in, width_out = 4 * width_in, 4 * width_out
    assert_same(normal(sum(sizes), width_in), normal(len(sizes), width_in, width_out, seed=1), sizes, backend)


def inside_nan(tensor: Tensor) -> Tensor:
    """The same numbers as a slice of a larger, odd-sized block of NaN."""
    block = torch.full([size + 3 for size in tensor.shape], float("nan"))
    inner = block[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return inner.copy_(tensor)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "every_second_row": lambda tensor: tensor.repeat_interleave(2, dim=-2)[..., ::2, :],
    "every_second_column": lambda tensor: tensor.repeat_interleave(2, dim=-1)[..., ::2],
    "transposed": lambda tensor: tensor.mT.contiguous().mT,
    "inside_nan": inside_nan,
    "aligned_slice": lambda tensor: torch.cat([tensor, tensor.new_full([*tensor.shape[:-1], 4], float("nan"))], -1)[
        ..., :-4
    ],
}


@BACKENDS
@pytest.mark.parametrize("which", ["rows", "weights"])
@pytest.mark.parametrize("strides", STRIDES)
def test_strides_do_not_matter(backend: str, which: str, strides: str) -> None:
    tensors = {"rows": normal(11, 8), "weights": normal(3, 8, 12, seed=1)}
    tensors[which] = STRIDES[strides](tensors[which])
    assert not tensors[which].is_contiguous()
    assert_same(tensors["rows"], tensors["weights"], [4, 0, 7], backend)


@BACKENDS
def test_numbers_may_be_shared_by_expansion(backend: str) -> None:
    sizes, row, matrix, column = [2, 0, 4], normal(1, 8), normal(1, 8, 4, seed=1), normal(3, 8, 1, seed=2)
    assert_same(row.expand(6, 8), matrix.expand(3, 8, 4), sizes, backend)
    assert_same(row.expand(6, 8), column.expand(3, 8, 4), sizes, backend)


@BACKENDS
@pytest.mark.parametrize("sizes", [[3, 0, 4], [0, 1, 0], [0, 0, 0]], ids=["R7", "R1", "R0"])
def test_a_gradient_with_stride_zero_is_taken(backend: str, sizes: list[int]) -> None:
    expanded = torch.ones(()).expand(sum(sizes), 4)
    assert_same(normal(sum(sizes), 8), normal(3, 8, 4, seed=1), sizes, backend, gradient=expanded)
    weights = normal(3, 8, 4, seed=1).requires_grad_()
    grouped_matmul(normal(sum(sizes), 8), weights, offsets_G=ends(sizes), backend=backend).sum().backward()


@BACKENDS
def test_without_any_row_the_gradients_are_zero_and_there(backend: str) -> None:
    rows, weights = torch.empty(0, 8, requires_grad=True), nn.Parameter(normal(3, 8, 4))
    output = grouped_matmul(rows, weights, offsets_G=ends([0, 0, 0]), backend=backend)
    (output.sum() + 0.0).backward()
    assert output.shape == (0, 4)
    assert rows.grad is not None
    assert rows.grad.shape == (0, 8)
    assert weights.grad is not None
    assert torch.equal(weights.grad, torch.zeros(3, 8, 4))


@BACKENDS
def test_nan_stays_in_its_group(backend: str) -> None:
    sizes, clean_rows = [3, 4, 0, 5], [0, 1, 2, 7, 8, 9, 10, 11]
    rows, weights, gradient = normal(12, 8), normal(4, 8, 4, seed=1), normal(12, 4, seed=2)
    rows[3:7] = float("nan")
    gradient[3:7] = float("nan")
    weights[1] = float("nan")
    rows.requires_grad_()
    weights.requires_grad_()
    output = grouped_matmul(rows, weights, offsets_G=ends(sizes), backend=backend)
    output.backward(gradient)
    assert rows.grad is not None
    assert weights.grad is not None
    assert output[3:7].isnan().all()
    for name, tensor in [
        ("output", output[clean_rows]),
        ("gradient of rows", rows.grad[clean_rows]),
        ("gradient of weights", weights.grad[[0, 2, 3]]),
    ]:
        assert tensor.isfinite().all(), name
    assert torch.equal(weights.grad[2], torch.zeros(8, 4)), "a group without rows"


@pytest.mark.parametrize("backend", ["loop", "reference"])
def test_float64_gradients_equal_finite_differences(backend: str) -> None:
    rows, weights = normal(5, 3).double().requires_grad_(), normal(3, 3, 2, seed=1).double().requires_grad_()

    def function(rows: Tensor, weights: Tensor) -> Tensor:
        return grouped_matmul(rows, weights, offsets_G=ends([2, 0, 3]), backend=backend)

    assert torch.autograd.gradcheck(function, (rows, weights))


@BACKENDS
def test_autocast_computes_in_bf16_with_fp32_gradients_at_fp32_leaves(backend: str) -> None:
    sizes, rows, weights = [30, 0, 34], normal(64, 32).requires_grad_(), nn.Parameter(normal(3, 32, 16, seed=1))
    with torch.autocast("cpu", torch.bfloat16):
        output = grouped_matmul(rows, weights, offsets_G=ends(sizes), backend=backend)
        expected = torch.cat([rows[:30] @ weights[0], rows[30:] @ weights[2]])
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected)
    gradient = normal(64, 16, seed=2).bfloat16()
    wanted_rows, wanted_weights = torch.autograd.grad(expected, (rows, weights), gradient)
    output.backward(gradient)
    for name, actual, wanted in [("rows", rows.grad, wanted_rows), ("weights", weights.grad, wanted_weights)]:
        assert actual is not None, name
        assert actual.dtype == torch.float32, name
        torch.testing.assert_close(actual, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_chooses_the_dtype_that_it_chooses_for_matmul(dtype: torch.dtype, enabled: bool) -> None:
    rows, weights = normal(4, 8).to(dtype), normal(2, 8, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        output = grouped_matmul(rows, weights, offsets_G=ends([1, 3]), backend="loop")
        assert output.dtype == torch.matmul(rows, weights[0]).dtype


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bit_equal(backend: str, dtype: torch.dtype) -> None:
    def run() -> list[Tensor]:
        rows = normal(300, 64).to(dtype).requires_grad_()
        weights = normal(4, 64, 32, seed=1).to(dtype).requires_grad_()
        output = grouped_matmul(rows, weights, offsets_G=ends([150, 0, 49, 101]), backend=backend)
        return [output.detach(), *torch.autograd.grad(output, (rows, weights), normal(300, 32, seed=2).to(dtype))]

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


def test_the_loop_never_indexes_the_bank() -> None:
    """The backward of weights[g] allocates a gradient of the whole bank, for each group."""
    weights = normal(3, 8, 4).requires_grad_()
    output = grouped_matmul(normal(6, 8), weights, offsets_G=ends([1, 2, 3]), backend="loop")
    names, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(node.name())
            waiting += [parent for parent, _ in node.next_functions]
    assert "UnbindBackward0" in names
    assert not {"SelectBackward0", "IndexBackward0", "SliceBackward0"} & names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": normal(6, 12)}, r"must agree in M, got rows \[6, 12\] and weights \[3, 8, 4\]"),
        ({"rows": normal(2, 3, 8)}, r"must agree in M, got rows \[2, 3, 8\]"),
        ({"weights": normal(8, 4)}, r"must agree in M, got .* weights \[8, 4\]"),
        ({"offsets": torch.tensor([1, 3, 6])}, r"offsets must be int32 .* got torch\.int64 \[3\]"),
        ({"offsets": ends([2, 4])}, r"one end per group of weights, .* \[2\] for weights \[3, 8, 4\]"),
        ({"weights": normal(0, 8, 4), "offsets": ends([])}, "at least one"),
        ({"offsets": ends([1, 2, 2])}, r"the last one the number of rows, got \[1, 3, 5\] for 6 rows"),
        ({"offsets": ends([1, 2, 4])}, r"got \[1, 3, 7\] for 6 rows"),
        ({"offsets": ends([4, -2, 4])}, r"non-decreasing .* got \[4, 2, 6\]"),
        ({"offsets": ends([-1, 3, 4])}, r"got \[-1, 2, 6\]"),
        ({"rows": normal(6, 8).bfloat16()}, r"one dtype outside autocast, got rows torch\.bfloat16 and weights .*32"),
        ({"weights": normal(3, 8, 4).to("meta")}, "on one device, got cpu, meta and cpu"),
        (
            {"backend": "auto"},
            "backend must be one of torch, loop, reference, triton, got 'auto': call choose_backend once",
        ),
        ({"weights": normal(3, 8, 6)}, r"multiples of 4 in torch\.float32 \(16 bytes\), got 6: pad it to 8, or choose"),
        ({"rows": normal(6, 8).double(), "weights": normal(3, 8, 4).double()}, r"got torch\.float64: choose the loop"),
    ],
)
def test_bad_input_is_one_sentence_with_the_remedy(change: dict[str, Any], message: str) -> None:
    call = {"rows": normal(6, 8), "weights": normal(3, 8, 4), "offsets": ends([1, 2, 3]), "backend": "torch"} | change
    with pytest.raises(ValueError, match=message):
        grouped_matmul(call["rows"], call["weights"], offsets_G=call["offsets"], backend=call["backend"])


def test_auto_takes_torch_where_it_works_and_the_loop_elsewhere() -> None:
    assert choose_backend("auto", device="cpu", dtype=torch.float32, widths=[412, 128]) == "torch"
    assert choose_backend("auto", device="cpu", dtype=torch.bfloat16, widths=[128, 64]) == "torch"
    assert choose_backend("auto", device="cpu", dtype=torch.bfloat16, widths=[412, 128]) == "loop"
    assert choose_backend("auto", device="cpu", dtype=torch.float64, widths=[128]) == "loop"
    assert choose_backend("auto", device="cuda", dtype=torch.bfloat16, widths=[128]) == "torch"
    assert choose_backend("auto", device=torch.device("cuda", 1), dtype=torch.float32, widths=[128]) == "loop"


def test_a_named_backend_is_kept_or_refused_with_the_reason() -> None:
    for name in ("torch", "loop", "reference"):
        assert choose_backend(name, device="cpu", dtype=torch.float32, widths=[128]) == name
    with pytest.raises(ValueError, match=r"multiples of 8 in torch\.bfloat16 .* got 412: pad it to 416, or choose"):
        choose_backend("torch", device="cpu", dtype=torch.bfloat16, widths=[128, 412])
    with pytest.raises(ValueError, match="one of auto, torch, loop, reference, triton, got 'cuda'"):
        choose_backend("cuda", device="cpu", dtype=torch.float32, widths=[128])
