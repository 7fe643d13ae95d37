"""switchhead_project as two operations: their bytes, what they save, torch.compile, autocast, and what they refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.switchhead_project import traffic
from kernels.switchhead_project.traffic import Shape
from kernels.traffic import Traffic
from tests.kernels.compare import assert_same, compiled
from tests.kernels.memory import assert_touched, bytes_saved, launches_of, recorded_launches
from tests.kernels.test_switchhead_project import (
    FUNCTIONS,
    LEAVES,
    PARTS,
    Case,
    Inputs,
    by_backend,
    loop,
    make_inputs,
)

Run = Callable[..., Any]
SMALL = Case(70, 2, 3, 2, 70, 24)  # two tiles of tokens; the outputs have two of columns
OWN = ("values_kernel", "outputs_kernel")
OWN_LAUNCHES = {"values": ("values", "x", "gates"), "outputs": ("outputs", "y and gates")}


def shape_of(case: Case) -> Shape:
    return Shape(
        tokens=case.tokens, heads=case.heads, experts=case.experts, choices=case.choices, d_model=case.d_model,
        head_dim=case.head_dim, itemsize=4,
    )  # fmt: skip


@PARTS
def test_the_byte_model_is_what_the_kernels_touch_and_nothing_is_written_twice(part: str, interpreted: Run) -> None:
    found = interpreted(launches_of, by_backend, make_inputs(SMALL, part), part)
    shape = shape_of(SMALL)
    wanted = models_of(shape, part)
    own = [launch for launch in found if launch.kernel in OWN]
    assert_touched(own, [wanted.pop(name) for name in OWN_LAUNCHES[part]])
    assert_touched([launch for launch in found if launch.kernel not in OWN], wanted.values())


def models_of(shape: Shape, part: str) -> dict[str, Traffic]:
    """Of both passes, by launch."""
    passes = traffic.passes(shape, values=part == "values")
    return {**passes["forward"].launches, **passes["backward"].launches}


def test_more_columns_than_a_tile_has_cost_one_more_set_of_dot_products(interpreted: Run) -> None:
    case = Case(9, 2, 3, 2, 20, 100)
    found = interpreted(launches_of, by_backend, make_inputs(case, "values"), "values")
    model = traffic.values_backward(shape_of(case))["gates"]
    (gates,) = (launch for launch in found[1:] if launch.kernel == "values_kernel")
    assert (gates.read, gates.written) == (model.read, 2 * model.written)


def saved(inputs: Inputs, part: str) -> int:
    """Without the weights."""
    return bytes_saved(lambda: call(inputs, part, require=LEAVES), beside=[inputs["weights"]])


def call(inputs: Inputs, part: str, *, require: tuple[str, ...] = (), backend: str = "triton") -> Tensor:
    leaves = [inputs[name].requires_grad_(name in require) for name in LEAVES]
    return FUNCTIONS[part](*leaves, experts_THK=inputs["experts"], backend=backend)


@PARTS
def test_only_the_inputs_are_saved(part: str, interpreted: Run) -> None:
    found = interpreted(saved, make_inputs(SMALL, part), part)
    assert found == traffic.saved(shape_of(SMALL), values=part == "values")


@PARTS
@pytest.mark.parametrize("name", traffic.SHAPES)
def test_the_megabytes_and_multiplications_that_the_docstring_tells(name: str, part: str) -> None:
    """Closed forms per token and per matrix, beside the sums over launches."""
    shape, values = traffic.SHAPES[name], part == "values"
    n, g = shape.heads * shape.choices, shape.heads * shape.experts
    wide, narrow, small = 2 * shape.d_model, 2 * shape.heads * shape.head_dim, 12 * n
    weights = 2 * g * shape.d_model * shape.head_dim
    per_token = 3 * (wide + narrow + small) if values else 2 * (wide + small) + 3 * narrow + 4 * n
    own = shape.tokens * per_token + (2 + values) * weights
    launches = models_of(shape, part)
    assert sum(launches[each].total for each in OWN_LAUNCHES[part]) == own
    chosen = 2e-9 * shape.tokens * n * shape.d_model * shape.head_dim
    dense = (2 + values) * chosen * shape.experts / shape.choices
    assert traffic.flops(shape, backward=True) / 1e9 == pytest.approx(3 * chosen)
    assert traffic.flops(shape, backward=True, of=part) / 1e9 == pytest.approx(dense + chosen)
    megabytes = own / 1e6, traffic.by_copies(shape, values=values) / 1e6
    line = " | ".join(f"{number:,.0f}" for number in (*megabytes, dense, 2 * chosen))
    told = (traffic.__doc__ or "").splitlines()
    assert any(each.endswith(f"| {'V' if values else 'O'} | {line} |") for each in told), line
    bound = traffic.forward_bound(shape) + traffic.backward_bound(shape, values=values)
    assert bound < sum(each.total for each in launches.values())


def in_one_graph(inputs: Inputs, part: str) -> dict[str, Tensor]:
    leaves = {name: inputs[name] for name in LEAVES}
    options: dict[str, Any] = {"experts_THK": inputs["experts"], "backend": "triton"}
    return compiled(lambda *tensors: FUNCTIONS[part](*tensors, **options), leaves, inputs["gradient"])


@PARTS
def test_compile_sees_one_graph_with_the_same_result(part: str, interpreted: Run) -> None:
    inputs = make_inputs(Case(9, 2, 3, 2, 20, 12), part)
    wanted = {name: 2.0 * tensor for name, tensor in loop(inputs, part).items()}
    assert_same(interpreted(in_one_graph, inputs, part), wanted)


def checked_by_torch(inputs: Inputs, part: str) -> list[str]:
    from kernels.switchhead_project import op

    leaves = [inputs[name].requires_grad_() for name in LEAVES]
    forward, backward = getattr(op, f"{part}_op"), getattr(op, f"{part}_backward_op")
    found = [torch.library.opcheck(forward, (*leaves, inputs["experts"]), raise_exception=False)]
    plain = [leaf.detach() for leaf in leaves]
    for needs in ((True, True, True), (False, True, False), (False, False, True)):
        arguments = (inputs["gradient"], *plain, inputs["experts"], *needs)
        tests = ("test_schema", "test_faketensor")
        found.append(torch.library.opcheck(backward, arguments, test_utils=tests, raise_exception=False))
    return [str(each) for each in found]


@PARTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_finds_nothing_wrong_with_the_operations(dtype: torch.dtype, part: str, interpreted: Run) -> None:
    found = interpreted(checked_by_torch, make_inputs(Case(9, 2, 3, 2, 20, 12), part, dtype), part)
    assert [text.count("'SUCCESS'") for text in found] == [4, 2, 2, 2], found


def under_autocast(inputs: Inputs, part: str, backend: str) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.float16):
        return by_backend(inputs, part, backend)


@PARTS
@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_autocast_computes_in_its_dtype_with_fp32_gradients_at_fp32_leaves(
    backend: str, part: str, interpreted: Run
) -> None:
    inputs = make_inputs(Case(9, 2, 3, 2, 20, 12), part)
    found = interpreted(under_autocast, inputs | {"gradient": inputs["gradient"].half()}, part, backend)
    assert found["output"].dtype == torch.float16
    assert all(found[name].dtype == torch.float32 for name in LEAVES)
    assert_same(found, loop(inputs, part), tolerance=5e-3)


def one_gradient(inputs: Inputs, part: str, name: str) -> tuple[Tensor, list[str], int]:
    """The gradient, the kernels that ran for it, and the bytes that they wrote."""
    output = call(inputs, part, require=(name,))
    with recorded_launches() as launches:
        (found,) = torch.autograd.grad(output, [inputs[name]], inputs["gradient"])
    return found, [launch.kernel for launch in launches], sum(launch.written for launch in launches)


@pytest.mark.parametrize(
    ("part", "name", "kernels"),
    [
        ("values", "rows", ["outputs_kernel"]),
        ("values", "gates", ["values_kernel"]),
        ("outputs", "rows", ["values_kernel"]),
        ("outputs", "gates", ["values_kernel"]),
    ],
)
def test_one_gradient_alone_is_the_same_and_nothing_else_is_computed(
    part: str, name: str, kernels: list[str], interpreted: Run
) -> None:
    inputs = make_inputs(Case(9, 2, 3, 2, 20, 12), part)
    found, launched, written = interpreted(one_gradient, inputs, part, name)
    torch.testing.assert_close(found.double(), loop(inputs, part)[name], rtol=1e-5, atol=1e-5)
    assert launched == kernels
    assert written == found.nbytes


@PARTS
def test_the_gradient_of_the_weights_alone_needs_neither_kernel(part: str, interpreted: Run) -> None:
    inputs = make_inputs(Case(9, 2, 3, 2, 20, 12), part)
    found, launched, _ = interpreted(one_gradient, inputs, part, "weights")
    torch.testing.assert_close(found.double(), loop(inputs, part)["weights"], rtol=1e-5, atol=1e-5)
    assert not set(launched) & set(OWN)
    assert found.is_contiguous()


NINE = Case(9, 2, 3, 2, 20, 12)
TWICE = torch.zeros(9, 2, 2, dtype=torch.int64)
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("values", {"rows": torch.ones(9, 21)}, r"x \[T, D\] and weights \[G, D, C\] must agree, .* got \[9, 21\] and weights \[6, 20, 12\]"),
    ("outputs", {"rows": torch.ones(9, 24)}, r"y \[T, H, C\] and weights \[G, C, D\] must agree, .* got \[9, 24\]"),
    ("values", {"weights": torch.ones(6, 20, 0)}, r"weights \[6, 20, 0\]: transpose or reshape"),
    ("values", {"weights": torch.ones(6, 20, 12).half()}, "one dtype outside autocast, got torch.float32 and torch.float16"),
    ("values", {"weights": torch.ones(6, 20, 12, device="meta")}, "on one device, got cpu and meta"),
    ("values", {"gates": torch.ones(8, 2, 2)}, r"gates must be \[T, H, K\] .* got gates \[8, 2, 2\] for rows \[9, 20\]"),
    ("outputs", {"gates": torch.ones(9, 3, 2)}, r"got gates \[9, 3, 2\] for rows \[9, 2, 12\]"),
    ("values", {"gates": torch.ones(9, 4, 2)}, r"H must divide the number of matrices, .* weights \[6, 20, 12\]"),
    ("values", {"gates": torch.ones(9, 2)}, r"got gates \[9, 2\]"),
    ("values", {"gates": torch.ones(9, 2, 4)}, r"got 3 experts and gates \[9, 2, 4\]: choose fewer"),
    ("values", {"gates": torch.ones(9, 2, 2).half()}, r"gates must be \[9, 2, 2\] of torch.float32 on cpu, got .* torch.float16"),
    ("values", {"experts": TWICE.float()}, r"experts must be \[9, 2, 2\] of torch.int32 or torch.int64 on cpu"),
    ("values", {"experts": TWICE[:8]}, r"got \[8, 2, 2\] of torch.int64"),
    ("values", {"experts": TWICE + torch.tensor([2, 3])}, r"experts must be in \[0, 3\), got 2 to 3: pass the expert within"),
    ("outputs", {"experts": TWICE + torch.tensor([-1, 0])}, r"experts must be in \[0, 3\), got -1 to 0"),
    ("outputs", {"experts": TWICE}, "experts must be distinct for one token and head"),
    ("values", {"backend": "cuda"}, "backend of project_values must be one of triton, torch, reference, got 'cuda'"),
    ("outputs", {"backend": "triton"}, "project_outputs: the triton backend computes on a GPU, got tensors on cpu"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "change", "message"), BAD)
def test_bad_input_is_one_sentence_with_the_remedy(part: str, change: dict[str, Any], message: str) -> None:
    backend = change.get("backend", "reference")
    inputs = make_inputs(NINE, part) | {name: value for name, value in change.items() if name != "backend"}
    with pytest.raises(ValueError, match=message) as caught:
        call(inputs, part, backend=backend)
    assert "\n" not in str(caught.value)


def refused(inputs: Inputs, part: str) -> str:
    try:
        call(inputs, part)
    except ValueError as error:
        return str(error)
    return "nothing"


@PARTS
def test_float64_is_refused_by_the_kernel_and_served_by_the_others(part: str, interpreted: Run) -> None:
    inputs = make_inputs(NINE, part, torch.float64)
    assert "got torch.float64: cast rows and weights" in interpreted(refused, inputs, part)
    for backend in ("torch", "reference"):
        found = by_backend(inputs, part, backend)
        assert found["output"].dtype == torch.float64
        wanted = loop(inputs, part)
        torch.testing.assert_close(found["gates"], wanted["gates"].float())
        assert_same(found, wanted | {"gates": found["gates"]}, tolerance=1e-12)
