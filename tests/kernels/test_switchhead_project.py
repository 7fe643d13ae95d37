"""switchhead_project in Triton's interpreter and in plain torch: output and every gradient against a loop over tokens in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.grouped_matmul import grouped_matmul
from kernels.sort_routes import sort_routes
from kernels.switchhead_project import project_outputs, project_values
from tests.kernels.compare import assert_same

Run = Callable[..., Any]
Inputs = dict[str, Tensor]
LEAVES = ("rows", "weights", "gates")
NAMES = ("output", *LEAVES)
FUNCTIONS = {"values": project_values, "outputs": project_outputs}
PARTS = pytest.mark.parametrize("part", FUNCTIONS)


@dataclass(frozen=True)
class Case:
    """T tokens, H heads with E experts, K of them chosen, D and C. only: the experts that anyone chooses."""

    tokens: int
    heads: int
    experts: int
    choices: int
    d_model: int
    head_dim: int
    only: tuple[int, ...] | None = None


# In fp32 a tile has 64 tokens and 64 columns, 32 at a time.
CASES = {
    "T5_H2_E3_K2_D20_C12": Case(5, 2, 3, 2, 20, 12),
    "T67_H2_E2_K1_D70_C41_two_tiles_of_tokens": Case(67, 2, 2, 1, 70, 41),
    "T9_H3_E4_K4_D33_C17_all_are_chosen": Case(9, 3, 4, 4, 33, 17),
    "T7_H1_E5_K3_D412_C76_a_head_of_47M": Case(7, 1, 5, 3, 412, 76),
    "T33_H1_E8_K2_D16_C130_three_tiles_of_columns": Case(33, 1, 8, 2, 16, 130),
    "T6_H2_E3_K1_D24_C8_one_has_all": Case(6, 2, 3, 1, 24, 8, only=(1,)),
    "T40_H2_E5_K2_D8_C8_one_has_none": Case(40, 2, 5, 2, 8, 8, only=(0, 2, 3, 4)),
    "T1_H8_E4_K2_D9_C5_one_token": Case(1, 8, 4, 2, 9, 5),
    "T1_H1_E1_K1_D1_C1_scalars": Case(1, 1, 1, 1, 1, 1),
    "T0_H2_E3_K2_D8_C8_no_tokens": Case(0, 2, 3, 2, 8, 8),
}


def make_inputs(case: Case, part: str, dtype: torch.dtype = torch.float32) -> Inputs:
    """Gates of both signs, one of them 0. rows: x, or y for the outputs."""
    generator = torch.Generator().manual_seed(0)
    pairs = case.tokens, case.heads
    allowed = torch.tensor(case.only or range(case.experts))
    order_THE = torch.rand(*pairs, len(allowed), generator=generator).argsort(2)
    wide, narrow = (case.tokens, case.d_model), (*pairs, case.head_dim)
    rows, results = (wide, narrow) if part == "values" else (narrow, wide)
    gates = torch.randn(*pairs, case.choices, generator=generator)
    gates.view(-1)[1:2] = 0.0
    matrix = (case.heads * case.experts, rows[-1], results[-1])
    return {
        "rows": torch.randn(rows, generator=generator).to(dtype),
        "weights": (torch.randn(matrix, generator=generator) / rows[-1] ** 0.5).to(dtype),
        "gates": gates,
        "experts": allowed[order_THE[..., : case.choices]],
        "gradient": torch.randn(results, generator=generator).to(dtype),
    }


def with_gradients(inputs: Inputs, function: Callable[..., Tensor]) -> dict[str, Tensor]:
    """function(rows, weights, gates, experts), its output and gradients by name."""
    leaves = [inputs[name].detach().requires_grad_() for name in LEAVES]
    output = function(*leaves, inputs["experts"])
    found = torch.autograd.grad(output, leaves, inputs["gradient"])
    return dict(zip(NAMES, (output.detach(), *found), strict=True))


def by_backend(inputs: Inputs, part: str, backend: str = "triton") -> dict[str, Tensor]:
    """Empty memory holds NaN: torch fills it where results must repeat."""
    torch.use_deterministic_algorithms(True)
    try:
        return with_gradients(
            inputs, lambda *leaves: FUNCTIONS[part](*leaves[:3], experts_THK=leaves[3], backend=backend)
        )
    finally:
        torch.use_deterministic_algorithms(False)


def in_small_tiles(inputs: Inputs, part: str) -> dict[str, Tensor]:
    """The same with tiles of 16 x 16, 16 at a time, so that a small shape has many."""
    import kernels.switchhead_project.kernel as kernel

    before = kernel.FP32_TILES
    kernel.FP32_TILES = [kernel.Tiles(16, 16, 16, 4, 2)]
    try:
        return by_backend(inputs, part)
    finally:
        kernel.FP32_TILES = before


def loop(inputs: Inputs, part: str) -> dict[str, Tensor]:
    """The definition, choice after choice of each token, in float64."""

    def function(rows: Tensor, weights: Tensor, gates_THK: Tensor, experts_THK: Tensor) -> Tensor:
        (T, H, K), E = gates_THK.shape, len(weights) // gates_THK.shape[1]
        found = []
        for t in range(T):
            heads = []
            for h in range(H):
                row = rows[t] if part == "values" else rows[t, h]
                terms = [gates_THK[t, h, k] * (row @ weights[h * E + int(experts_THK[t, h, k])]) for k in range(K)]
                heads.append(torch.stack(terms).sum(0))
            found.append(torch.stack(heads) if part == "values" else torch.stack(heads).sum(0))
        empty = sum(leaf.sum() * 0.0 for leaf in (rows, weights, gates_THK)) + torch.zeros_like(inputs["gradient"])
        return torch.stack(found) if found else empty.double()

    wide = {name: tensor.double() for name, tensor in inputs.items() if name != "experts"}
    return with_gradients(inputs | wide, function)


@PARTS
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_a_loop_over_the_choices(name: str, part: str, interpreted: Run) -> None:
    inputs = make_inputs(CASES[name], part)
    wanted = loop(inputs, part)
    assert_same(interpreted(by_backend, inputs, part), wanted)
    for backend in ("torch", "reference"):
        assert_same(by_backend(inputs, part, backend), wanted)


@PARTS
@given(
    tokens=st.integers(0, 20),
    heads=st.integers(1, 2),
    experts=st.integers(1, 5),
    choices=st.integers(1, 5),
    d_model=st.integers(1, 40),
    head_dim=st.integers(1, 32),
)
def test_any_shape_in_any_number_of_tiles_equals_a_loop(interpreted: Run, part: str, **shape: Any) -> None:
    case = Case(**shape | {"choices": min(shape["choices"], shape["experts"])})
    inputs = make_inputs(case, part)
    assert_same(interpreted(in_small_tiles, inputs, part), loop(inputs, part))


def by_sorted_copies(inputs: Inputs) -> dict[str, Tensor]:
    """V by grouped_matmul, as the layer does it with experts on other ranks."""

    def function(x_TD: Tensor, weights_GDC: Tensor, gates_THK: Tensor, experts_THK: Tensor) -> Tensor:
        T, H, K = gates_THK.shape
        ids_THK = experts_THK + torch.arange(H)[:, None] * (len(weights_GDC) // H)
        routes = sort_routes(ids_THK, num_groups=len(weights_GDC))
        pair_C = routes.order_C // K
        sums = grouped_matmul(
            x_TD, weights_GDC, offsets_G=routes.offsets_G, backend="triton", row_index_C=pair_C // H,
            gates_C=gates_THK.flatten()[routes.order_C], output_index_C=pair_C, num_outputs=T * H,
        )  # fmt: skip
        return sums.view(T, H, -1)

    return with_gradients(inputs, function)


def test_values_are_those_of_the_routed_kernel_on_sorted_copies(interpreted: Run) -> None:
    inputs = make_inputs(Case(19, 2, 5, 3, 40, 24), "values")
    assert_same(interpreted(by_backend, inputs, "values"), interpreted(by_sorted_copies, inputs), tolerance=4e-6)


@PARTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_are_rounded_no_more_than_by_torch(dtype: torch.dtype, part: str, interpreted: Run) -> None:
    inputs = make_inputs(Case(40, 2, 3, 2, 100, 40), part, dtype)
    found, plain, wanted = (
        interpreted(by_backend, inputs, part), by_backend(inputs, part, "torch"), loop(inputs, part)
    )  # fmt: skip
    for name in NAMES:
        assert found[name].dtype == (torch.float32 if name == "gates" else dtype), name
        errors = [(each[name].double() - wanted[name]).norm().item() for each in (found, plain)]
        # Triton's interpreter cuts fp32 to bf16 and does not round it, which is 2 to 3 times as wrong.
        assert errors[0] <= (4.0 if dtype == torch.bfloat16 else 1.1) * errors[1], (name, errors)


@PARTS
@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_an_expert_that_nobody_chose_gets_exact_zeros(backend: str, part: str, interpreted: Run) -> None:
    inputs = make_inputs(Case(40, 2, 5, 2, 8, 8, only=(0, 2, 4)), part)
    run = interpreted if backend == "triton" else lambda function, *args: function(*args)
    weights = run(by_backend, inputs, part, backend)["weights"]
    assert [bool(each.any()) for each in weights] == [True, False, True, False, True] * 2


@PARTS
def test_nan_of_a_token_stays_in_that_token(part: str, interpreted: Run) -> None:
    inputs = make_inputs(Case(9, 2, 3, 2, 20, 12), part)
    inputs["rows"][3] = float("nan")
    found = interpreted(by_backend, inputs, part)
    assert found["output"][3].isnan().all()
    assert found["gates"][3].isnan().all()
    for name in ("output", "rows", "gates"):
        others = found[name][[0, 1, 2, 4, 5, 6, 7, 8]]
        assert not others.isnan().any(), name
    chosen = {h * 3 + int(e) for h in range(2) for e in inputs["experts"][3, h]}
    assert {g for g in range(6) if found["weights"][g].isnan().any()} == chosen


def test_an_expert_s_nan_reaches_only_the_values_of_those_who_chose_it(interpreted: Run) -> None:
    inputs = make_inputs(Case(20, 2, 4, 2, 20, 12), "values")
    inputs["weights"][4 + 1] = float("nan")  # expert 1 of head 1
    found = interpreted(by_backend, inputs, "values")
    chose_THK = inputs["experts"] == 1
    chose_THK[:, 0] = False
    assert torch.equal(found["output"].isnan().any(2), chose_THK.any(2))
    assert torch.equal(found["gates"].isnan(), chose_THK)


# Of weights that nobody chose, what is NaN at every token: the product that multiplies by the 0 of what was not chosen.
REACHED = {
    ("values", "triton"): {"rows"},
    ("values", "torch"): {"rows"},
    ("values", "reference"): set(),
    ("outputs", "triton"): {"output"},
    ("outputs", "torch"): {"output", "rows"},
    ("outputs", "reference"): set(),
}


@pytest.mark.parametrize(("part", "backend"), REACHED)
def test_weights_that_nobody_chose_and_that_are_not_finite_reach_what_the_docstrings_say(
    part: str, backend: str, interpreted: Run
) -> None:
    inputs = make_inputs(Case(20, 2, 4, 2, 20, 12, only=(0, 2, 3)), part)
    inputs["weights"][[1, 5]] = float("inf")
    run = interpreted if backend == "triton" else lambda function, *args: function(*args)
    found = run(by_backend, inputs, part, backend)
    assert {name for name in NAMES if not found[name].isfinite().all()} == REACHED[part, backend]
    assert all(found[name].isnan().all() for name in REACHED[part, backend])


@PARTS
def test_two_runs_are_bit_equal(part: str, interpreted: Run) -> None:
    inputs = make_inputs(Case(70, 2, 3, 2, 40, 70), part)
    first, second = (interpreted(by_backend, inputs, part) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_the_outputs_and_their_weights_gradient_are_made_of_the_rounded_product_of_gate_and_row(
    interpreted: Run,
) -> None:
    """(1 + 2**-9) squared is 1 + 2**-8 + 2**-18: fp16 rounds it to 1 + 2**-8, which is taken off again, by head 1 and by token 1."""
    near, rounded = 1.0 + 2.0**-9, 1.0 + 2.0**-8
    inputs = {
        "rows": torch.tensor([[near, rounded], [rounded, rounded]]).half()[..., None],
        "weights": torch.tensor([1.0, -1.0]).half()[:, None, None],
        "gates": torch.tensor([[near, 1.0], [1.0, 1.0]])[..., None],
        "experts": torch.zeros(2, 2, 1, dtype=torch.int64),
        "gradient": torch.tensor([[1.0], [-1.0]]).half(),
    }
    found = interpreted(by_backend, inputs, "outputs")
    assert not found["output"].any()
    assert not found["weights"].any()


def with_other_strides(inputs: Inputs, part: str) -> dict[str, Tensor]:
    strided = {name: inputs[name].mT.contiguous().mT for name in ("rows", "weights", "gradient")}
    every_second = {name: inputs[name].repeat_interleave(2, 2)[..., ::2] for name in ("gates", "experts")}
    return by_backend(inputs | strided | every_second | {"experts": every_second["experts"].int()}, part)


@PARTS
def test_strides_and_the_width_of_an_id_do_not_matter(part: str, interpreted: Run) -> None:
    inputs = make_inputs(Case(9, 2, 4, 2, 20, 24), part)
    found, wanted = interpreted(with_other_strides, inputs, part), interpreted(by_backend, inputs, part)
    assert all(torch.equal(found[name], wanted[name]) for name in NAMES)
