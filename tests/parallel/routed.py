"""Two routed projections one after the other, as SwitchHead has them: by a dispatcher on some ranks, and by a loop in float64.

y[t] = sum over heads h and choices of gate * tanh(sum over choices of gate * x[t] V[e]) O[e]. V reads the token and writes (token, head), O
the reverse; both are planned together.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from model.dispatch import LocalPlan, Routing
from model.parameters import ExpertBank
from parallel.expert import AllToAllDispatcher
from parallel.ledger import Ledger
from parallel.peers import peers_of
from tests.parallel.two_steps import open_world

ROUTINGS = ["random", "one_expert", "one_rank", "none_to_last_rank", "ties"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a case. groups: of V and of O, chosen by each (token, head) out of all of them."""

    groups: int = 7  # padding on 2 and on 4 ranks
    choices: int = 2
    heads: int = 2
    d_model: int = 6
    head_dim: int = 3


@dataclass(frozen=True)
class Layout:
    """How the ranks of a pool share the work. exchange: tokens, weights, mixed (V's tokens, O's weights) or "mixed, V's weights"."""

    ep_size: int
    node_size: int | None = None
    exchange: str = "tokens"
    chunks: int = 1
    dtype: str = "float64"
    overlap: bool = True


@dataclass(frozen=True)
class Rows:
    """Tokens of one rank, each with heads * choices gates and experts, and the cotangent of the test."""

    x_TD: torch.Tensor
    gates_XK: torch.Tensor
    ids_XK: torch.Tensor
    cotangent_TD: torch.Tensor


def rows_of(rank: int, shape: Shape, *, routing: str, tokens: int, seed: int = 100) -> Rows:
    g = torch.Generator().manual_seed(seed + rank)
    scores = torch.rand(tokens * shape.heads, shape.groups, generator=g, dtype=torch.float64)
    favoured = {"one_expert": [3], "one_rank": [0, 1], "none_to_last_rank": [0, 1, 2, 3]}.get(routing, [])
    scores[:, [group for group in favoured if group < shape.groups]] += 2
    if routing == "ties":
        scores = torch.zeros_like(scores)
    ids = scores.sort(descending=True, stable=True).indices[:, : shape.choices]  # of equals the lowest
    if routing == "one_expert":  # every copy goes to one expert, and a row meets it with all of its gates
        ids = torch.full_like(ids, min(3, shape.groups - 1))
    return Rows(
        x_TD=torch.randn(tokens, shape.d_model, generator=g, dtype=torch.float64),
        gates_XK=torch.rand(tokens * shape.heads, shape.choices, generator=g, dtype=torch.float64),
        ids_XK=ids,
        cotangent_TD=torch.randn(tokens, shape.d_model, generator=g, dtype=torch.float64),
    )


