"""The rows of a product-key table: where each lies, how tokens are routed to them, what their owner computes, what is reported.

Used by pkm.py and peer.py between the choice of pairs (product_keys.py) and the dispatcher. A table (parameters.Table) is split over
ranks by contiguous ranges of rows, and may be split by equal ranges of columns. The owner's sums run over chunks of the routed copies,
forward and backward, so that no (copies, width) temporary is larger than CHUNK_ELEMENTS and nothing wider than a number per copy is
saved for the backward pass. Later fused kernels replace `weighted_rows`, `neurons` and `partial_products`; their names and arguments
stay.

Shape letters: T tokens, H heads, K picks, J sub-keys of a half (the papers' n), D model width, R received rows, C routed copies held
here, L local rows of the table, X columns of it held here (D if all), P output rows, W ranks of the expert group.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from model.dispatch import LocalPlan, Routing
from model.parameters import Table
from model.product_keys import PairChoice
from model.router import RouterReport

CHUNK_ELEMENTS = 2**24  # 64 MiB of float32


def table_rows(first: Tensor, second: Tensor, *, num_keys: int) -> Tensor:
    """Row of the pair (a, b) of sub-keys: ((a + b) mod n) n + a, so each diagonal is one range of n rows.

    A head's picks share few first and few second sub-keys, so ranges along either would load the ranks unevenly: 1.19 max/mean on
    8 ranks against 1.008 for diagonals (specs of arXiv 2407.04153, section 3.4).
    """
    return (first + second) % num_keys * num_keys + first


def table_routing(rows_THK: Tensor, gates_THK: Tensor | None, table: Table) -> Routing:
    """Reads the token and writes the token: the picks of all its heads are its choices; what two heads pick counts twice.

    gates_THK None: the dispatcher's `combine` gets them.
    """
    tokens_T = torch.arange(rows_THK.shape[0], device=rows_THK.device)
    return Routing(
        gates_NK=None if gates_THK is None else gates_THK.flatten(1),
        expert_ids_NK=rows_THK.flatten(1),
        source_row_N=tokens_T,
        output_row_N=tokens_T,
        num_rows=len(tokens_T),
        num_outputs=len(tokens_T),
        bank=table,
    )


def weighted_rows(table_LD: Tensor, plan: LocalPlan) -> Tensor:
    """sum over copies of gate * value (PKM, arXiv 1907.05242). Gives (P, D)."""
    dtype = _autocast_dtype(table_LD.device.type) or table_LD.dtype
    return _WeightedRows.apply(table_LD, plan.gates_C, plan).to(dtype)


def neurons(
    rows_RD: Tensor, up_LD: Tensor, down_LD: Tensor, plan: LocalPlan, *, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """sum over copies of gate * activation(row . up) * down: experts of one neuron (PEER, arXiv 2407.04153). Gives (P, D).

    Sums in float32 at least. Under autocast the rows are rounded to its dtype, as they are when they travel, and so is the result.
    """
    dtype = _autocast_dtype(rows_RD.device.type) or rows_RD.dtype
    return _Neurons.apply(rows_RD.to(dtype), up_LD, down_LD, plan.gates_C, plan, activation).to(dtype)


def partial_products(rows_RX: Tensor, up_LX: Tensor, plan: LocalPlan) -> Tensor:
    """row . up of each copy over the columns held here: what the ranks sum before PEER's activation. Gives z_C, float32 at least.

    The gates of the plan are not used. Under autocast the rows are rounded to its dtype, as they are when they travel.
    """
    dtype = _autocast_dtype(rows_RX.device.type) or rows_RX.dtype
    return _PartialProducts.apply(rows_RX.to(dtype), up_LX, plan)


@torch.no_grad()
def table_reports(
    choice: PairChoice, gates_THK: Tensor, rows_THK: Tensor, table: Table, *, num_keys: int
) -> dict[str, RouterReport]:
    """What is counted of a table: too large for a count per row on every step, so per sub-key and per rank.

    "keys": 2 J sub-keys as two heads of J experts. probability_G is the share of the gates' sum, times the rows. The unevenness of
    arXiv 2407.04153 (log n^2 less the entropy of the shares, in nats) is then at least 2 log n less the sum of both halves'
    entropies, and a sub-key without a copy means n unused values. "ranks": the ranks of the expert group as experts.
    """
    keys_XC = torch.stack([choice.first_THK.flatten(), choice.second_THK.flatten() + num_keys])
    ranks_XC = (rows_THK.flatten() // table.num_local)[None]
    gates_C, num_tokens = gates_THK.flatten(), len(rows_THK)
    return {
        "keys": _shares(keys_XC, gates_C, 2 * num_keys, num_tokens),
        "ranks": _shares(ranks_XC, gates_C, table.num_ranks, num_tokens),
    }


def _shares(groups_XC: Tensor, gates_C: Tensor, num_groups: int, num_tokens: int) -> RouterReport:
    """Counts, and shares of the gates' sum: each row of groups_XC has the sum 1 per token. All gates zero: shares of the copies."""
    gates_C = gates_C + (gates_C.sum() == 0)
    gates_C = gates_C * (num_tokens / gates_C.sum().clamp_min(torch.finfo(gates_C.dtype).tiny))
    empty_G, each_C = gates_C.new_zeros(num_groups), torch.ones_like(gates_C)
    count_G, share_G = (
        empty_G.index_add(0, groups_XC.flatten(), values_C.repeat(len(groups_XC))) for values_C in (each_C, gates_C)
    )
    return RouterReport(count_G, share_G, gates_C.new_tensor(float(num_tokens)))


