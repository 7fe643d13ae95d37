"""AllToAllDispatcher against one process in float64: every routing, uneven and empty ranks, padding, outputs and each gradient."""

from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from model.dispatch import Routing
from model.parameters import ExpertBank
from parallel.expert import AllToAllDispatcher
from tests.parallel.two_steps import open_world

GROUPS, CHOICES, HEADS, D, C = 7, 2, 2, 6, 3  # 7 groups: padding on 2 and on 4 ranks
ROUTINGS = ["random", "one_expert", "one_rank", "none_to_last_rank", "one_expert_twice"]


@dataclass(frozen=True)
class Rows:
    """Tokens of one rank, each with HEADS * CHOICES gates and experts; and the weights and cotangent of the test."""

    x_TD: torch.Tensor
    gates_XK: torch.Tensor
    ids_XK: torch.Tensor
    cotangent_TD: torch.Tensor


def rows_of(rank: int, *, routing: str, tokens: int) -> Rows:
    g = torch.Generator().manual_seed(100 + rank)
    scores = torch.rand(tokens * HEADS, GROUPS, generator=g, dtype=torch.float64)
    favoured = {"one_expert": [3], "one_rank": [0, 1], "none_to_last_rank": [0, 1, 2, 3]}.get(routing, [])
    scores[:, favoured] += 2
    ids = scores.sort(descending=True).indices[:, :CHOICES]
    if routing == "one_expert_twice":
        ids = torch.full_like(ids, 2)  # every copy goes to one expert, and a row meets it with both of its gates
    return Rows(
        x_TD=torch.randn(tokens, D, generator=g, dtype=torch.float64),
        gates_XK=torch.rand(tokens * HEADS, CHOICES, generator=g, dtype=torch.float64),
        ids_XK=ids,
        cotangent_TD=torch.randn(tokens, D, generator=g, dtype=torch.float64),
    )


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return torch.randn(GROUPS, D, C, generator=g, dtype=torch.float64), torch.randn(
        GROUPS, C, D, generator=g, dtype=torch.float64
    )


