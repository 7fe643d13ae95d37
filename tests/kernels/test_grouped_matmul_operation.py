"""grouped_matmul by Triton as torch sees it: compiled, under autocast, with gradients left out; and what it refuses."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from kernels.grouped_matmul import choose_backend, grouped_matmul
from kernels.sum_copies import RowCopies
from tests.kernels.compare import assert_same
from tests.kernels.memory import launches_of
from tests.kernels.routes import ALL, Case, Inputs, compute, inputs_of, loop

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
    return [launch.kernel for launch in launches_of(output.backward, given["gradient"])]


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
    from kernels.grouped_matmul.op import backward, forward

    given = inputs_of(Case((3, 0, 5), 8, 12, **ALL, gate_side="after", dtype="bfloat16"))
    leaves = [given[name].requires_grad_() for name in ("rows", "weights", "gates")]
    offsets = torch.tensor([3, 3, 8], dtype=torch.int32)
    output, row = (RowCopies.of(given[name], num_rows=size) for name, size in (("output_index", 7), ("row_index", 9)))
    indices = (given["row_index"], given["output_index"])
    copies = (output.order_C, output.ends_P, row.order_C, row.ends_P)
    torch.library.opcheck(forward, (*leaves, offsets, *indices, *copies, False, False))
    plain = [leaf.detach() for leaf in leaves]
    for relu in (False, True):
        for needs in ((True, True, True), (True, True, False), (False, True, False), (False, False, True)):
            args = (given["gradient"], *plain, offsets, *indices, row.order_C, row.ends_P, relu, False, *needs)
            torch.library.opcheck(backward, args, test_utils=("test_schema", "test_faketensor"))


def test_torch_finds_nothing_wrong_with_the_operation(interpreted: Interpreted) -> None:
    interpreted(check_the_operation)


def sorts_of_a_pass(prepared: bool, one_index: bool, grad: bool) -> tuple[list[int], dict[str, Tensor]]:
    """How often RowCopies.of sorts in the forward and in the backward pass; what comes out."""
    case = Case((7, 1, 13, 0, 17), 12, 20, num_rows=7, num_outputs=7, gate_side="after")
    inputs = inputs_of(case)
    if one_index:
        inputs["output_index"] = inputs["row_index"]
    copies = {"output_copies": inputs["output_index"], "row_copies": inputs["row_index"]}
    options = {name: RowCopies.of(index, num_rows=7) for name, index in copies.items()} if prepared else {}
    of, counts = RowCopies.of, [0, 0]

    def counted(index_C: Tensor, *, num_rows: int) -> RowCopies:
        counts[backward] += 1
        return of(index_C, num_rows=num_rows)

    def matmul(rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal backward
        backward = 0
        output = grouped_matmul(rows if grad else rows.detach(), *args, **kwargs, **options)
        backward = 1
        return output if grad else output + 0.0 * rows.sum()

    backward = 0
    with patch.object(RowCopies, "of", counted):
        return counts, compute(case, inputs, "triton", matmul)


@pytest.mark.parametrize(
    ("prepared", "one_index", "grad", "sorts"),
    [(True, False, True, 0), (False, False, True, 2), (False, True, True, 1), (False, False, False, 1)],
    ids=["given", "two_indices", "one_index", "rows_without_gradient"],
)
def test_copies_are_sorted_once_for_both_passes_and_not_where_they_are_given(
    interpreted: Interpreted, prepared: bool, one_index: bool, grad: bool, sorts: int
) -> None:
    counts, found = interpreted(sorts_of_a_pass, prepared, one_index, grad)
    assert counts == [sorts, 0]
    case = Case((7, 1, 13, 0, 17), 12, 20, num_rows=7, num_outputs=7, gate_side="after")
    inputs = inputs_of(case)
    if one_index:
        inputs["output_index"] = inputs["row_index"]
    wanted = loop(case, inputs)
    assert_same(found, wanted if grad else wanted | {"gradient of rows": torch.zeros(7, 12).double()})


COPIES = RowCopies.of(torch.tensor([0, 1, 2, 3, 4, 5]), num_rows=6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_copies": COPIES}, r"row_copies must be .* none without an index, got order \[6\] and ends \[6\]"),
        (
            {"row_copies": COPIES, "row_index_C": torch.zeros(5, dtype=torch.int64)},
            r"order \[5\] and ends \[6\], got order \[6\] and ends \[6\]",
        ),
        (
            {"output_copies": COPIES, "output_index_C": torch.zeros(6, dtype=torch.int64), "num_outputs": 4},
            r"output_copies must be .* order \[6\] and ends \[4\], got order \[6\] and ends \[6\]: make them from",
        ),
    ],
)
def test_copies_of_another_index_are_refused(change: dict[str, Any], message: str) -> None:
    copies = len(change.get("row_index_C", range(6)))
    call = {"offsets_G": torch.tensor([1, 3, copies], dtype=torch.int32), "backend": "reference"} | change
    with pytest.raises(ValueError, match=message):
        grouped_matmul(torch.ones(6, 8), torch.ones(3, 8, 4), **call)


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
