"""expert_mlp as an operation: its bytes, what it saves, torch.compile, autocast, and what it refuses."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.expert_mlp import expert_mlp, traffic
from kernels.expert_mlp.traffic import Shape
from tests.kernels.compare import assert_same, compiled
from tests.kernels.memory import Launch, assert_touched, bytes_saved, launches_of
from tests.kernels.test_expert_mlp import Case, by_kernel, by_reference, make_inputs

Run = Callable[..., Any]
INPUTS = ("rows", "up", "down", "gates")
SMALL = Case([9, 1, 23, 2], 20, 24, 11, 9, factors=True)
WIDE = Case([9, 1, 23, 2], 20, 72, 11, 9)  # F wider than a tile, in fp32


def inputs_that_use_everything(case: Case) -> dict[str, Any]:
    """Every row and every output has a copy."""
    inputs = make_inputs(case)
    copies_C = torch.arange(sum(case.sizes))
    return inputs | {"row_index_C": copies_C % case.num_rows, "output_index_C": copies_C % case.num_outputs}


def shape_of(case: Case) -> Shape:
    copies, groups = sum(case.sizes), len(case.sizes)
    return Shape(copies, case.num_rows, case.num_outputs, groups, case.d_model, case.expert_dim, itemsize=4)


def both_passes(inputs: dict[str, Any], keep_hidden: bool) -> list[Launch]:
    return launches_of(by_kernel, inputs, keep_hidden=keep_hidden)


@pytest.mark.parametrize("keep_hidden", [False, True], ids=["again", "kept"])
@pytest.mark.parametrize("case", [SMALL, WIDE], ids=["held", "F_wider_than_a_tile"])
def test_the_byte_model_is_what_the_kernels_touch_and_nothing_is_written_twice(
    case: Case, keep_hidden: bool, interpreted: Run
) -> None:
    found = interpreted(both_passes, inputs_that_use_everything(case), keep_hidden)
    options = {"held": case is SMALL, "keep_hidden": keep_hidden, "factors": case.factors}
    shape = shape_of(case)
    wanted = [*traffic.forward(shape, **options).values(), *traffic.backward(shape, **options).values()]
    # The gates' gradient comes in two blocks of F, which are added by torch: see traffic.backward.
    blocks = {} if case is SMALL else {"_backward_kernel": 4 * shape.copies}
    wanted = [
        replace(each, written=each.written + blocks.get(launch.kernel, 0))
        for launch, each in zip(found, wanted, strict=True)
    ]
    assert_touched(found, wanted)


def saved(inputs: dict[str, Any], keep_hidden: bool) -> int:
    """Without the weights."""
    leaves = {name: inputs[name].requires_grad_() for name in INPUTS}
    rest = {name: value for name, value in inputs.items() if name not in (*INPUTS, "gradient")}
    return bytes_saved(
        lambda: expert_mlp(*leaves.values(), **rest, backend="triton", keep_hidden=keep_hidden),
        beside=[leaves["up"], leaves["down"]],
    )


@pytest.mark.parametrize("keep_hidden", [False, True], ids=["again", "kept"])
def test_only_rows_gates_and_routes_are_saved_and_the_hidden_activations_if_asked(
    keep_hidden: bool, interpreted: Run
) -> None:
    found = interpreted(saved, make_inputs(SMALL), keep_hidden)
    assert found == traffic.saved(shape_of(SMALL), keep_hidden=keep_hidden, factors=True)


def test_the_megabytes_that_the_design_was_chosen_by() -> None:
    """Closed forms in numbers per copy and per row, beside the sums over launches; and what the docstring says."""
    for name, shape in (
        ("47M", Shape(65536, 16384, 16384, 16, 412, 128, 2)),
        ("262M", Shape(131072, 32768, 32768, 32, 1024, 128, 2)),
    ):
        c, t, d, f = shape.copies, shape.rows, shape.d_model, shape.expert_dim
        weights = 2 * shape.groups * d * f * 2
        wanted = {
            "held": 2 * (2 * c * d + 2 * t * d) + weights + 16 * c + 4 * t,
            "written": 2 * (2 * c * d + 2 * t * d + 2 * c * f) + weights + 16 * c + 4 * t,
            "lower": 2 * 2 * t * d + weights + 20 * c,
        }
        found = {
            "held": sum(each.total for each in traffic.forward(shape, held=True).values()),
            "written": sum(each.total for each in traffic.forward(shape, held=False).values()),
            "lower": traffic.forward_bound(shape),
        }
        told = {"47M": (139, 173, 32, 460, 247), "262M": (690, 757, 154, 4431, 1227)}[name]
        assert all(abs(found[key] - wanted[key]) <= 12 * shape.groups for key in wanted), (found, wanted)
        megabytes = [*found.values(), traffic.token_major(shape, tile=128), found["held"] + 2 * shape.wide_bytes]
        assert tuple(round(each / 1e6) for each in megabytes) == told
        assert all(f"{number:,}" in (traffic.__doc__ or "") for number in told)


def in_one_graph(inputs: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {name: inputs[name] for name in INPUTS}
    rest = {name: value for name, value in inputs.items() if name not in (*INPUTS, "gradient")}
    return compiled(
        lambda *tensors: expert_mlp(*tensors, **rest, backend="triton", keep_hidden=True), leaves, inputs["gradient"]
    )


def test_compile_sees_one_graph_with_the_same_result(interpreted: Run) -> None:
    found, wanted = interpreted(in_one_graph, make_inputs(SMALL)), by_reference(make_inputs(SMALL))
    assert_same(found, {name: 2.0 * tensor for name, tensor in wanted.items()})


def checked_by_torch(inputs: dict[str, Any]) -> str:
    from kernels.expert_mlp.op import forward_op
    from kernels.sum_copies import RowCopies

    copies = RowCopies.of(inputs["output_index_C"], num_rows=inputs["num_outputs"])
    of_rows = RowCopies.of(inputs["row_index_C"], num_rows=len(inputs["rows"]))
    leaves = [inputs[name].requires_grad_() for name in INPUTS]
    index = [inputs[name] for name in ("row_index_C", "output_index_C", "offsets_L", "factors_CF")]
    arguments = (*leaves, *index, copies.order_C, copies.ends_P, of_rows.order_C, of_rows.ends_P, True)
    return str(torch.library.opcheck(forward_op, arguments, raise_exception=False))


def test_torch_finds_nothing_wrong_with_the_operation(interpreted: Run) -> None:
    found = interpreted(checked_by_torch, make_inputs(SMALL))
    assert found.count("'SUCCESS'") == 4, found


def under_autocast(inputs: dict[str, Any]) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.float16):
        return by_kernel(inputs)


def test_autocast_computes_in_its_dtype_with_fp32_gradients_at_fp32_leaves(interpreted: Run) -> None:
    inputs = make_inputs(SMALL)
    found = interpreted(under_autocast, inputs | {"gradient": inputs["gradient"].half()})
    assert found["output"].dtype == torch.float16
    assert all(found[name].dtype == torch.float32 for name in INPUTS)
    assert_same(found, by_reference(inputs), tolerance=5e-3)


def asked_for(inputs: dict[str, Any], name: str) -> dict[str, Tensor]:
    rest = {key: value for key, value in inputs.items() if key not in (*INPUTS, "gradient")}
    leaves = [inputs[each].requires_grad_(each == name) for each in INPUTS]
    output = expert_mlp(*leaves, **rest, backend="triton")
    (found,) = torch.autograd.grad(output, [inputs[name]], inputs["gradient"])
    return {name: found}


@pytest.mark.parametrize("name", INPUTS)
def test_one_gradient_alone_is_the_same(name: str, interpreted: Run) -> None:
    inputs = make_inputs(SMALL)
    found, wanted = interpreted(asked_for, inputs, name)[name], by_reference(inputs)[name]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def with_one_index(inputs: dict[str, Any], prepared: bool) -> dict[str, Tensor]:
    from kernels.sum_copies import RowCopies

    index_C = inputs["row_index_C"]
    sizes = {"output_copies": inputs["num_outputs"], "row_copies": len(inputs["rows"])}
    copies = {name: RowCopies.of(index_C, num_rows=size) for name, size in sizes.items()} if prepared else {}
    return by_kernel(inputs | {"output_index_C": index_C}, **copies)


@pytest.mark.parametrize("prepared", [False, True], ids=["sorted_here", "sorted_before"])
@pytest.mark.parametrize("num_rows", [9, 11])
def test_one_index_for_rows_and_outputs_of_equal_or_other_number(
    num_rows: int, prepared: bool, interpreted: Run
) -> None:
    inputs = make_inputs(Case([9, 1, 23, 2], 20, 24, num_rows, 9))
    inputs["row_index_C"] %= 9
    wanted = by_reference(inputs | {"output_index_C": inputs["row_index_C"]})
    assert_same(interpreted(with_one_index, inputs, prepared), wanted)


BAD = [
    ({"rows": torch.ones(11, 21)}, r"must agree, .* got rows \[11, 21\], up \[4, 20, 24\] and down \[4, 24, 20\]"),
    ({"down": torch.ones(4, 20, 24)}, r"down \[4, 20, 24\]: transpose or reshape"),
    ({"up": torch.ones(4, 20, 24).half()}, "one dtype outside autocast, got torch.float32, torch.float16"),
    ({"up": torch.ones(4, 20, 24, device="meta")}, "on one device, got cpu, meta and cpu"),
    ({"gates": torch.ones(35).half()}, r"gates must be \[35\] of torch.float32 on cpu .* got \[35\] of torch.float16"),
    ({"row_index_C": torch.ones(34, dtype=torch.int64)}, r"row_index must be \[35\] of torch.int32 or .* got \[34\]"),
    ({"output_index_C": torch.ones(35)}, r"output_index must be \[35\] of torch.int32 or torch.int64"),
    ({"offsets_L": torch.tensor([9, 10, 33, 35])}, r"offsets must be \[4\] of torch.int32 .* torch.int64"),
    ({"factors_CF": torch.ones(35, 23)}, r"factors must be \[35, 24\]"),
    ({"factors_CF": torch.ones(35, 24).requires_grad_()}, "factors get no gradient"),
    ({"offsets_L": torch.tensor([9, 8, 33, 35], dtype=torch.int32)}, r"non-decreasing .* got \[9, 8, 33, 35\] for 35"),
    ({"row_index_C": torch.full((35,), 11)}, r"row_index must be in \[0, 11\), got 11 to 11"),
    ({"output_index_C": torch.full((35,), -1)}, r"output_index must be in \[0, 9\), got -1 to -1"),
    ({"backend": "cuda"}, "backend of expert_mlp must be one of triton, reference, got 'cuda'"),
    ({"backend": "triton"}, "the triton backend computes on a GPU, got tensors on cpu"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_one_sentence_with_the_remedy(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = make_inputs(SMALL) | {"backend": "reference"} | change
    call.pop("gradient")
    leaves = [call.pop(name) for name in INPUTS]
    with pytest.raises(ValueError, match=message):
        expert_mlp(*leaves, **call)


def refused(inputs: dict[str, Any]) -> str:
    try:
        by_kernel(inputs)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_float64_is_refused_by_the_kernel_and_served_by_the_reference(interpreted: Run) -> None:
    inputs = make_inputs(SMALL, torch.float64)
    assert "got torch.float64: cast the rows" in interpreted(refused, inputs)
    assert by_reference(inputs)["output"].dtype == torch.float64
