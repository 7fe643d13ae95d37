"""The bytes in the ledger are those of the formulas, for every leg of an exchange: counted with sets from the routing of all ranks.

Letters: rank s sends a row at most once to rank r, and gets at most one result of each output row back, whatever number of copies.
"""

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
import torch

from model.dispatch import LocalPlan, Routing
from model.parameters import Table
from parallel.ledger import Sent, Where
from tests.parallel.routed import Layout, Shape, apply, banks_of, dispatcher_of, routings, rows_of

SHAPE = Shape(groups=11, choices=3, heads=2, d_model=10, head_dim=4)
TOKENS = [3, 9, 0, 5]
WORD = 4


def seen(layout: Layout, routing: str) -> dict[Where, Sent]:
    """What the ledger of this rank holds after a forward and a backward pass."""
    bfloat16 = layout.dtype == "bfloat16"
    with dispatcher_of(layout) as (mesh, dispatcher), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        rows = rows_of(mesh.rank, SHAPE, routing=routing, tokens=TOKENS[mesh.rank])
        banks = banks_of(SHAPE, layout, mesh.ep_rank, torch.float32)
        dispatcher.gathered = {"tokens": (), "weights": banks}[layout.exchange]
        mesh.ledger.take()
        x, gates = (values.clone().float().requires_grad_() for values in (rows.x_TD, rows.gates_XK))
        value, output = dispatcher.plan(*routings(rows, SHAPE, gates, banks))
        hidden = apply(dispatcher, value, x, label="value")
        apply(dispatcher, output, hidden.tanh(), label="output").float().sum().backward()
        return mesh.ledger.take().sent