def by_loop(rows: Rows) -> dict[str, np.ndarray]:
    """y[t] = sum over heads h and choices of gate * tanh(sum over choices of gate * x[t] V[e]) O[e], one token after another."""
    value, output = (w.requires_grad_() for w in weights())
    x, gates = rows.x_TD.clone().requires_grad_(), rows.gates_XK.clone().requires_grad_()
    y = []
    for t in range(x.shape[0]):
        total = torch.zeros(D, dtype=torch.float64)
        for pair in range(t * HEADS, (t + 1) * HEADS):
            hidden = torch.stack([gates[pair, k] * (x[t] @ value[rows.ids_XK[pair, k]]) for k in range(CHOICES)]).sum(0)
            total = total + sum(gates[pair, k] * (hidden.tanh() @ output[rows.ids_XK[pair, k]]) for k in range(CHOICES))
        y.append(total)
    result = torch.stack(y) if y else x * 0.0
    (result * rows.cotangent_TD).sum().backward()
    zero = torch.zeros(GROUPS, D, C, dtype=torch.float64)
    found = {"y": result, "dx": x.grad, "dgates": gates.grad if y else gates}
    found |= {"dvalue": value.grad if y else zero, "doutput": output.grad if y else zero.mT}
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def by_dispatcher(routing: str, tokens_of: list[int], ep_size: int) -> dict[str, np.ndarray]:
    """The same on this rank: V's shape (token -> (token, head)) and then O's ((token, head) -> token), planned together."""
    with open_world(ep_size) as mesh:
        rank, dispatcher = mesh.rank, AllToAllDispatcher(mesh.expert_group)
        local = -(-GROUPS // ep_size)
        first = mesh.ep_rank * local
        value, output = (_slice(w, first, local).requires_grad_() for w in weights())
        rows = rows_of(rank, routing=routing, tokens=tokens_of[rank])
        x, gates = rows.x_TD.clone().requires_grad_(), rows.gates_XK.clone().requires_grad_()
        pair = torch.arange(rows.ids_XK.shape[0])
        tokens, pairs = (pair // HEADS, tokens_of[rank]), (pair, len(pair))
        bank = ExpertBank(GROUPS, {})
        to_heads = Routing(gates, rows.ids_XK, tokens[0], pairs[0], tokens[1], pairs[1], bank)
        to_tokens = Routing(gates, rows.ids_XK, pairs[0], tokens[0], pairs[1], tokens[1], bank)
        exchange_v, exchange_o = dispatcher.plan(to_heads, to_tokens)
        hidden = _apply(dispatcher, exchange_v, x, value)
        y = _apply(dispatcher, exchange_o, hidden.tanh(), output)
        (y * rows.cotangent_TD).sum().backward()
    found = {"y": y, "dx": x.grad, "dgates": gates.grad, "dvalue": value.grad, "doutput": output.grad}
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def _apply(dispatcher: AllToAllDispatcher, exchange, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    received, plan = dispatcher.dispatch(exchange, rows, label="test").wait()
    group_C = torch.repeat_interleave(torch.diff(plan.offsets_L, prepend=plan.offsets_L.new_zeros(1)))
    copies = torch.einsum("cx,cxy->cy", received[plan.row_index_C], weight[group_C]) * plan.gates_C[:, None]
    partials = copies.new_zeros(plan.num_outputs, weight.shape[2]).index_add(0, plan.output_index_C, copies)
    return dispatcher.combine(exchange, partials, label="test").wait()


def _slice(weight: torch.Tensor, first: int, local: int) -> torch.Tensor:
    padded = torch.cat([weight, torch.full_like(weight, torch.nan)])  # padding that anyone read would show
    return padded[first : first + local].clone()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("processes", "ep_size", "tokens"), [(2, 2, [5, 9]), (2, 2, [0, 4]), (4, 4, [3, 0, 6, 1]), (4, 2, [2, 7, 0, 5])]
)
def test_outputs_and_every_gradient_equal_a_loop_in_float64(pool, routing, processes, ep_size, tokens):
    found = pool(processes).run(by_dispatcher, routing, tokens, ep_size)
    expected = [by_loop(rows_of(rank, routing=routing, tokens=tokens[rank])) for rank in range(processes)]
    for rank in range(processes):
        for name in ("y", "dx", "dgates"):
            np.testing.assert_allclose(
                found[rank][name], expected[rank][name], rtol=1e-12, atol=1e-12, err_msg=f"{name} of rank {rank}"
            )
    for first in range(
        0, processes, ep_size
    ):  # expert groups are consecutive ranks; each sums over its own ranks' rows
        for name in ("dvalue", "doutput"):
            owned = np.concatenate([found[first + rank][name] for rank in range(ep_size)])[:GROUPS]
            summed = sum(expected[first + rank][name] for rank in range(ep_size))
            np.testing.assert_allclose(owned, summed, rtol=1e-12, atol=1e-12, err_msg=name)


def two_routings(rank: int) -> tuple[Routing, Routing]:
    """V's and O's of three tokens, planned together as SwitchHead does."""
    gates_XK, ids_XK = torch.ones(3 * HEADS, CHOICES), rows_of(rank, routing="random", tokens=3).ids_XK
    pair_X = torch.arange(3 * HEADS)
    bank = ExpertBank(GROUPS, {})
    return (
        Routing(gates_XK, ids_XK, pair_X // HEADS, pair_X, 3, 3 * HEADS, bank),
        Routing(gates_XK, ids_XK, pair_X, pair_X // HEADS, 3 * HEADS, 3, bank),
    )


def collectives_of_a_plan() -> int:
    with (
        open_world(2) as mesh,
        mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchanged,
    ):
        AllToAllDispatcher(mesh.expert_group).plan(*two_routings(mesh.rank))
        return exchanged.call_count


def test_the_counts_of_all_routings_of_a_plan_travel_in_one_exchange(pool):
    assert pool(2).run(collectives_of_a_plan) == [1, 1]


def gathered(ep_size: int) -> dict[str, np.ndarray]:
    """Rows of this rank's groups, given to all; each rank uses what it gets in its own way. Padding is NaN: it must not be read."""
    with open_world(ep_size) as mesh:
        bank = ExpertBank(GROUPS, {})
        bank.shard(rank=mesh.ep_rank, size=ep_size)
        rows = _slice(weights()[0][:, :, 0], bank.first_group, bank.num_local).requires_grad_()
        found = AllToAllDispatcher(mesh.expert_group).gather(bank, rows, label="test").wait()
        (found * _use(mesh.rank)).square().sum().backward()
        assert rows.grad is not None
        return {"found": found.detach().numpy(), "gradient": rows.grad.numpy()}


def _use(rank: int) -> torch.Tensor:
    return torch.randn(GROUPS, D, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


@pytest.mark.parametrize(("processes", "ep_size"), [(2, 2), (4, 4), (4, 2)])
def test_gather_gives_all_groups_in_their_order_and_sums_the_gradients_of_its_users(pool, processes, ep_size):
    seen = pool(processes).run(gathered, ep_size)
    expected = weights()[0][:, :, 0]
    for first in range(0, processes, ep_size):
        group = range(first, first + ep_size)
        for rank in group:
            np.testing.assert_array_equal(seen[rank]["found"], expected.numpy())
        gradient = np.concatenate([seen[rank]["gradient"] for rank in group])
        wanted = sum(2 * expected * _use(rank).square() for rank in group)
        np.testing.assert_allclose(gradient[:GROUPS], wanted, rtol=1e-12)
        assert not gradient[GROUPS:].any(), "padding has no gradient"


def dtypes_summed_in() -> list[torch.dtype]:
    """Of the sums that combine makes of bfloat16 results."""
    dtypes = []
    index_add = torch.Tensor.index_add

    def recorded(self: torch.Tensor, *arguments, **options) -> torch.Tensor:
        dtypes.append(self.dtype)
        return index_add(self, *arguments, **options)

    with open_world(2) as mesh, mock.patch.object(torch.Tensor, "index_add", recorded):
        dispatcher = AllToAllDispatcher(mesh.expert_group)
        exchange, _ = dispatcher.plan(*two_routings(mesh.rank))
        partials = torch.ones(sum(exchange.receive), C, dtype=torch.bfloat16)
        assert dispatcher.combine(exchange, partials, label="test").wait().dtype == torch.bfloat16
    return dtypes


def test_results_of_a_row_are_summed_in_float32_at_home(pool):
    """Looks at the dtype, because a CPU's index_add sums bfloat16 in float32 by itself: the values could not tell."""
    assert pool(2).run(dtypes_summed_in) == [[torch.float32]] * 2


def test_two_runs_are_equal_bit_for_bit(pool):
    first, second = (pool(4).run(by_dispatcher, "random", [3, 8, 2, 6], 4) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
