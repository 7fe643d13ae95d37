"""What routed copies go through at the owner of their experts, against loops; and the identity of the gates' gradient."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.switchhead_project import project_outputs, project_values
from model.context import hash_with, keep_channels, token_hashes
from model.dispatch import LocalArriving, LocalExchange, LocalPlan, Routing
from model.experts import DENSE, gate_then_project, gated_mlp, hidden_factors, project_then_gate
from model.parameters import ExpertBank
from tests.model.build import context, normal

GROUP_SIZES = [3, 0, 4]
ROW_OF_COPY = [0, 2, 1, 1, 1, 0, 3]
OUTPUT_OF_COPY = [4, 4, 0, 1, 4, 0, 1]  # outputs 2 and 3 get nothing
GROUP_OF_COPY = [group for group, size in enumerate(GROUP_SIZES) for _ in range(size)]


def plan(gates_C: Tensor, *, num_copies: int = 7) -> LocalPlan:
    return LocalPlan(
        row_index_C=torch.tensor(ROW_OF_COPY[:num_copies], dtype=torch.int64),
        output_index_C=torch.tensor(OUTPUT_OF_COPY[:num_copies], dtype=torch.int64),
        gates_C=gates_C,
        offsets_L=torch.tensor(GROUP_SIZES).cumsum(0).clamp(max=num_copies).int(),
        num_outputs=5,
    )


def expert(name: str, x: Tensor, weights: list[Tensor]) -> Tensor:
    return torch.relu(x @ weights[0]) @ weights[1] if name == "gated_mlp" else x @ weights[0]


CASES = pytest.mark.parametrize(
    ("name", "shapes"),
    [("project_then_gate", [(6, 4)]), ("gate_then_project", [(6, 9)]), ("gated_mlp", [(6, 5), (5, 6)])],
)
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "project_then_gate": project_then_gate,
    "gate_then_project": gate_then_project,
    "gated_mlp": gated_mlp,
}


@CASES
def test_the_result_is_the_sum_over_copies_of_gate_times_the_experts_output(name: str, shapes):
    """Also where the function applies the gate before the matmul or on the hidden activations."""
    rows, gates = normal(4, 6), normal(7, seed=1)
    weights = [normal(3, *shape, seed=2 + i) for i, shape in enumerate(shapes)]
    expected = torch.zeros(5, shapes[-1][1], dtype=torch.float64)
    for copy, (row, output, group) in enumerate(zip(ROW_OF_COPY, OUTPUT_OF_COPY, GROUP_OF_COPY, strict=True)):
        expected[output] += gates[copy] * expert(name, rows[row], [weight[group] for weight in weights])
    found = FUNCTIONS[name](rows, *weights, plan(gates), backend="reference")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@CASES
def test_the_gradient_of_a_gate_is_its_experts_output_dotted_with_the_outputs_gradient(name: str, shapes):
    """dgate = (x W) . dY = x . (W dY)."""
    rows, gates = normal(4, 6), normal(7, seed=1).requires_grad_()
    weights = [normal(3, *shape, seed=2 + i) for i, shape in enumerate(shapes)]
    gradient = normal(5, shapes[-1][1], seed=9)
    FUNCTIONS[name](rows, *weights, plan(gates), backend="reference").backward(gradient)
    assert gates.grad is not None
    for copy, (row, output, group) in enumerate(zip(ROW_OF_COPY, OUTPUT_OF_COPY, GROUP_OF_COPY, strict=True)):
        own = [weight[group] for weight in weights]
        forward = expert(name, rows[row], own) @ gradient[output]
        inner = torch.relu(rows[row] @ own[0]) if name == "gated_mlp" else rows[row]
        backward = inner @ (own[-1] @ gradient[output])
        torch.testing.assert_close(gates.grad[copy], forward, rtol=0, atol=1e-13)
        torch.testing.assert_close(gates.grad[copy], backward, rtol=0, atol=1e-13)


@CASES
def test_an_owner_that_receives_nothing_answers_zeros_that_stay_in_the_graph(name: str, shapes):
    rows, gates = normal(0, 6).requires_grad_(), normal(0).requires_grad_()
    weights = [normal(3, *shape).requires_grad_() for shape in shapes]
    found = FUNCTIONS[name](rows, *weights, plan(gates, num_copies=0), backend="reference")
    assert torch.equal(found, torch.zeros(5, shapes[-1][1], dtype=torch.float64))
    found.sum().backward()
    assert rows.grad is not None
    assert gates.grad is not None
    for weight in weights:
        assert weight.grad is not None
        assert torch.equal(weight.grad, torch.zeros_like(weight))


@CASES
def test_copies_of_one_output_row_are_summed_in_float32_and_rounded_once(name: str, shapes, monkeypatch):
    """Looks at the dtype, because a CPU's index_add sums bfloat16 in float32 by itself: the values could not tell."""
    dtypes = []
    index_add = Tensor.index_add

    def recorded(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
        dtypes.append(self.dtype)
        return index_add(self, *arguments, **options)

    monkeypatch.setattr(Tensor, "index_add", recorded)
    copies = torch.zeros(300, dtype=torch.int64)
    many = LocalPlan(copies, copies, torch.ones(300), torch.tensor([300], dtype=torch.int32), 1)
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    found = FUNCTIONS[name](one, *[one[None] for _ in shapes], many, backend="reference")
    assert dtypes == [torch.float32]
    assert found.dtype == torch.bfloat16
    assert found.item() == 300


def test_factors_of_the_hidden_activations_are_applied_copy_by_copy():
    rows, gates, factors = normal(4, 6), normal(7, seed=1), normal(7, 5, seed=8)
    up, down = normal(3, 6, 5, seed=2), normal(3, 5, 6, seed=3)
    expected = torch.zeros(5, 6, dtype=torch.float64)
    for copy, (row, output, group) in enumerate(zip(ROW_OF_COPY, OUTPUT_OF_COPY, GROUP_OF_COPY, strict=True)):
        expected[output] += gates[copy] * (((rows[row] @ up[group]).clamp(min=0) * factors[copy]) @ down[group])
    found = gated_mlp(rows, up, down, plan(gates), backend="reference", factors_CF=factors)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("first_group", [0, 3])
def test_the_mask_of_a_copy_is_that_of_its_token_and_its_global_expert(first_group: int):
    """The same copies held by a rank whose experts begin at 3: other experts, so other masks, and a token's experts differ."""
    hashes = token_hashes(context([2, 2**35]), 2, site="mlp_expert_hidden").flatten()
    copies = replace(
        plan(torch.ones(7)), hashes_C=hashes[torch.tensor(ROW_OF_COPY)], global_ids=lambda ids: ids + first_group
    )
    found = hidden_factors(copies, channels=6, probability=0.25)
    for copy, (row, group) in enumerate(zip(ROW_OF_COPY, GROUP_OF_COPY, strict=True)):
        expert = hash_with(hashes[row], torch.tensor(first_group + group))
        expected = keep_channels(expert, 6, probability=0.25).float() / 0.75
        assert torch.equal(found[copy], expected)


def test_an_owner_that_receives_nothing_has_no_factors():
    nothing = replace(plan(torch.ones(0), num_copies=0), hashes_C=torch.zeros(0, dtype=torch.int64))
    found = hidden_factors(nothing, channels=6, probability=0.5)
    assert found.shape == (0, 6)


@pytest.mark.parametrize(("name", "widths"), [("project_then_gate", (6, 4)), ("gate_then_project", (4, 6))])
def test_all_experts_of_a_head_give_what_the_chosen_ones_give_also_from_a_padded_bank(monkeypatch, name, widths):
    """7 tokens, 2 heads of 3 experts; the bank of 6 groups has come with 2 of padding, which nobody may read."""
    for kernel in (project_values, project_outputs):
        by_torch = partial(kernel, backend="torch")
        monkeypatch.setattr(
            f"model.experts.{kernel.__name__}",
            lambda *tensors, backend, by_torch=by_torch, **options: by_torch(*tensors, **options),
        )
    tokens, pairs = torch.arange(14) // 2, torch.arange(14)
    to_heads = name == "project_then_gate"
    (rows, num_rows), (outputs, num_outputs) = ((tokens, 7), (pairs, 14)) if to_heads else ((pairs, 14), (tokens, 7))
    ids_NK = torch.rand(14, 3).topk(2).indices + 3 * (pairs % 2)[:, None]
    routing = Routing(torch.rand(14, 2), ids_NK, rows, outputs, num_rows, num_outputs, ExpertBank(6, {}))
    weight_GXY = torch.cat([torch.randn(6, *widths), torch.full((2, *widths), torch.nan)])
    arriving = LocalArriving(LocalExchange.of(routing, num_groups=8), torch.randn(num_rows, widths[0]))
    chosen, of_all = (
        arriving.combine(lambda x, plan, how=how: FUNCTIONS[name](x, weight_GXY, plan, **how), None)
        for how in ({"backend": "loop"}, {"backend": DENSE, "num_heads": 2})
    )
    assert chosen.any()
    torch.testing.assert_close(of_all, chosen, rtol=1e-5, atol=1e-5)


def test_all_experts_of_a_head_are_refused_where_some_copies_are_elsewhere():
    with pytest.raises(ValueError, match=r"parallel\.exchange to weights"):
        project_then_gate(torch.randn(4, 6), torch.randn(3, 6, 4), plan(torch.ones(7)), backend=DENSE)