def journeys(layout: Layout, routing: str) -> dict[str, list[tuple[int, int, int, int, int]]]:
    """All copies as (part, rank of the token, row, output row, rank of the expert), for V and for O."""
    found = defaultdict(list)
    local = -(-SHAPE.groups // layout.ep_size)
    for s, tokens in enumerate(TOKENS):
        ids = rows_of(s, SHAPE, routing=routing, tokens=tokens).ids_XK
        size = -(-len(ids) // layout.chunks)
        for pair, chosen in enumerate(ids.tolist()):
            for expert in chosen:
                token, r = pair // SHAPE.heads, expert // local
                found["value"].append((pair // size, s, token, pair, r))
                found["output"].append((pair // size, s, pair, token, r))
    return found


def hops(layout: Layout, copies: list) -> Counter:
    """Number of rows, output rows and copies by (what, sender, receiver): over one hop, or across nodes and then inside them."""
    distinct = defaultdict(set)
    for number, (part, s, row, output, r) in enumerate(copies):
        stations = (
            [s, r] if not layout.node_size else [s, r // layout.node_size * layout.node_size + s % layout.node_size, r]
        )
        for one, other in pairwise(stations):
            if one != other:
                distinct["rows", one, other].add((part, s, row))
                distinct["outputs", one, other].add((part, s, output))
                distinct["copies", one, other].add(number)
    return Counter({key: len(values) for key, values in distinct.items()})


def expected(layout: Layout, routing: str) -> list[dict[Where, Sent]]:
    """By rank, from the messages of docs/parallelism.md."""
    ranks, node = range(layout.ep_size), layout.node_size or layout.ep_size
    sent = [defaultdict(Counter) for _ in ranks]

    def add(label: str, verb: str, one: int, other: int, size: int, *, backward: bool = False) -> None:
        if one != other:
            sent[one][Where("test", label, verb, backward)]["near" if one // node == other // node else "far"] += size

    element = 2 if layout.dtype == "bfloat16" else 4
    widths = {"value": (SHAPE.d_model, SHAPE.head_dim), "output": (SHAPE.head_dim, SHAPE.d_model)}
    for label, copies in journeys(layout, routing).items():
        number = hops(layout, copies)
        wide, narrow = widths[label]
        for one in ranks:
            for other in ranks:
                rows, outputs, of_copies = (number[what, one, other] for what in ("rows", "outputs", "copies"))
                add("", "plan", one, other, WORD * (rows + 2 * of_copies))
                neighbours = one // node == other // node or one % node == other % node
                if neighbours:  # of one of the hops
                    add("", "plan", one, other, 3 * 8 * layout.chunks)
                add(label, "dispatch", one, other, rows * wide * element)
                add(label, "dispatch", other, one, rows * wide * element, backward=True)
                add(label, "combine", other, one, outputs * narrow * element)
                add(label, "combine", one, other, outputs * narrow * element, backward=True)
                add(label, "gates", one, other, of_copies * 4)
                add(label, "gates", other, one, of_copies * 4, backward=True)
    return [{where: Sent(**sizes) for where, sizes in of.items()} for of in sent]


def without_zeros(sent: dict[Where, Sent]) -> dict[Where, Sent]:
    return {where: size for where, size in sent.items() if size != Sent()}


@pytest.mark.parametrize("routing", ["random", "one_rank"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(4, dtype="float32"),
        Layout(4, dtype="bfloat16"),
        Layout(4, dtype="float32", chunks=3),
        Layout(4, dtype="float32", node_size=2),
        Layout(4, dtype="bfloat16", node_size=2, chunks=2),
    ],
    ids=["flat", "bfloat16", "parts", "two_nodes", "two_nodes_parts_bfloat16"],
)
def test_every_leg_of_the_tokens_sends_the_bytes_of_its_formula(pool, layout, routing):
    for found, wanted in zip(pool(4).run(seen, layout, routing), expected(layout, routing), strict=True):
        assert without_zeros(found) == without_zeros(wanted)


@pytest.mark.parametrize(("dtype", "element"), [("float32", 4), ("bfloat16", 2)])
def test_weights_send_all_groups_of_a_rank_to_the_others_and_their_gradients_back(pool, dtype, element):
    each = 3 * 3 * SHAPE.d_model * SHAPE.head_dim * element  # 3 of 11 groups on each of 4 ranks, to 3 ranks
    for found in pool(4).run(seen, Layout(4, exchange="weights", dtype=dtype), "random"):
        assert {(where.label, where.verb, where.backward): sent.near for where, sent in found.items()} == {
            (label, "weights", backward): each for label in ("value", "output") for backward in (False, True)
        }


def table_rows_seen(columns: int, replies: bool) -> tuple[dict[Where, Sent], np.ndarray]:
    """A table of 9 rows of width 8 on 4 ranks, 3 tokens a rank with 4 picks each; rows travel, and with `replies` a number a copy."""
    with dispatcher_of(Layout(4)) as (mesh, dispatcher):
        table = Table(9, {"up": ((8,), lambda shape, g: torch.zeros(shape))})
        table.shard(rank=mesh.ep_rank, size=4, columns=columns)
        g = torch.Generator().manual_seed(mesh.rank)
        ids = torch.rand(3, 9, generator=g).argsort(1)[:, :4]
        gates, tokens = torch.rand(3, 4, generator=g).requires_grad_(), torch.arange(3)
        x = torch.randn(3, 8, generator=g).requires_grad_()
        mesh.ledger.take()
        routing = Routing(None if replies else gates, ids, tokens, tokens, 3, 3, table)
        (exchange,) = dispatcher.plan(routing)
        arriving = dispatcher.dispatch(exchange, x, label="peer")

        def sums(rows_RX: torch.Tensor, plan: LocalPlan) -> torch.Tensor:
            return rows_RX[plan.row_index_C].sum(1)

        def values(rows_RX: torch.Tensor, plan: LocalPlan) -> torch.Tensor:
            copies = rows_RX[plan.row_index_C] * plan.gates_C[:, None]
            return torch.zeros(plan.num_outputs, rows_RX.shape[1]).index_add(0, plan.output_index_C, copies)

        if replies:
            z = dispatcher.reply(arriving, sums, label="peer").wait()
            y = dispatcher.combine(arriving, values, label="peer", gates_NK=gates * z).wait()
        else:
            y = dispatcher.combine(arriving, values, label="peer").wait()
        y.sum().backward()
        return mesh.ledger.take().sent, ids.numpy()


@pytest.mark.parametrize("replies", [False, True])
@pytest.mark.parametrize("columns", [1, 2, 4])
def test_the_columns_of_a_table_send_slices_of_rows_and_numbers_of_copies(pool, columns, replies):
    ranks = pool(4).run(table_rows_seen, columns, replies)
    shards, width = 4 // columns, 8 // columns
    local = -(-9 // shards)
    for s, (found, _) in enumerate(ranks):
        wanted = Counter()
        wanted["plan", False] = 3 * 24
        for sender, (_, ids) in enumerate(ranks):
            for token in ids:
                by_shard = Counter(token // local)
                for shard, copies in by_shard.items():
                    for r in range(shard * columns, (shard + 1) * columns):
                        if r == sender:
                            continue
                        if sender == s:
                            wanted["plan", False] += WORD * (1 + copies)
                            wanted["dispatch", False] += 4 * width
                            wanted["combine", True] += 4 * width
                            wanted["gates", False] += 4 * copies
                            wanted["reply", True] += 4 * copies * replies
                        if r == s:
                            wanted["combine", False] += 4 * width
                            wanted["dispatch", True] += 4 * width
                            wanted["gates", True] += 4 * copies
                            wanted["reply", False] += 4 * copies * replies
        assert {(w.verb, w.backward): size.near for w, size in found.items() if size.near} == +wanted
