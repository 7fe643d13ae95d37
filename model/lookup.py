"""The rows of a product-key table: where each lies, how tokens are routed to them, what their owner computes, what is reported.

Used by pkm.py and peer.py between the choice of pairs (product_keys.py) and the dispatcher. A table (parameters.Table) is split over
ranks by contiguous ranges of rows, and may be split by equal ranges of columns. The owner's sums are those of kernels/peer_experts and
kernels/embedding_bag, which keep nothing wider than a number per copy for the backward pass.

Shape letters: T tokens, H heads, K picks, J sub-keys of a half (the papers' n), D model width, R received rows, C routed copies held
here, L local rows of the table, X columns of it held here (D if all), P output rows, W ranks of the expert group.
"""

import torch
from torch import Tensor

from kernels.embedding_bag import embedding_bag
from kernels.peer_experts import peer_experts, peer_products
from kernels.tables.routes import TableRoutes
from model.dispatch import LocalPlan, Routing
from model.parameters import Table
from model.product_keys import PairChoice
from model.router import RouterReport


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


def weighted_rows(table_LD: Tensor, plan: LocalPlan, *, backend: str = "torch") -> Tensor:
    """sum over copies of gate * value (PKM, arXiv 1907.05242). Gives (P, D). backend: see kernels/embedding_bag."""
    gates_C = plan.as_they_came(plan.gates_C)
    return embedding_bag(table_LD, gates_C, routes=_routes(plan), backend=backend)


def neurons(
    rows_RD: Tensor,
    up_LD: Tensor,
    down_LD: Tensor,
    plan: LocalPlan,
    *,
    activation: str,
    backend: str = "torch",
) -> Tensor:
    """sum over copies of gate * activation(row . up) * down: experts of one neuron (PEER, arXiv 2407.04153). Gives (P, D).

    Sums in float32 at least. Under autocast the rows are rounded to its dtype, as they are when they travel, and so is the result.
    activation: "gelu" or "relu". backend: see kernels/peer_experts.
    """
    gates_C, routes = plan.as_they_came(plan.gates_C), _routes(plan, num_rows=len(rows_RD))
    return peer_experts(rows_RD, up_LD, down_LD, gates_C, routes=routes, activation=activation, backend=backend)


def partial_products(rows_RX: Tensor, up_LX: Tensor, plan: LocalPlan, *, backend: str = "torch") -> Tensor:
    """row . up of each copy over the columns held here: what the ranks sum before PEER's activation. Gives z_C, float32 at least.

    The gates of the plan are not used. Under autocast the rows are rounded to its dtype, as they are when they travel.
    """
    z_C = peer_products(rows_RX, up_LX, routes=_routes(plan, num_rows=len(rows_RX)), backend=backend)
    return plan.as_sorted(z_C)


def _routes(plan: LocalPlan, *, num_rows: int | None = None) -> TableRoutes:
    """num_rows None: nothing is read but the table, and the output rows stand for the received ones."""
    assert plan.sorting is not None
    came, order_C = plan.sorting.came, plan.sorting.routes.order_C
    rows = (came.output_C, plan.num_outputs) if num_rows is None else (came.row_C, num_rows)
    return TableRoutes.of(
        came.group_C, rows[0], came.output_C, num_rows=rows[1], num_outputs=plan.num_outputs, order_C=order_C
    )


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