def weights(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    value = torch.randn(shape.groups, shape.d_model, shape.head_dim, generator=g, dtype=torch.float64)
    return value, torch.randn(shape.groups, shape.head_dim, shape.d_model, generator=g, dtype=torch.float64)


def by_loop(rows: Rows, shape: Shape) -> dict[str, np.ndarray]:
    """One token after another, one copy after another."""
    value, output = (w.requires_grad_() for w in weights(shape))
    x, gates = rows.x_TD.clone().requires_grad_(), rows.gates_XK.clone().requires_grad_()
    y = []
    for t in range(x.shape[0]):
        total = torch.zeros(shape.d_model, dtype=torch.float64)
        for pair in range(t * shape.heads, (t + 1) * shape.heads):
            chosen = list(enumerate(rows.ids_XK[pair]))
            hidden = torch.stack([gates[pair, k] * (x[t] @ value[e]) for k, e in chosen]).sum(0)
            total = total + sum(gates[pair, k] * (hidden.tanh() @ output[e]) for k, e in chosen)
        y.append(total)
    result = torch.stack(y) if y else x * 0.0
    (result * rows.cotangent_TD).sum().backward()
    found = {"y": result, "dx": x.grad, "dgates": gates.grad if y else gates}
    found |= {"dvalue": value.grad if y else value * 0, "doutput": output.grad if y else output * 0}
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def routings(rows: Rows, shape: Shape, gates: torch.Tensor, banks: tuple[ExpertBank, ExpertBank]) -> list[Routing]:
    """V's and O's."""
    pair = torch.arange(len(rows.ids_XK))
    tokens, pairs = (pair // shape.heads, len(rows.x_TD)), (pair, len(pair))
    return [
        Routing(gates, rows.ids_XK, tokens[0], pairs[0], tokens[1], pairs[1], banks[0]),
        Routing(gates, rows.ids_XK, pairs[0], tokens[0], pairs[1], tokens[1], banks[1]),
    ]


def banks_of(shape: Shape, layout: Layout, ep_rank: int, dtype: torch.dtype) -> tuple[ExpertBank, ExpertBank]:
    banks = []
    for weight in weights(shape):
        bank = ExpertBank(shape.groups, {"weight": (tuple(weight.shape[1:]), lambda shape, g: torch.zeros(shape))})
        bank.shard(rank=ep_rank, size=layout.ep_size)
        bank.register_parameter("weight", torch.nn.Parameter(_slice(weight, bank).to(dtype)))
        banks.append(bank)
    return banks[0], banks[1]


def _slice(weight: torch.Tensor, bank: ExpertBank) -> torch.Tensor:
    padding = torch.full_like(weight[:1], torch.nan).expand(bank.num_ranks, -1, -1)  # that anyone read would show
    padded = torch.cat([weight, padding])
    return padded[bank.first_group : bank.first_group + bank.num_local].clone()


@dataclass(frozen=True)
class Place:
    """What a test asks of a mesh."""

    rank: int
    ep_rank: int
    ledger: Ledger


@contextmanager
def dispatcher_of(layout: Layout) -> Iterator[tuple[Place, AllToAllDispatcher]]:
    """The dispatcher of this rank of a pool; weights travel by its `gathered`, which the test fills.

    One expert group of all ranks on one node needs no group but the pool's own: opening a mesh costs 0.3 s.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    make = partial(AllToAllDispatcher, layer="test", chunks=layout.chunks, overlap=layout.overlap)
    if layout.ep_size == size and layout.node_size is None:
        assert dist.group.WORLD is not None
        peers = peers_of(dist.group.WORLD, node_size=size, ledger=Ledger())
        yield Place(rank, rank, peers.ledger), make(peers)
        return
    with open_world(layout.ep_size, node_size=layout.node_size) as mesh:
        levels = () if mesh.rail is None or mesh.node is None else (mesh.rail, mesh.node)
        yield Place(mesh.rank, mesh.ep_rank, mesh.ledger), make(mesh.experts, levels=levels)


def by_dispatcher(
    routing: str, tokens_of: list[int], layout: Layout, shape: Shape, seed: int = 100
) -> dict[str, np.ndarray]:
    """The same on this rank, in the layout's dtype; bfloat16 by autocast."""
    dtype = torch.float32 if layout.dtype == "bfloat16" else getattr(torch, layout.dtype)
    mixed = torch.autocast("cpu", torch.bfloat16) if layout.dtype == "bfloat16" else nullcontext()
    with dispatcher_of(layout) as (mesh, dispatcher), mixed:
        rows = rows_of(mesh.rank, shape, routing=routing, tokens=tokens_of[mesh.rank], seed=seed)
        banks = banks_of(shape, layout, mesh.ep_rank, dtype)
        dispatcher.gathered = {"tokens": (), "weights": banks, "mixed": banks[1:], "mixed, V's weights": banks[:1]}[
            layout.exchange
        ]
        x, gates = (values.clone().to(dtype).requires_grad_() for values in (rows.x_TD, rows.gates_XK))
        to_heads, to_tokens = dispatcher.plan(*routings(rows, shape, gates, banks))
        hidden = apply(dispatcher, to_heads, x, label="value")
        y = apply(dispatcher, to_tokens, hidden.tanh(), label="output")
        (y.to(dtype) * rows.cotangent_TD.to(dtype)).sum().backward()
    found = {"y": y, "dx": x.grad, "dgates": gates.grad}
    found |= {name: bank.weights()["weight"].grad for name, bank in zip(("dvalue", "doutput"), banks, strict=True)}
    wide = torch.float64 if layout.dtype == "float64" else torch.float32
    return {name: tensor.detach().to(wide).numpy() for name, tensor in found.items() if tensor is not None}


def apply(dispatcher: AllToAllDispatcher, exchange, rows: torch.Tensor, *, label: str) -> torch.Tensor:
    arriving = dispatcher.dispatch(exchange, rows, label=label)
    weight = dispatcher.weights(exchange, label=label).wait()["weight"]

    def experts(rows_RX: torch.Tensor, plan: LocalPlan) -> torch.Tensor:
        assert_copies_of_rows(plan, num_rows=len(rows_RX))
        group_C = torch.repeat_interleave(torch.diff(plan.offsets_L, prepend=plan.offsets_L.new_zeros(1)))
        copies = torch.einsum("cx,cxy->cy", rows_RX[plan.row_index_C], weight[group_C]) * plan.gates_C[:, None]
        sums = copies.new_zeros(plan.num_outputs, weight.shape[2]).index_add(0, plan.output_index_C, copies)
        return sums.to(rows_RX.dtype)

    return dispatcher.combine(arriving, experts, label=label).wait()


def assert_copies_of_rows(plan: LocalPlan, *, num_rows: int) -> None:
    """The plan's lists of the copies of each row, which kernels sum by, name every copy under its row."""
    for copies, index_C, size in (
        (plan.output_copies(), plan.output_index_C, plan.num_outputs),
        (plan.row_copies(num_rows), plan.row_index_C, num_rows),
    ):
        assert copies is not None
        assert len(copies.ends_P) == size
        assert torch.equal(copies.order_C.long().sort().values, torch.arange(len(index_C)))
        counts_P = torch.diff(copies.ends_P, prepend=copies.ends_P.new_zeros(1))
        assert torch.equal(index_C[copies.order_C], torch.repeat_interleave(torch.arange(size), counts_P))
