"""shift_mix by every backend, Triton's in the interpreter: output and every gradient against a loop over positions in float64; its step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.shift_mix import BOUNDARIES, cpu, shift_mix, shift_mix_step
from tests.kernels.compare import assert_same
from tests.model.hsm.by_hand import shifted

Run = Callable[..., Any]
Inputs = dict[str, Any]
LEAVES = ("u", "a", "b")
NAMES = ("output", *LEAVES)
every_boundary = pytest.mark.parametrize("boundary", BOUNDARIES)


@dataclass(frozen=True)
class Case:
    """Rows of `length` positions, X factors, the shifts; documents: lengths of each row's."""

    rows: int
    length: int
    width: int
    factors: int
    shifts: tuple[int, ...]
    documents: tuple[tuple[int, ...], ...] | None = None


# A block has 32 positions and 128 channels.
CASES = {
    "B2_S7_D6_X1_shift_2": Case(2, 7, 6, 1, (2,)),
    "B1_S70_D130_X130_shift_33_three_blocks_of_two": Case(1, 70, 130, 130, (33,)),
    "B2_S40_D12_X3_shifts_4_8_1": Case(2, 40, 12, 3, (4, 8, 1), documents=((40,), (33, 6, 1))),
    "B1_S40_D260_X13_a_factor_across_two_shifts_of_two_blocks": Case(1, 40, 260, 13, (3, 33), documents=((36, 4),)),
    "B3_S37_D5_X5_shift_4_documents": Case(3, 37, 5, 5, (4,), documents=((3, 30, 4), (1,) * 37, (32, 5))),
    "B1_S5_D4_X2_shift_of_the_row": Case(1, 5, 4, 2, (5,)),
    "B2_S5_D4_X1_shift_beyond_the_row": Case(2, 5, 4, 1, (64,), documents=((2, 3), (5,))),
    "B1_S40_D4_X1_the_largest_shift": Case(1, 40, 4, 1, (2**31 - 1,), documents=((30, 10),)),
    "B1_S1_D1_X1_scalars": Case(1, 1, 1, 1, (1,)),
    "B0_S4_D4_X2_no_rows": Case(0, 4, 4, 2, (1,)),
    "B2_S0_D4_X2_no_positions": Case(2, 0, 4, 2, (1,), documents=((), ())),
}


def make_inputs(case: Case, boundary: str, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shape = (case.rows, case.length, case.width)
    documents = None
    if case.documents is not None:  # ids that neither ascend nor begin at 0
        runs = [torch.tensor([(7 * n + 3) % 101 for n in range(len(row))]) for row in case.documents]
        repeats = [
            run.repeat_interleave(torch.tensor(row)) for run, row in zip(runs, case.documents, strict=True) if row
        ]
        documents = torch.stack(repeats) if repeats else torch.zeros(shape[:2], dtype=torch.int64)
    return {
        "u": torch.randn(shape, generator=generator).to(dtype),
        "a": torch.randn(case.factors, generator=generator),
        "b": torch.randn(case.factors, generator=generator),
        "gradient": torch.randn(shape, generator=generator).to(dtype),
        "rest": {"shifts": case.shifts, "boundary": boundary, "document_ids_BS": documents},
    }


def with_gradients(inputs: Inputs, function: Callable[..., Tensor]) -> dict[str, Tensor]:
    leaves = [inputs[name].detach().requires_grad_() for name in LEAVES]
    output = function(*leaves)
    found = torch.autograd.grad(output, leaves, inputs["gradient"])
    return dict(zip(NAMES, (output.detach(), *found), strict=True))


def by_backend(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """Empty memory holds NaN: torch fills it where results must repeat."""
    torch.use_deterministic_algorithms(True)
    try:
        return with_gradients(inputs, lambda *leaves: shift_mix(*leaves, **inputs["rest"], backend=backend))
    finally:
        torch.use_deterministic_algorithms(False)


def widened(inputs: Inputs) -> Inputs:
    return {name: each.double() if isinstance(each, Tensor) else each for name, each in inputs.items()}


def loop(inputs: Inputs) -> dict[str, Tensor]:
    """In float64, position after position."""
    shifts, boundary, documents = (inputs["rest"][name] for name in ("shifts", "boundary", "document_ids_BS"))

    def function(u_BSD: Tensor, a_X: Tensor, b_X: Tensor) -> Tensor:
        part = u_BSD.shape[2] // len(shifts)
        rows = [sum(each.sum() for each in (u_BSD, a_X, b_X)) * 0.0 + torch.zeros_like(u_BSD)]
        for row, u_SD in enumerate(u_BSD):
            ids = None if documents is None else documents[row].tolist()
            slices = [
                shifted(u_SD[:, h * part : (h + 1) * part], shift, boundary=boundary, documents=ids)
                for h, shift in enumerate(shifts)
            ]
            v_SD = torch.cat(slices, dim=1)
            of = [d * len(a_X) // u_BSD.shape[2] for d in range(u_BSD.shape[2])]
            place = torch.zeros_like(u_BSD)
            place[row] = 1.0
            rows.append(place * (a_X[of] * u_SD + b_X[of] * v_SD))
        return torch.stack(rows).sum(0)

    return with_gradients(widened(inputs), function)


@every_boundary
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_a_loop_over_positions(name: str, boundary: str, interpreted: Run) -> None:
    inputs = make_inputs(CASES[name], boundary)
    wanted = loop(inputs)
    assert_same(interpreted(by_backend, inputs, "triton"), wanted, tolerance=4e-6)
    for backend in ("torch", "reference"):
        assert_same(by_backend(widened(inputs), backend), wanted, tolerance=1e-13)


@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 70),
    width=st.integers(1, 4),
    shifts=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 30), min_size=1, max_size=5) | st.none(),
    boundary=st.sampled_from(BOUNDARIES),
    chunk=st.integers(1, 200),
)
def test_any_shape_in_any_number_of_blocks_equals_a_loop(
    interpreted: Run, rows: int, length: int, width: int, shifts: list[int], cuts: Any, boundary: str, chunk: int
) -> None:
    documents = None
    if cuts is not None:
        lengths = [*(cuts * length)[: next(n for n in range(length + 1) if sum((cuts * length)[:n]) >= length)]]
        lengths[-1] -= sum(lengths) - length
        documents = (tuple(lengths),) * rows
    case = Case(rows, length, width * len(shifts), len(shifts), tuple(shifts), documents)
    inputs = make_inputs(case, boundary)
    wanted = loop(inputs)
    assert_same(interpreted(by_backend, inputs, "triton"), wanted, tolerance=4e-6)
    before = cpu.CHUNK_ELEMENTS["cpu"]
    cpu.CHUNK_ELEMENTS["cpu"] = chunk
    try:
        assert_same(by_backend(widened(inputs), "torch"), wanted, tolerance=1e-13)
    finally:
        cpu.CHUNK_ELEMENTS["cpu"] = before


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_mixed_in_float32_and_rounded_once(dtype: torch.dtype, backend: str, interpreted: Run) -> None:
    """a u + b v = (1 + 2^-8) u - v leaves what a product that was rounded to 8 bits would lose."""
    inputs = make_inputs(Case(1, 40, 6, 1, (3,)), "zero", dtype)
    inputs |= {"u": torch.ones_like(inputs["u"]), "a": torch.tensor([1 + 2.0**-11]), "b": torch.tensor([-1.0])}
    call = interpreted if backend == "triton" else lambda function, *args: function(*args)
    found = call(by_backend, inputs, backend)
    assert {name: found[name].dtype for name in NAMES} == dict.fromkeys(NAMES[:2], dtype) | dict.fromkeys(
        "ab", torch.float32
    )
    assert (found["output"][:, 3:] == 2.0**-11).all()


