"""What routed rows go through at the owner of their experts: gather, grouped_matmul, gate, sum per output row.

Called by switchhead.py and sigma_moe.py between dispatch and combine. The gate is applied on the narrow side of the matmul, where it
is cheapest, and the copies of one output row are summed here, before anything travels back. With the backend "triton" each function is
one call of a kernel; with "triton_dense" a projection is computed for all experts of a head, and what was not chosen counts as zero:
more products, and nothing written per copy. Which one: model/expert_choice.py.

Shape letters: R received rows, C routed copies held here, L local groups, F expert width, P output rows, X and Y any widths.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.expert_mlp import expert_mlp
from kernels.grouped_matmul import grouped_matmul
from kernels.sum_copies import RowCopies
from kernels.switchhead_project import project_outputs, project_values
from model.context import hash_with, keep_channels
from model.dispatch import LocalPlan

DENSE = "triton_dense"


def project_then_gate(
    rows_RX: Tensor, weight_LXY: Tensor, plan: LocalPlan, *, backend: str, num_heads: int = 1
) -> Tensor:
    """sum over copies of gate * (row @ W[group]), gate after the matmul: for Y < X (SwitchHead's values). Gives (P, Y).

    num_heads: of SwitchHead, whose rows are tokens here and whose output rows are (token, head).
    """
    if backend == DENSE:
        gates_THK, experts_THK, weight_GXY = _dense(weight_LXY, plan, num_heads=num_heads)
        values_THY = project_values(rows_RX, weight_GXY, gates_THK, experts_THK=experts_THK, backend="triton")
        return values_THY.flatten(0, 1)
    if backend == "triton":
        return _by_kernel(rows_RX, weight_LXY, plan, gate_side="after")
    copies_CX = _copies(rows_RX, plan)
    projected_CY = grouped_matmul(copies_CX, weight_LXY, offsets_G=plan.offsets_L, backend=backend)
    return _sum_per_output(projected_CY * plan.gates_C[:, None], plan, dtype=projected_CY.dtype)


def gate_then_project(
    rows_RX: Tensor, weight_LXY: Tensor, plan: LocalPlan, *, backend: str, num_heads: int = 1
) -> Tensor:
    """sum over copies of (gate * row) @ W[group], gate before the matmul: for X < Y (SwitchHead's outputs). Gives (P, Y).

    num_heads: of SwitchHead, whose rows are (token, head) here and whose output rows are tokens.
    """
    if backend == DENSE:
        gates_THK, experts_THK, weight_GXY = _dense(weight_LXY, plan, num_heads=num_heads)
        rows_THX = rows_RX.view(-1, num_heads, rows_RX.shape[1])
        return project_outputs(rows_THX, weight_GXY, gates_THK, experts_THK=experts_THK, backend="triton")
    if backend == "triton":
        return _by_kernel(rows_RX, weight_LXY, plan, gate_side="before")
    copies_CX = _copies(rows_RX, plan)
    gated_CX = (copies_CX * plan.gates_C[:, None]).to(copies_CX.dtype)
    projected_CY = grouped_matmul(gated_CX, weight_LXY, offsets_G=plan.offsets_L, backend=backend)
    return _sum_per_output(projected_CY, plan, dtype=projected_CY.dtype)


def gated_mlp(
    rows_RD: Tensor,
    up_LDF: Tensor,
    down_LFD: Tensor,
    plan: LocalPlan,
    *,
    backend: str,
    factors_CF: Tensor | None = None,
    keep_hidden: bool = False,
) -> Tensor:
    """sum over copies of (gate * relu(row @ W1[group])) @ W2[group] (sigma-MoE, arXiv 2310.10837). Gives (P, D).

    factors_CF: of the hidden activations, see `hidden_factors`. keep_hidden: for the backward pass; see kernels/expert_mlp.
    """
    if backend == "triton":
        sums = _copies_to_sum(plan, num_rows=len(rows_RD))
        return expert_mlp(
            rows_RD,
            up_LDF,
            down_LFD,
            plan.gates_C,
            row_index_C=plan.row_index_C,
            output_index_C=plan.output_index_C,
            offsets_L=plan.offsets_L,
            num_outputs=plan.num_outputs,
            factors_CF=factors_CF,
            keep_hidden=keep_hidden,
            output_copies=sums.outputs,
            row_copies=sums.rows,
            backend=backend,
        )
    copies_CD = _copies(rows_RD, plan)
    hidden_CF = grouped_matmul(copies_CD, up_LDF, offsets_G=plan.offsets_L, backend=backend).relu()
    gated_CF = hidden_CF * plan.gates_C[:, None]
    if factors_CF is not None:
        gated_CF = gated_CF * factors_CF
    projected_CD = grouped_matmul(gated_CF.to(hidden_CF.dtype), down_LFD, offsets_G=plan.offsets_L, backend=backend)
    return _sum_per_output(projected_CD, plan, dtype=projected_CD.dtype)


def hidden_factors(plan: LocalPlan, *, channels: int, probability: float) -> Tensor:
    """float32 (C, channels): dropout of the copies' hidden activations, 0 with `probability` and 1 / (1 - probability) otherwise.

    A mask is a function of the token, whose hash (model/context.py) every copy brings, of the expert and of the channel: the same at
    whatever rank the expert lives.
    """
    assert plan.hashes_C is not None
    copies_C = torch.arange(len(plan.row_index_C), device=plan.offsets_L.device, dtype=plan.offsets_L.dtype)
    groups_C = plan.global_ids(torch.searchsorted(plan.offsets_L, copies_C, right=True))
    hashes_C = hash_with(plan.hashes_C, groups_C)
    return keep_channels(hashes_C, channels, probability=probability).float() / (1.0 - probability)


def _by_kernel(rows_RX: Tensor, weight_LXY: Tensor, plan: LocalPlan, *, gate_side: str) -> Tensor:
    """Gather, product, gate and sum in the kernels of grouped_matmul."""
    sums = _copies_to_sum(plan, num_rows=len(rows_RX))
    return grouped_matmul(
        rows_RX,
        weight_LXY,
        offsets_G=plan.offsets_L,
        backend="triton",
        row_index_C=plan.row_index_C,
        gates_C=plan.gates_C,
        gate_side=gate_side,
        output_index_C=plan.output_index_C,
        num_outputs=plan.num_outputs,
        output_copies=sums.outputs,
        row_copies=sums.rows,
    )


class _Sums(NamedTuple):
    outputs: RowCopies | None
    rows: RowCopies | None


def _copies_to_sum(plan: LocalPlan, *, num_rows: int) -> _Sums:
    """Which copies make an output row, and in the backward pass a row: made once for both passes, and once where they are the same."""
    outputs = plan.output_copies()
    one_space = plan.row_index_C is plan.output_index_C and num_rows == plan.num_outputs
    return _Sums(outputs, outputs if one_space else plan.row_copies(num_rows))


def _dense(weight_LXY: Tensor, plan: LocalPlan, *, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gates and experts of each token and head (T, H, K), and the weights without padding (H E, X, Y)."""
    if plan.whole is None:
        raise ValueError(
            f"the expert backend {DENSE} needs all experts on every rank, but some copies of this plan are elsewhere: set "
            "parallel.exchange to weights or model.expert_backend to triton"
        )
    num_choices = plan.whole.gates_NK.shape[1]
    num_experts = plan.whole.num_groups // num_heads
    first_group_H1 = torch.arange(num_heads, device=weight_LXY.device)[:, None] * num_experts
    experts_THK = plan.whole.expert_ids_NK.view(-1, num_heads, num_choices) - first_group_H1
    gates_THK = plan.whole.gates_NK.reshape(-1, num_heads, num_choices)
    return gates_THK, experts_THK, weight_LXY[: num_heads * num_experts]


def _copies(rows_RX: Tensor, plan: LocalPlan) -> Tensor:
    """The row of each copy (C, X)."""
    return _Copies.apply(rows_RX, plan.row_index_C)


class _Copies(torch.autograd.Function):
    """index_select, whose gradients are summed in float32 at least: under autocast the rows that arrive are narrower."""

    @staticmethod
    def forward(ctx: Any, rows_RX: Tensor, row_index_C: Tensor) -> Tensor:
        ctx.save_for_backward(row_index_C)
        ctx.num_rows = len(rows_RX)
        return rows_RX.index_select(0, row_index_C)

    @staticmethod
    def backward(ctx: Any, gradient_CX: Tensor) -> tuple[Tensor, None]:
        (row_index_C,) = ctx.saved_tensors
        sum_dtype = torch.promote_types(gradient_CX.dtype, torch.float32)
        sums_RX = gradient_CX.new_zeros(ctx.num_rows, gradient_CX.shape[1], dtype=sum_dtype)
        return sums_RX.index_add_(0, row_index_C, gradient_CX.to(sum_dtype)).to(gradient_CX.dtype), None


def _sum_per_output(copies_CY: Tensor, plan: LocalPlan, *, dtype: torch.dtype) -> Tensor:
    """Sums in float32 at least, then rounds once to `dtype`, the width that travels."""
    sum_dtype = torch.promote_types(copies_CY.dtype, torch.float32)
    sums_PY = copies_CY.new_zeros(plan.num_outputs, copies_CY.shape[1], dtype=sum_dtype)
    return sums_PY.index_add(0, plan.output_index_C, copies_CY.to(sum_dtype)).to(dtype)