class _WeightedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_LD: Tensor, gates_C: Tensor, plan: LocalPlan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(table_LD, gates_C)
        sums_PD = _zeros(plan.num_outputs, table_LD)
        for part, row_c in _chunks(plan, table_LD):
            sums_PD.index_add_(0, plan.output_index_C[part], gates_C[part, None] * _read(table_LD, row_c))
        return sums_PD

    @staticmethod
    def backward(ctx: Any, gradient_PD: Tensor) -> tuple[Tensor, Tensor, None]:
        (table_LD, gates_C), plan = ctx.saved_tensors, ctx.plan
        of_table_LD, of_gates_C = _zeros(len(table_LD), table_LD), torch.empty_like(gates_C)
        for part, row_c in _chunks(plan, table_LD):
            gradient_cD = gradient_PD[plan.output_index_C[part]]
            of_gates_C[part] = (gradient_cD * _read(table_LD, row_c)).sum(1)
            of_table_LD.index_add_(0, row_c, gates_C[part, None] * gradient_cD)
        return of_table_LD.to(table_LD.dtype), of_gates_C, None


class _PartialProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RX: Tensor, up_LX: Tensor, plan: LocalPlan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(rows_RX, up_LX)
        z_C = up_LX.new_empty(len(plan.row_index_C), dtype=_sum_dtype(up_LX))
        for part, row_c in _chunks(plan, up_LX):
            z_C[part] = (rows_RX[plan.row_index_C[part]] * _read(up_LX, row_c)).sum(1)
        return z_C

    @staticmethod
    def backward(ctx: Any, gradient_C: Tensor) -> tuple[Tensor, Tensor, None]:
        (rows_RX, up_LX), plan = ctx.saved_tensors, ctx.plan
        of_rows_RX, of_up_LX = (_zeros(num_rows, up_LX) for num_rows in (len(rows_RX), len(up_LX)))
        for part, row_c in _chunks(plan, up_LX):
            row_index_c, gradient_c1 = plan.row_index_C[part], gradient_C[part, None]
            of_up_LX.index_add_(0, row_c, gradient_c1 * rows_RX[row_index_c])
            of_rows_RX.index_add_(0, row_index_c, gradient_c1 * _read(up_LX, row_c))
        return of_rows_RX.to(rows_RX.dtype), of_up_LX.to(up_LX.dtype), None


class _Neurons(torch.autograd.Function):
    """Saves u . x of each copy; the rows of both tables are read again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        up_LD: Tensor,
        down_LD: Tensor,
        gates_C: Tensor,
        plan: LocalPlan,
        activation: Callable[[Tensor], Tensor],
    ) -> Tensor:
        sums_PD, hidden_C = _zeros(plan.num_outputs, up_LD), torch.empty_like(gates_C)
        for part, row_c in _chunks(plan, up_LD):
            hidden_c = (rows_RD[plan.row_index_C[part]] * _read(up_LD, row_c)).sum(1)
            weight_c = gates_C[part] * activation(hidden_c)
            sums_PD.index_add_(0, plan.output_index_C[part], weight_c[:, None] * _read(down_LD, row_c))
            hidden_C[part] = hidden_c
        ctx.plan, ctx.activation = plan, activation
        ctx.save_for_backward(rows_RD, up_LD, down_LD, gates_C, hidden_C)
        return sums_PD

    @staticmethod
    def backward(ctx: Any, gradient_PD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        (rows_RD, up_LD, down_LD, gates_C, hidden_C), plan = ctx.saved_tensors, ctx.plan
        with torch.enable_grad():
            leaf_C = hidden_C.detach().requires_grad_()
            active_C = ctx.activation(leaf_C)
            (slope_C,) = torch.autograd.grad(active_C.sum(), leaf_C)
        active_C = active_C.detach()
        of_rows_RD, of_up_LD, of_down_LD = (_zeros(len(values), up_LD) for values in (rows_RD, up_LD, down_LD))
        of_gates_C = torch.zeros_like(gates_C)
        for part, row_c in _chunks(plan, up_LD):
            gradient_cD = gradient_PD[plan.output_index_C[part]]
            through_c = (gradient_cD * _read(down_LD, row_c)).sum(1)
            of_gates_C[part] = active_C[part] * through_c
            of_hidden_cX = (gates_C[part] * slope_C[part] * through_c)[:, None]
            of_down_LD.index_add_(0, row_c, (gates_C[part] * active_C[part])[:, None] * gradient_cD)
            of_up_LD.index_add_(0, row_c, of_hidden_cX * rows_RD[plan.row_index_C[part]])
            of_rows_RD.index_add_(0, plan.row_index_C[part], of_hidden_cX * _read(up_LD, row_c))
        of_tables = of_up_LD.to(up_LD.dtype), of_down_LD.to(down_LD.dtype)
        return of_rows_RD.to(rows_RD.dtype), *of_tables, of_gates_C, None, None


def _chunks(plan: LocalPlan, table_LD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of the copies, and the local row of the table of each copy in them."""
    num_copies, size = len(plan.row_index_C), max(1, CHUNK_ELEMENTS // table_LD.shape[1])
    for first in range(0, num_copies, size):
        end = min(first + size, num_copies)
        copies_c = torch.arange(first, end, dtype=torch.int32, device=table_LD.device)
        yield slice(first, end), torch.searchsorted(plan.offsets_L, copies_c, right=True)


def _read(table_LD: Tensor, row_c: Tensor) -> Tensor:
    """Rows of a table as the sums take them: one that was gathered under autocast is narrower."""
    return table_LD[row_c].to(_sum_dtype(table_LD))


def _zeros(num_rows: int, like_LD: Tensor) -> Tensor:
    return like_LD.new_zeros(num_rows, like_LD.shape[1], dtype=_sum_dtype(like_LD))


def _sum_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
