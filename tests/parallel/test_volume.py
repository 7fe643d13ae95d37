"""The expected bytes of an exchange: against every routing there is on small sizes, and against a sample on a larger one.

The messages are written here a second time, as sets of (row, receiver) of one token, for one sender after the other.
"""

import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, product
from math import comb, lcm
from pathlib import Path

import pytest

from model.section import BankShape
from parallel.volume import ExpertGroup, Leg, hit_chance, token_bytes, weight_bytes

ROOT = Path(__file__).resolve().parents[2]
WIRE = 2

MLP = BankShape(
    name="experts",
    label="mlp",
    num_groups=5,
    num_heads=1,
    top_k=2,
    shares_groups=False,
    row_dim=8,
    output_dim=8,
    rows_per_token=1,
    outputs_per_token=1,
    same_rows=True,
    group_numel=48,
    is_table=False,
    replies=False,
    token_factor=1,
    hashed=False,
)
TO_HEADS = replace(
    MLP, label="value", num_groups=6, num_heads=2, output_dim=4, outputs_per_token=2, same_rows=False, group_numel=32
)
FROM_HEADS = replace(TO_HEADS, label="output", row_dim=4, output_dim=8, rows_per_token=2, outputs_per_token=1)
PEER = replace(
    MLP, label="peer", num_groups=4, num_heads=2, shares_groups=True, group_numel=16, is_table=True, replies=True
)
PKM = replace(PEER, label="pkm", num_groups=5, row_dim=0, group_numel=8, replies=False)
ONE_CHOICE = replace(FROM_HEADS, top_k=1)
WITH_MEMORY = replace(TO_HEADS, top_k=1, token_factor=2)
HASHED = replace(MLP, hashed=True)
BANKS = {
    "mlp": MLP,
    "value": TO_HEADS,
    "output": FROM_HEADS,
    "output_k1": ONE_CHOICE,
    "memory": WITH_MEMORY,
    "hashed": HASHED,
    "pkm": PKM,
    "peer": PEER,
}
# ep_size, node_size, columns; with 6 or 5 groups on 4 ranks the last one holds one or nothing but padding
LAYOUTS = [(1, 1, 1), (2, 2, 1), (2, 1, 1), (2, 3, 1), (4, 4, 1), (4, 8, 1), (4, 2, 1), (4, 1, 1)]
COLUMNS = [(2, 2, 2), (4, 4, 2), (4, 4, 4), (4, 2, 2), (4, 2, 4), (4, 1, 2), (2, 3, 2)]


def routings(bank: BankShape) -> Iterator[list[tuple[int, int]]]:
    """Every choice of one token, as (head, group) pairs."""
    own = bank.num_groups if bank.shares_groups else bank.num_groups // bank.num_heads
    for picks in product(combinations(range(own), bank.top_k), repeat=bank.num_heads):
        yield [
            (head, group if bank.shares_groups else head * own + group) for head, pick in enumerate(picks) for group in pick
        ]  # fmt: skip


