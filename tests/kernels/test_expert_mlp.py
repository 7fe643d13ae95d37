"""expert_mlp in Triton's interpreter: output and every gradient against the reference and against model/experts.py."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.expert_mlp import expert_mlp
from model.dispatch import LocalPlan
from model.experts import gated_mlp
from tests.kernels.compare import assert_same

Run = Callable[..., Any]
NAMES = ("output", "rows", "up", "down", "gates")


@dataclass(frozen=True)
class Case:
    """Copies of each group, D, F, R, P; with factors or without."""

    sizes: list[int]
    d_model: int
    expert_dim: int
    num_rows: int
    num_outputs: int
    factors: bool = False


# In fp32 a tile has 32 copies and 64 columns: it holds F up to 64.
CASES = {
    "C64_D16_F16_L4_even": Case([16] * 4, 16, 16, 20, 16),
    "C65_D70_F64_L5_odd_two_tiles": Case([7, 1, 40, 0, 17], 70, 64, 20, 23, factors=True),
    "C65_D70_F100_L5_F_wider_than_a_tile": Case([7, 1, 40, 0, 17], 70, 100, 20, 23, factors=True),
    "C9_D412_F12_L4_first_and_last_empty": Case([0, 5, 4, 0], 412, 12, 5, 7),
    "C33_D20_F130_L4_one_has_all": Case([0, 0, 33, 0], 20, 130, 9, 9),
    "C6_D5_F3_L1": Case([6], 5, 3, 2, 40),
    "C1_D17_F9_L7_more_groups_than_copies": Case([0, 0, 0, 1, 0, 0, 0], 17, 9, 3, 2),
    "C0_D8_F8_L3_no_copies": Case([0, 0, 0], 8, 8, 4, 5),
    "C0_D8_F100_L3_no_copies_no_rows": Case([0, 0, 0], 8, 100, 0, 3),
    "C0_D8_F8_L2_no_outputs": Case([0, 0], 8, 8, 3, 0),
    "C12_D1_F1_L2_scalars": Case([5, 7], 1, 1, 4, 4, factors=True),
    "C37_D64_F64_L2_all_to_one_output": Case([30, 7], 64, 64, 6, 1),
    "C150_D16_F16_L2_groups_advance_together": Case([110, 40], 16, 16, 20, 16),
}


def make_inputs(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    num_groups, num_copies = len(case.sizes), sum(case.sizes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def index(size: int) -> Tensor:
        return torch.randint(0, max(size, 1), (num_copies,), generator=generator)

    keep_CF = torch.rand(num_copies, case.expert_dim, generator=generator) < 0.75
    return {
        "rows": normal(case.num_rows, case.d_model).to(dtype),
        "up": (normal(num_groups, case.d_model, case.expert_dim) / case.d_model**0.5).to(dtype),
        "down": (normal(num_groups, case.expert_dim, case.d_model) / case.expert_dim**0.5).to(dtype),
        "gates": normal(num_copies),
        "row_index_C": index(case.num_rows),
        "output_index_C": index(case.num_outputs),
        "offsets_L": torch.tensor(list(accumulate(case.sizes)), dtype=torch.int32),
        "num_outputs": case.num_outputs,
        "factors_CF": keep_CF.float() / 0.75 if case.factors else None,
        "gradient": normal(case.num_outputs, case.d_model).to(dtype),
    }


def with_gradients(inputs: dict[str, Any], function: Callable[..., Tensor]) -> dict[str, Tensor]:
    """function(rows, up, down, gates, the rest by name), its output and gradients by name. Empty memory holds NaN."""
    inputs = dict(inputs)
    torch.use_deterministic_algorithms(True)
    leaves = [inputs.pop(name).detach().requires_grad_() for name in ("rows", "up", "down", "gates")]
    gradient = inputs.pop("gradient")
    output = function(*leaves, **inputs)
    torch.use_deterministic_algorithms(False)
    found = torch.autograd.grad(output, leaves, gradient)
    return dict(zip(NAMES, (output.detach(), *found), strict=True))


def by_kernel(inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    torch.use_deterministic_algorithms(True)
    return with_gradients(inputs, lambda *args, **kwargs: expert_mlp(*args, **kwargs, backend="triton", **options))


def by_reference(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """In float64, the gates too."""
    wide = {key: inputs[key].double() for key in ("rows", "up", "down", "gates", "gradient")}
    function = reference_of_copies
    return with_gradients(inputs | wide, function)


def reference_of_copies(*args: Tensor, **kwargs: Any) -> Tensor:
    from kernels.expert_mlp.reference import reference

    return reference(*args, **kwargs)


def by_experts(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """model/experts.py on torch operations."""

    def function(
        rows: Tensor, up: Tensor, down: Tensor, gates: Tensor, *, factors_CF: Tensor | None, **plan: Any
    ) -> Tensor:
        return gated_mlp(rows, up, down, LocalPlan(gates_C=gates, **plan), backend="loop", factors_CF=factors_CF)

    return with_gradients(inputs, function)


@pytest.mark.parametrize("keep_hidden", [False, True], ids=["again", "kept"])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_the_reference_and_the_experts_of_the_model(
    name: str, keep_hidden: bool, interpreted: Run
) -> None:
    inputs = make_inputs(CASES[name])
    found = interpreted(run_kernel, inputs, {"keep_hidden": keep_hidden})
    assert_same(found, by_reference(inputs))
    assert_same(found, by_experts(inputs), tolerance=4e-6)


def run_kernel(inputs: dict[str, Any], options: dict[str, Any]) -> dict[str, Tensor]:
    return by_kernel(inputs, **options)


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    d_model=st.integers(1, 80),
    expert_dim=st.integers(1, 80),
    num_rows=st.integers(1, 30),
    num_outputs=st.integers(1, 30),
    factors=st.booleans(),
    keep_hidden=st.booleans(),
)
def test_any_shape_equals_the_reference(interpreted: Run, keep_hidden: bool, **shape: Any) -> None:
    inputs = make_inputs(Case(**shape))
    assert_same(interpreted(run_kernel, inputs, {"keep_hidden": keep_hidden}), by_reference(inputs))


def test_the_reference_is_a_dense_mlp_where_every_row_goes_to_every_expert() -> None:
    inputs = make_inputs(Case([5] * 3, 6, 4, 5, 5)) | {
        "row_index_C": torch.arange(5).repeat(3),
        "output_index_C": torch.arange(5).repeat(3),
        "gates": torch.full((15,), 0.5),
    }
    rows, up, down = (inputs[name].double().numpy() for name in ("rows", "up", "down"))
    hidden = (rows @ up.transpose(1, 0, 2).reshape(6, 12)).clip(min=0)
    expected = torch.from_numpy(0.5 * hidden @ down.reshape(12, 6))
    torch.testing.assert_close(by_reference(inputs)["output"], expected)


@pytest.mark.parametrize("expert_dim", [48, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_are_rounded_no_more_than_by_the_experts_of_the_model(
    dtype: torch.dtype, expert_dim: int, interpreted: Run
) -> None:
    inputs = make_inputs(Case([30, 0, 140], 70, expert_dim, 60, 50, factors=True), dtype)
    found, wanted, plain = interpreted(run_kernel, inputs, {}), by_reference(inputs), by_experts(inputs)
    for name in NAMES:
        assert found[name].dtype == (torch.float32 if name == "gates" else dtype), name
        errors = [(each[name].double() - wanted[name]).norm().item() for each in (found, plain)]
        # Triton's interpreter cuts fp32 to bf16 and does not round it, which is 2 to 3 times as wrong.
        assert errors[0] <= (4.0 if dtype == torch.bfloat16 else 1.1) * errors[1], (name, errors)


@pytest.mark.parametrize("expert_dim", [16, 80])
def test_nobody_s_outputs_rows_and_groups_get_exact_zeros(expert_dim: int, interpreted: Run) -> None:
    inputs = make_inputs(Case([3, 0, 4, 0], 20, expert_dim, 9, 9))
    inputs |= {"row_index_C": inputs["row_index_C"] % 4, "output_index_C": 2 + inputs["output_index_C"] % 4}
    found = interpreted(run_kernel, inputs, {})
    unused = {"output": [0, 1, 6, 7, 8], "rows": [4, 5, 6, 7, 8], "up": [1, 3], "down": [1, 3]}
    for name, places in unused.items():
        assert not found[name][places].any(), name


@pytest.mark.parametrize("expert_dim", [16, 80])
def test_nan_stays_in_its_group_its_row_and_its_output(expert_dim: int, interpreted: Run) -> None:
    inputs = make_inputs(Case([3, 2, 4], 20, expert_dim, 9, 9))
    inputs |= {"row_index_C": torch.arange(9), "output_index_C": torch.arange(9)}
    inputs["rows"][3] = float("nan")
    found = interpreted(run_kernel, inputs, {})
    assert found["output"][3].isnan().all()
    assert not found["output"][[0, 1, 2, 4, 5, 6, 7, 8]].isnan().any()
    assert not found["rows"][[0, 1, 2, 4, 5, 6, 7, 8]].isnan().any()
    assert not found["up"][[0, 2]].isnan().any()
    assert not found["down"][[0, 2]].isnan().any()
    assert found["gates"].isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("expert_dim", [32, 80])
def test_two_runs_are_bit_equal(expert_dim: int, interpreted: Run) -> None:
    inputs = make_inputs(Case([40, 0, 25], 70, expert_dim, 7, 5, factors=True))
    first, second = (interpreted(run_kernel, inputs, {}) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_copies_are_added_in_ascending_order(interpreted: Run) -> None:
    """1e8 + 1 - 1e8 in fp32 is 0, and 1 in any order that adds the 1 last."""
    inputs = make_inputs(Case([3], 16, 16, 3, 1)) | {"output_index_C": torch.zeros(3, dtype=torch.int64)}
    inputs |= {"up": torch.eye(16)[None], "down": torch.eye(16)[None], "gates": torch.tensor([1e8, 1.0, -1e8])}
    inputs |= {"rows": torch.ones(3, 16), "row_index_C": torch.arange(3)}
    assert not interpreted(run_kernel, inputs, {})["output"].any()
    inputs["gates"] = torch.tensor([1e8, -1e8, 1.0])
    assert (interpreted(run_kernel, inputs, {})["output"] == 1.0).all()


def run_with_other_strides(inputs: dict[str, Any]) -> dict[str, Tensor]:
    strided = {name: inputs[name].mT.contiguous().mT for name in ("rows", "up", "down")}
    twice = {name: inputs[name].repeat_interleave(2)[::2] for name in ("gates", "row_index_C", "output_index_C")}
    expanded = inputs["gradient"][:1, :1].expand_as(inputs["gradient"])
    short = {name: index.int() for name, index in twice.items() if name != "gates"}
    factors = {"factors_CF": inputs["factors_CF"].mT.contiguous().mT}
    return by_kernel(inputs | strided | twice | short | factors | {"gradient": expanded})


def test_strides_and_the_width_of_an_index_do_not_matter(interpreted: Run) -> None:
    inputs = make_inputs(Case([9, 4], 20, 24, 7, 6, factors=True))
    inputs["gradient"] = inputs["gradient"][:1, :1].expand_as(inputs["gradient"]).contiguous()
    found, wanted = interpreted(run_with_other_strides, inputs), interpreted(run_kernel, inputs, {})
    assert all(torch.equal(found[name], wanted[name]) for name in NAMES)
