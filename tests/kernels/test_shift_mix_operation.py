"""shift_mix as operations: their bytes, what is saved, torch.compile, and what they refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.shift_mix import candidates, shift_mix, shift_mix_step, traffic
from kernels.shift_mix.traffic import Shape
from tests.kernels.compare import assert_same, compiled
from tests.kernels.memory import assert_touched, bytes_saved, launches_of
from tests.kernels.test_shift_mix import LEAVES, NAMES, Case, Inputs, by_backend, decoded, loop, make_inputs

Run = Callable[..., Any]
PLAIN = Case(2, 70, 130, 10, (5,))  # three blocks of positions, two of channels
PACKED = Case(2, 70, 130, 1, (5,), documents=((30, 40), (69, 1)))
OWN = Case(2, 40, 12, 3, (4, 8, 1))


def shape_of(case: Case) -> Shape:
    return Shape(
        batch=case.rows, length=case.length, width=case.width, factors=case.factors, itemsize=4,
        documents=case.documents is not None,
    )  # fmt: skip


@pytest.mark.parametrize("boundary", ["zero", "self", "clamp"])
@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=["one_document", "documents"])
def test_the_byte_model_is_what_the_kernels_touch_and_nothing_is_written_twice(
    case: Case, boundary: str, interpreted: Run
) -> None:
    found = interpreted(launches_of, by_backend, make_inputs(case, boundary), "triton")
    wanted = [*traffic.forward(shape_of(case)).values(), *traffic.backward(shape_of(case)).values()]
    assert [launch.kernel for launch in found] == ["mix_kernel", "backward_kernel"]
    assert_touched(found, wanted)


def test_slices_with_their_own_shifts_are_read_and_written_once_together(interpreted: Run) -> None:
    found = interpreted(launches_of, by_backend, make_inputs(OWN, "zero"), "triton")
    forward, backward = found[:3], found[3:]
    factors = 2 * 3 * traffic.FLOAT
    row = shape_of(OWN).row_bytes
    assert (sum(each.read for each in forward), sum(each.written for each in forward)) == (row + factors, row)
    assert sum(each.read for each in backward) == 2 * row + factors
    assert sum(each.written for each in backward) == row + shape_of(OWN).sum_bytes
    assert all(launch.asked_to_write == launch.written for launch in found)


def test_a_step_reads_and_writes_two_tokens_in_one_launch(interpreted: Run) -> None:
    inputs = make_inputs(Case(2, 6, 300, 3, (2,)), "zero")
    found = interpreted(launches_of, decoded, inputs, "triton")
    model = traffic.step(batch=2, width=300, factors=3, itemsize=4)
    assert len(found) == 6
    assert_touched(found[2:], [model] * 4)


def saved(inputs: Inputs, backend: str) -> int:
    """Without the factors."""
    leaves = [inputs[name].requires_grad_() for name in LEAVES]
    return bytes_saved(lambda: shift_mix(*leaves, **inputs["rest"], backend=backend), beside=leaves[1:])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_only_u_and_where_documents_begin_are_saved(backend: str, interpreted: Run) -> None:
    call = interpreted if backend == "triton" else lambda function, *args: function(*args)
    assert call(saved, make_inputs(PACKED, "zero"), backend) == traffic.saved(shape_of(PACKED))


def in_one_graph(inputs: Inputs) -> dict[str, Tensor]:
    leaves = {name: inputs[name] for name in LEAVES}
    return compiled(
        lambda *tensors: shift_mix(*tensors, **inputs["rest"], backend="triton"), leaves, inputs["gradient"]
    )


def test_compile_sees_one_graph_with_the_same_result(interpreted: Run) -> None:
    inputs = make_inputs(PACKED, "self")
    wanted = {name: 2.0 * each for name, each in loop(inputs).items()}
    assert_same(interpreted(in_one_graph, inputs), wanted, tolerance=1e-5)


def checked_by_torch(inputs: Inputs) -> str:
    from kernels.shift_mix.op import mix_op, step_op

    leaves = [inputs[name].requires_grad_() for name in LEAVES]
    mix = torch.library.opcheck(mix_op, (*leaves, None, [4, 8, 1], "zero"), raise_exception=False)
    u, ring, a, b = torch.randn(2, 6), torch.randn(2, 3, 6), torch.randn(2), torch.randn(2)
    tests = ("test_schema", "test_faketensor")
    step = torch.library.opcheck(step_op, (u, ring, a, b, 1, 2, "zero"), test_utils=tests, raise_exception=False)
    return f"{mix} {step}"


def test_torch_finds_nothing_wrong_with_the_operations(interpreted: Run) -> None:
    found = interpreted(checked_by_torch, make_inputs(OWN, "zero"))
    assert found.count("'SUCCESS'") == 6, found


def asked_for(inputs: Inputs, name: str, backend: str) -> dict[str, Tensor]:
    leaves = [inputs[each].requires_grad_(each == name) for each in LEAVES]
    shift_mix(*leaves, **inputs["rest"], backend=backend).backward(inputs["gradient"])
    return {each: leaf.grad for each, leaf in zip(LEAVES, leaves, strict=True) if leaf.grad is not None}


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", LEAVES)
def test_a_gradient_that_is_asked_for_alone_is_the_same(name: str, backend: str, interpreted: Run) -> None:
    call = interpreted if backend == "triton" else lambda function, *args: function(*args)
    inputs = make_inputs(OWN, "zero")
    assert_same(call(asked_for, inputs, name, backend), {name: loop(inputs)[name]}, tolerance=4e-6)


def with_other_strides(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    strided = {name: inputs[name].mT.contiguous().mT for name in ("u", "gradient")}
    every_second = {name: inputs[name].repeat_interleave(2)[::2] for name in ("a", "b")}
    return by_backend(inputs | strided | every_second, backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_strides_do_not_matter_and_two_runs_are_bit_equal(backend: str, interpreted: Run) -> None:
    call = interpreted if backend == "triton" else lambda function, *args: function(*args)
    inputs = make_inputs(PACKED, "clamp")
    found, wanted = call(with_other_strides, inputs, backend), call(by_backend, inputs, backend)
    assert all(torch.equal(found[name], wanted[name]) for name in NAMES)


def refused(backend: str = "torch", **changes: Any) -> str:
    given = {"u": torch.zeros(2, 5, 6), "a": torch.ones(3), "b": torch.ones(3), "shifts": (2,)} | changes
    try:
        return str(shift_mix(given.pop("u"), given.pop("a"), given.pop("b"), **given, backend=backend))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"a": torch.ones(2)}, ("a [2], b [3]", "u [2, 5, 6]", "one factor for each slice")),
        ({"a": torch.ones(4), "b": torch.ones(4)}, ("divides the width", "[4]", "[2, 5, 6]")),
        ({"b": torch.ones(3).double()}, ("one dtype", "torch.float64", "cast")),
        ({"shifts": (0,)}, ("at least 1", "(0,)", "[2, 5, 6]")),
        ({"shifts": (1, 2, 4, 8)}, ("the number of shifts divides", "(1, 2, 4, 8)")),
        ({"shifts": (2.0,)}, ("whole numbers", "(2.0,)")),
        ({"shifts": (True,)}, ("whole numbers", "(True,)")),
        ({"shifts": 2}, ("a tuple of whole numbers", "[2, 5, 6] and 2")),
        ({"u": torch.tensor(1.0)}, ("[B, S, D]", "got []")),
        ({"u": torch.zeros(2, 5, 0)}, ("a D of at least 1", "got [2, 5, 0]")),
        ({"u": torch.zeros(2, 5, 6).long()}, ("must be floats", "u torch.int64", "cast")),
        ({"a": torch.ones(3).int(), "b": torch.ones(3).int()}, ("must be floats", "a and b torch.int32", "cast")),
        ({"boundary": "roll"}, ("zero, self, clamp", "'roll'")),
        ({"document_ids_BS": torch.zeros(2, 4).int()}, ("[2, 4]", "[2, 5, 6]", "an id for each position")),
        ({"document_ids_BS": [[0] * 5] * 2}, ("must be a tensor [B, S]", "got list")),
        ({"document_ids_BS": torch.zeros(2, 5)}, ("whole numbers", "torch.float32")),
        ({"document_ids_BS": torch.zeros(2, 5).bool()}, ("whole numbers", "torch.bool")),
        ({"document_ids_BS": torch.zeros(2, 5, device="meta").int()}, ("on its device", "on meta and u [2, 5, 6] on cpu")),
        ({"backend": "cuda"}, ("triton, torch, reference", "'cuda'")),
        ({"backend": "triton"}, ("shift_mix: the triton backend computes on a GPU",)),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_both_values(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    message = refused(**changes)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "ring",
    [
        torch.zeros(3, 4, 6),
        torch.zeros(2, 4, 5),
        torch.zeros(2, 0, 6),
        torch.zeros(2, 6),
        torch.zeros(2, 4, 6, 1),
        torch.zeros(2, 6, 4).mT,
        torch.zeros(2, 4, 6).double(),
        torch.zeros(2, 4, 6, device="meta"),
    ],
    ids=["rows", "width", "no_place", "two_dimensions", "four_dimensions", "strides", "dtype", "device"],
)
def test_a_ring_that_is_not_of_these_rows_is_refused(ring: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"sizes, dtype and device, got \[2, 6\] of torch.float32 on cpu .* use the ring of these rows"
    ):
        shift_mix_step(torch.zeros(2, 6), ring, torch.ones(1), torch.ones(1), position=0, backend="torch")


@pytest.mark.parametrize("position", [-1, True, 3.0, torch.tensor(3)], ids=str)
def test_a_position_that_is_no_whole_number_is_refused(position: Any) -> None:
    ones = torch.ones(1)
    with pytest.raises(
        ValueError, match=f"whole number from 0, got .*{position}.*: pass how many tokens were seen before"
    ):
        shift_mix_step(torch.zeros(2, 6), torch.zeros(2, 4, 6), ones, ones, position=position, backend="torch")


def test_whole_numbers_are_refused_in_a_step() -> None:
    u, ring, ones = torch.zeros(2, 6), torch.zeros(2, 4, 6), torch.ones(1)
    for given in ((u.int(), ring.int(), ones, ones), (u, ring, ones.int(), ones.int())):
        with pytest.raises(
            ValueError, match=r"u, a and b of shift_mix_step must be floats, got .*torch\.int32.*: cast them"
        ):
            shift_mix_step(*given, position=0, backend="torch")


def test_a_step_with_another_boundary_is_refused() -> None:
    ones = torch.ones(1)
    with pytest.raises(ValueError, match="boundary of shift_mix_step must be one of zero, self, clamp, got 'zeros'"):
        shift_mix_step(
            torch.zeros(2, 6), torch.zeros(2, 4, 6), ones, ones, position=0, boundary="zeros", backend="torch"
        )


def test_the_kernel_refuses_float64(interpreted: Run) -> None:
    assert "got torch.float64 and torch.float32: cast them" in interpreted(_refused_in_float64)


def _refused_in_float64() -> str:
    return refused("triton", u=torch.zeros(2, 5, 6).double())


def test_the_candidates_are_those_that_can_serve() -> None:
    assert candidates("cpu") == ("torch",)
    assert candidates("cuda") == ("triton", "torch")