class Messages:
    """Bytes by (leg, backward, far) of the copies of one token of one sender, added up over senders and choices."""

    def __init__(self, bank: BankShape, columns: int, node_size: int) -> None:
        self.bank, self.columns, self.node_size = bank, columns, node_size
        self.sent: Counter[tuple[str, bool, bool]] = Counter()

    def hop(self, sender: int, receiver: int, copies: list[tuple[int, int, int, int]]) -> None:
        """copies: (row, output, group, column). Everything that one pair of ranks exchanges for them, out and home."""
        bank, split = self.bank, self.columns
        rows = {(row, column) for row, _, _, column in copies}
        outputs = {(output, column) for _, output, _, column in copies}
        ints = len(rows) + len(copies) * (
            1 if bank.same_rows else 2
        )  # copies of each row; group, output row of each copy
        numbers = 4 * len(copies)
        both_ways = {
            "gates": numbers,
            "reply": numbers if bank.replies and split > 1 else 0,
            "dispatch": len(rows) * bank.row_dim // split * WIRE,
            "combine": len(outputs) * bank.output_dim // split * WIRE,
        }
        sent = [(leg, back, size) for leg, size in both_ways.items() for back in (False, True)]
        sent.append(("metadata", False, 4 * ints + (8 * len(copies) if bank.hashed else 0)))
        for leg, back, size in sent:
            self.sent[leg, back, sender // self.node_size != receiver // self.node_size] += size

    def route(self, sender: int, first: int, ep_size: int, entries: list[tuple[int, int]]) -> None:
        """Copies of one token, whose group of ranks begins with `first`, straight or over the rank with its place in the other node."""
        bank, split = self.bank, self.columns
        num_local = -(-bank.num_groups // (ep_size // split))
        to_rank: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
        for head, group in entries:
            row, output = (head if number > 1 else 0 for number in (bank.rows_per_token, bank.outputs_per_token))
            for column in range(split):
                to_rank[first + group // num_local * split + column].append((row, output, group, column))
        if ep_size <= self.node_size:
            for receiver in to_rank.keys() - {sender}:
                self.hop(sender, receiver, to_rank[receiver])
            return
        of_node: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
        for receiver, copies in to_rank.items():
            of_node[receiver // self.node_size] += copies
            between = receiver // self.node_size * self.node_size + sender % self.node_size
            if between != receiver:
                self.hop(between, receiver, copies)
        for node in of_node.keys() - {sender // self.node_size}:
            self.hop(sender, node * self.node_size + sender % self.node_size, of_node[node])


def by_brute_force(
    bank: BankShape, ep_size: int, node_size: int, columns: int, *, tokens: int = 1, chunks: int = 1
) -> dict[tuple[str, bool, bool], float]:
    """Mean over the ranks of a world of whole groups and nodes, and over all choices."""
    messages, world, num_choices = Messages(bank, columns, node_size), lcm(ep_size, node_size), 0
    by_head = max(bank.rows_per_token, bank.outputs_per_token) > 1
    tokens *= bank.token_factor
    num_entries = tokens * (bank.num_heads if by_head else 1)
    size = -(-num_entries // chunks)
    for sender in range(world):
        first = sender // ep_size * ep_size
        num_choices = 0
        for chosen in routings(bank):
            num_choices += 1
            for token in range(tokens):
                parts: dict[int, list[tuple[int, int]]] = defaultdict(list)
                for head, group in chosen:
                    entry = token * bank.num_heads + head if by_head else token
                    parts[entry // size].append((head, group))
                for entries in parts.values():
                    messages.route(sender, first, ep_size, entries)
    return {key: size / world / num_choices for key, size in messages.sent.items()}


def found(
    bank: BankShape, ep_size: int, node_size: int, columns: int, **sizes: int
) -> dict[tuple[str, bool, bool], float]:
    """What the module says, all but the counts."""
    legs = token_bytes(
        bank, ExpertGroup(ep_size, node_size), wire_bytes=WIRE, columns=columns, **({"tokens": 1} | sizes)
    )
    split = {
        (leg.name, leg.backward, far): sent
        for leg, both in legs.items()
        for far, sent in ((False, both.near), (True, both.far))
    }
    return {key: size for key, size in split.items() if size and key[0] != "counts"}  # fmt: skip


@pytest.mark.parametrize(("ep_size", "node_size", "columns"), LAYOUTS)
@pytest.mark.parametrize("kind", BANKS)
def test_the_expected_bytes_are_the_mean_over_every_choice_of_a_token(
    kind: str, ep_size: int, node_size: int, columns: int
):
    expected = by_brute_force(BANKS[kind], ep_size, node_size, columns)
    assert found(BANKS[kind], ep_size, node_size, columns) == pytest.approx(
        {key: size for key, size in expected.items() if size}, rel=1e-12
    )


@pytest.mark.parametrize(("ep_size", "node_size", "columns"), COLUMNS)
@pytest.mark.parametrize("kind", ["pkm", "peer"])
def test_so_they_are_where_a_table_is_split_by_columns(kind: str, ep_size: int, node_size: int, columns: int):
    expected = by_brute_force(BANKS[kind], ep_size, node_size, columns)
    assert found(BANKS[kind], ep_size, node_size, columns) == pytest.approx(
        {key: size for key, size in expected.items() if size}, rel=1e-12
    )


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("kind", ["mlp", "value", "output", "memory", "pkm"])
def test_a_token_whose_heads_lie_in_two_parts_travels_twice(kind: str, chunks: int):
    expected = by_brute_force(BANKS[kind], 4, 2, 1, tokens=5, chunks=chunks)
    assert found(BANKS[kind], 4, 2, 1, tokens=5, chunks=chunks) == pytest.approx(
        {key: size for key, size in expected.items() if size}, rel=1e-12
    )


def test_parts_of_whole_tokens_cost_no_row_more():
    """5 tokens of 2 heads: 5 parts have a token each, 4 parts of 3 entries cut two of them. Rank 1 has groups of both heads."""
    whole, fifths, cut = (
        found(TO_HEADS, 4, 4, 1, tokens=5, chunks=chunks)["dispatch", False, False] for chunks in (1, 5, 4)
    )
    assert whole == pytest.approx(fifths)
    assert cut > 1.01 * whole


@pytest.mark.parametrize(
    ("ep_size", "node_size", "near", "far"), [(4, 4, 3, 0), (4, 2, 1, 1), (8, 2, 1, 3), (4, 1, 0, 3), (1, 4, 0, 0)]
)
def test_counts_travel_to_each_other_rank_of_a_hop_for_each_part(ep_size: int, node_size: int, near: int, far: int):
    legs = token_bytes(TO_HEADS, ExpertGroup(ep_size, node_size), tokens=9, wire_bytes=WIRE, chunks=3)
    assert (legs[Leg("counts")].near, legs[Leg("counts")].far) == (24 * 3 * near, 24 * 3 * far)


@pytest.mark.parametrize(("ep_size", "node_size"), [(1, 1), (2, 2), (2, 1), (2, 3), (4, 4), (4, 2), (4, 6)])
def test_weights_reach_every_rank_with_their_padding_and_gradients_come_straight_back(ep_size: int, node_size: int):
    """Forward as a ring: a rank hands to the next one what all but that one have."""
    num_local, world = -(-5 // ep_size), lcm(ep_size, node_size)
    ring, straight = Counter(), Counter()
    for sender in range(world):
        first = sender // ep_size * ep_size
        after = first + (sender - first + 1) % ep_size
        ring["near" if after // node_size == sender // node_size else "far"] += ep_size - 1
        for receiver in {*range(first, first + ep_size)} - {sender}:
            straight["near" if receiver // node_size == sender // node_size else "far"] += 1
    sent = weight_bytes(MLP, ExpertGroup(ep_size, node_size), wire_bytes=WIRE)
    for leg, count in ((Leg("weights"), ring), (Leg("weights", backward=True), straight)):
        banks = num_local * 48 * WIRE / world
        assert (sent[leg].near, sent[leg].far) == pytest.approx((count["near"] * banks, count["far"] * banks))
    assert len(sent) == 2


@pytest.mark.parametrize(
    ("groups", "top_k", "heads", "ranks"),
    [(2**20, 64, 16, 8), (2**20, 1, 1, 4096), (2**20, 32, 4, 64), (3**12, 1, 1, 3**12), (81, 64, 2, 8)],
)
def test_the_chance_of_a_hit_is_exact_for_large_tables(groups: int, top_k: int, heads: int, ranks: int):
    bank, held = replace(PEER, num_groups=groups, top_k=top_k, num_heads=heads), -(-groups // ranks)
    exact = 1 - Fraction(comb(groups - held, top_k), comb(groups, top_k)) ** heads
    found = hit_chance(bank, heads=range(heads), groups=range(3 * held, 4 * held))
    assert found == pytest.approx(float(exact), rel=1e-12, abs=0)


def test_a_sample_of_tokens_has_the_expected_rows_of_a_table():
    bank = replace(PKM, num_groups=900, num_heads=3, top_k=4, row_dim=1)
    drawn, rows, num_local = random.Random(0), 0, 57  # ceil(900 / 16)
    for _ in range(4000):
        picks = [group for _ in range(3) for group in drawn.sample(range(900), 4)]
        rows += len({group // num_local for group in picks} - {drawn.randrange(16)})
    legs = token_bytes(bank, ExpertGroup(16, 16), tokens=4000, wire_bytes=1)
    assert legs[Leg("dispatch")].total == pytest.approx(
        rows, rel=0.01
    )  # about 8.2 ranks a token, deviation 1.2 / sqrt(4000)


def test_the_module_loads_no_torch():
    loaded = "import sys, parallel.volume; print([n for n in ('torch', 'numpy', 'deepspeed') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