@every_boundary
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_sums_of_sixteen_bits_are_those_of_float32(boundary: str, backend: str, interpreted: Run) -> None:
    inputs = make_inputs(Case(2, 40, 6, 2, (9,)), boundary, torch.float16)
    call = interpreted if backend == "triton" else lambda function, *args: function(*args)
    found, wanted = call(by_backend, inputs, backend), loop(inputs)
    assert_same({name: found[name] for name in "ab"}, {name: wanted[name] for name in "ab"}, tolerance=4e-6)
    assert_same({"u": found["u"]}, {"u": wanted["u"]}, tolerance=2.0**-11)


@every_boundary
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_of_sixteen_bits_are_mixed_in_float32_and_rounded_once(
    dtype: torch.dtype, backend: str, boundary: str
) -> None:
    """Each number, small or large, is within half of its last bit; 1e-5: what float32 leaves of sums that cancel."""
    inputs = make_inputs(Case(2, 40, 6, 2, (9,), documents=((40,), (25, 15))), boundary, dtype)
    inputs |= {name: inputs[name].to(dtype) for name in ("a", "b")}
    found, wanted = by_backend(inputs, backend), loop(inputs)
    for name in NAMES:
        assert found[name].dtype == dtype
        half_a_bit = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(found[name].double(), wanted[name], rtol=half_a_bit, atol=1e-5, msg=name)


@every_boundary
def test_a_step_with_factors_of_sixteen_bits_is_mixed_in_float32_and_rounded_once(boundary: str) -> None:
    inputs = make_inputs(Case(2, 11, 12, 3, (4,)), boundary, torch.bfloat16)
    inputs |= {name: inputs[name].bfloat16() for name in ("a", "b")}
    found, _ = decoded(inputs, "torch", torch.bfloat16)
    torch.testing.assert_close(found.double(), loop(inputs)["output"], rtol=2.0**-8, atol=1e-5)


def decoded(inputs: Inputs, backend: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Position after position with a ring: the outputs, and the ring at the end. u is a slice of wider rows."""
    (shift,), boundary = inputs["rest"]["shifts"], inputs["rest"]["boundary"]
    rows, length, width = inputs["u"].shape
    wide = torch.stack([inputs["u"].to(dtype), torch.full_like(inputs["u"], float("nan"), dtype=dtype)], dim=2).flatten(
        2
    )
    ring = torch.full((rows, shift, width), float("nan"), dtype=dtype)
    factors = (inputs[name].to(dtype) for name in ("a", "b"))
    a, b = factors
    parts = [
        shift_mix_step(wide[:, t, :width], ring, a, b, position=t, boundary=boundary, backend=backend)
        for t in range(length)
    ]
    return torch.stack(parts, dim=1), ring


@every_boundary
@pytest.mark.parametrize("shift", [1, 3, 8])
def test_a_step_after_another_equals_the_whole_row(boundary: str, shift: int, interpreted: Run) -> None:
    inputs = make_inputs(Case(2, 11, 300, 3, (shift,)), boundary)
    wanted = loop(inputs)["output"]
    for (found, ring), tolerance in (
        (interpreted(decoded, inputs, "triton"), 2e-6),
        (decoded(inputs, "torch", torch.float64), 1e-13),
    ):
        assert_same({"output": found}, {"output": wanted}, tolerance=tolerance)
        for position in range(11 - shift, 11):
            assert torch.equal(ring[:, position % shift], inputs["u"][:, position].to(ring.dtype))
