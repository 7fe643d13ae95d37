"""grouped_matmul by Triton as torch sees it: compiled, under autocast, with gradients left out; and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.grouped_matmul import choose_backend, grouped_matmul
from tests.kernels.routes import ALL, Case, Inputs, assert_same, compute, inputs_of, loop

Interpreted = Callable[..., Any]


def compile_whole() -> dict[str, Tensor]:
    """Output and gradients of a compiled function; fullgraph raises where the graph would break."""
    torch._dynamo.reset()
    case = Case((7, 1, 13, 0, 17), 12, 20, **ALL, activation="relu", gate_side="after")
    inputs = inputs_of(case)
    compiled = torch.compile(grouped_matmul, backend="aot_eager", fullgraph=True)
    return compute(case, inputs, "triton", compiled)


def test_torch_compile_keeps_it_in_one_graph_with_the_same_numbers(interpreted: Interpreted) -> None:
    case = Case((7, 1, 13, 0, 17), 12, 20, **ALL, activation="relu", gate_side="after")
    assert_same(interpreted(compile_whole), loop(case, inputs_of(case)))


def launches_of_a_backward_pass(*names: str) -> list[str]:
    """The kernels that run where these of the three inputs need gradients."""
    from tests.kernels.memory import recorded_launches

    given = inputs_of(Case((3, 0, 5), 8, 12, **ALL, gate_side="after"))
    for name in names:
        given[name].requires_grad_()
    output = grouped_matmul(
        given["rows"],
        given["weights"],
        offsets_G=torch.tensor([3, 3, 8], dtype=torch.int32),
        backend="triton",
        row_index_C=given["row_index"],
        gates_C=given["gates"],
        output_index_C=given["output_index"],
        num_outputs=7,
    )
    with recorded_launches() as launches:
        output.backward(given["gradient"])
    return [launch.kernel for launch in launches]


@pytest.mark.parametrize(
    ("names", "kernels"),
    [
        (("rows",), ["multiply", "sum_kernel"]),
        (("weights",), ["weight_gradient"]),
        (("gates",), ["multiply"]),
        (("rows", "weights", "gates"), ["multiply", "sum_kernel", "weight_gradient"]),
    ],
)
def test_a_gradient_that_nobody_needs_is_not_computed(
    interpreted: Interpreted, names: tuple[str, ...], kernels: list[str]
) -> None:
    assert interpreted(launches_of_a_backward_pass, *names) == kernels


def check_the_operation() -> None:
    """torch's own check of a custom operation: schema, fake tensors, autograd registration."""
    from kernels.grouped_matmul.kernel import backward, forward

    given = inputs_of(Case((3, 0, 5), 8, 12, **ALL, gate_side="after", dtype="bfloat16"))
    leaves = [given[name].requires_grad_() for name in ("rows", "weights", "gates")]
    offsets = torch.tensor([3, 3, 8], dtype=torch.int32)
    args = (*leaves, offsets, given["row_index"], given["output_index"], 7, False, False)
    torch.library.opcheck(forward, args)
    plain = [leaf.detach() for leaf in leaves]
    for needs in ((True, True, True), (False, True, False), (False, False, True)):
        args = (given["gradient"], *plain, offsets, given["row_index"], given["output_index"], False, False, *needs)
        torch.library.opcheck(backward, args, test_utils=("test_schema", "test_faketensor"))


def test_torch_finds_nothing_wrong_with_the_operation(interpreted: Interpreted) -> None:
    interpreted(check_the_operation)


def test_autocast_computes_in_bf16_with_fp32_gradients_at_fp32_leaves(interpreted: Interpreted) -> None:
    case = Case((7, 1, 13, 0, 17), 12, 20, **ALL, gate_side="before")
    found = interpreted(compute_under_autocast, case, inputs_of(case))
    assert found["output"].dtype == torch.bfloat16
    assert {found[name].dtype for name in found if name != "output"} == {torch.float32}
    assert_same(found, loop(case, inputs_of(case)), tolerance=6e-2)


def compute_under_autocast(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return compute(case, inputs | {"gradient": inputs["gradient"].bfloat16()}, "triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, "computes on a GPU, got tensors on cpu: move them to a GPU, or choose another backend"),
        ({"row_index_C": torch.zeros(5, dtype=torch.int64)}, r"got \[1, 3, 6\] for 5 rows"),
        (
            {"row_index_C": torch.zeros(6)},
            r"row_index_C must be \[6\], torch.int32 or torch.int64, on cpu: .* torch.float32",
        ),
        ({"row_index_C": torch.tensor([0, 1, 2, 3, 4, 6])}, r"row_index_C must be in \[0, 6\), got 0 to 6"),
        (
            {"output_index_C": torch.tensor([0, 1, 2, -1, 4, 5]), "num_outputs": 6},
            r"output_index_C must be in \[0, 6\), got -1 to 5",
        ),
        ({"gates_C": torch.ones(6).double()}, r"gates_C must be \[6\], torch.float32, on cpu: .* torch.float64"),
        ({"gates_C": torch.ones(5)}, r"gates_C must be \[6\].* got \[5\]"),
        ({"num_outputs": 3}, "must be given together, got no index and num_outputs 3"),
        (
            {"output_index_C": torch.zeros(6, dtype=torch.int64)},
            "must be given together, got an index and num_outputs None",
        ),
        ({"activation": "gelu"}, "activation must be one of none, relu, got 'gelu'"),
        ({"gate_side": "left"}, "gate_side must be one of before, after, got 'left'"),
    ],
)
def test_bad_routes_are_one_sentence_with_the_remedy(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"offsets_G": torch.tensor([1, 3, 6], dtype=torch.int32), "backend": "reference"} | change
    with pytest.raises(ValueError, match=message):
        grouped_matmul(torch.ones(6, 8), torch.ones(3, 8, 4), **call)


def test_triton_is_chosen_by_name_only_and_refused_without_a_gpu() -> None:
    with pytest.raises(ValueError, match="computes on a GPU, got tensors on cpu"):
        choose_backend("triton", device="cpu", dtype=torch.float32, widths=[128])
    with pytest.raises(ValueError, match=r"computes in .* got torch\.float64"):
        choose_backend("triton", device="cuda", dtype=torch.float64, widths=[128])
    assert choose_backend("triton", device="cuda", dtype=torch.bfloat16, widths=[412]) == "triton"
    assert choose_backend("auto", device="cuda", dtype=torch.bfloat16, widths=[128]) == "torch"
