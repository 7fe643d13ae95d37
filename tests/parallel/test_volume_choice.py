"""The bytes of the exchange against published formulas, and what `auto` makes of them.

Formulas: stack_facts 1.4 for attention and an MLP, the specification of arXiv 2407.04153, section 3.2, for tables.
"""

from dataclasses import replace
from fractions import Fraction

import pytest

from model.attention_config import SwitchHeadConfig
from model.feedforward_config import SigmaMoEConfig
from model.product_key_config import PEERConfig, PKMConfig
from model.section import BankShape, Place
from parallel.volume import ExpertGroup, choose_exchange, token_bytes, total, weight_bytes


def place(d_model: int) -> Place:
    return Place(d_model, 12, 5, ("attention",) * 12, "reference", 0.0)


SIGMA_MOE = {"num_experts": 128, "expert_dim": 128, "top_k": 8}
(MLP,) = SigmaMoEConfig.model_validate(SIGMA_MOE).banks(place(1024))

# The table of the specification of arXiv 2407.04153, section 3.2: P ranks, A = h k experts a token, b = 2, d = 1024, bytes a token.
D_MODEL, IDS, PARTIAL, WEIGHT, GATE, PER_ROW = 1024, 4, 4, 4, 4, 4
BY_COLUMNS_FORWARD = {2: 3584, 4: 7680, 8: 14336, 16: 26880, 64: 100800}
BY_COLUMNS_BACKWARD = {2: 3072, 4: 6144, 8: 10752, 16: 19200, 64: 68544}
BY_ROWS_FORWARD = {2: 4608, 4: 13056, 8: 29568, 16: 62400, 64: 259056}
BY_ROWS_BACKWARD = {2: 4352, 4: 12672, 8: 29120, 16: 61920, 64: 258552}
UNDEDUPLICATED_FORWARD = {2: 262656, 4: 393984, 8: 459648, 16: 492480, 64: 517104}
OF_PKM_BY_COLUMNS = {2: 1792, 4: 3840, 8: 7168, 16: 13440, 64: 50400}

(PUBLISHED,) = PEERConfig(num_experts=1024**2, num_heads=8, top_k=16, key_dim=128).banks(place(D_MODEL))
each_size = pytest.mark.parametrize("ranks", [2, 4, 8, 16, 64])


def per_token(bank: BankShape, ranks: int, *, columns: int, backward: bool) -> float:
    """Without the counts, which are the same for any number of tokens."""
    legs = token_bytes(bank, ExpertGroup(ranks, ranks), tokens=1, wire_bytes=2, columns=columns)
    return sum(sent.total for leg, sent in legs.items() if leg.backward == backward and leg.name != "counts")


@each_size
def test_a_table_in_columns_sends_what_the_specification_says_and_the_number_of_copies_of_each_row(ranks: int):
    forward, backward = (per_token(PUBLISHED, ranks, columns=ranks, backward=back) for back in (False, True))
    others, width, experts = ranks - 1, 2 * D_MODEL * 2 * (ranks - 1) / ranks, 128
    assert width + others * experts * (IDS + PARTIAL + WEIGHT) == BY_COLUMNS_FORWARD[ranks]
    assert width + others * experts * (PARTIAL + WEIGHT) == BY_COLUMNS_BACKWARD[ranks]
    assert forward == pytest.approx(BY_COLUMNS_FORWARD[ranks] + others * PER_ROW)
    assert backward == pytest.approx(BY_COLUMNS_BACKWARD[ranks])


@each_size
def test_a_table_in_rows_sends_what_the_specification_says_but_only_to_ranks_that_are_hit(ranks: int):
    forward, backward = (per_token(PUBLISHED, ranks, columns=1, backward=back) for back in (False, True))
    others, share, experts = ranks - 1, (ranks - 1) / ranks, 128
    assert round(2 * others * D_MODEL * 2 + experts * (IDS + GATE) * share) == BY_ROWS_FORWARD[ranks]
    assert round(2 * others * D_MODEL * 2 + experts * GATE * share) == BY_ROWS_BACKWARD[ranks]
    hit = others * (1 - (1 - Fraction(1, ranks)) ** experts)  # of its section 3.2; its table has all of them hit
    missed = 2 * float(others - hit) * D_MODEL * 2
    assert forward == pytest.approx(BY_ROWS_FORWARD[ranks] - missed + float(hit) * PER_ROW, rel=1e-4)
    assert backward == pytest.approx(BY_ROWS_BACKWARD[ranks] - missed, rel=1e-4)


@each_size
def test_copies_that_travel_each_with_a_row_send_what_the_specification_says_of_them(ranks: int):
    """As many heads as experts, each with a row of its own: nothing is left to be sent once."""
    bank = replace(PUBLISHED, num_heads=128, top_k=1, rows_per_token=128, outputs_per_token=128)
    forward = per_token(bank, ranks, columns=1, backward=False)
    assert forward == pytest.approx(UNDEDUPLICATED_FORWARD[ranks] + 128 * PER_ROW * (ranks - 1) / ranks)


@each_size
def test_values_in_columns_send_what_the_specification_says_with_gates_of_4_bytes_for_its_2(ranks: int):
    (bank,) = PKMConfig(num_keys=1024, num_heads=8, top_k=16).banks(place(D_MODEL))
    forward, others = per_token(bank, ranks, columns=ranks, backward=False), ranks - 1
    assert others * 128 * (IDS + 2) + D_MODEL * 2 * others / ranks == OF_PKM_BY_COLUMNS[ranks]
    assert forward == pytest.approx(OF_PKM_BY_COLUMNS[ranks] + others * 128 * 2 + others * PER_ROW)


@pytest.mark.parametrize(("ranks", "columns", "published"), [(8, 4, 13824), (16, 4, 22272), (64, 8, 47488)])
def test_rows_and_columns_together_send_less_than_the_specification_says(ranks: int, columns: int, published: int):
    """There the gates go with the ids to every column, and the rest (z, w) round the columns; here z comes home and w goes out once."""
    share = columns * (1 - 1 / ranks)
    there = 128 * (IDS + GATE) * share + 128 * (columns - 1) * (PARTIAL + WEIGHT)
    here = 128 * (IDS + PARTIAL + WEIGHT) * share + PER_ROW * (ranks - 1)
    assert round(2 * (ranks - 1) * D_MODEL / columns * 2 + there) == published
    forward = per_token(PUBLISHED, ranks, columns=columns, backward=False)
    assert forward == pytest.approx(published - there + here, rel=1e-3)  # nearly every row shard is hit


def crossing(banks: list[BankShape], ranks: int) -> int:
    """Tokens per rank from which weights are fewer bytes than tokens, forward and backward, all banks together."""
    group = ExpertGroup(ranks, ranks)
    weights = sum(total(weight_bytes(bank, group, wire_bytes=2)) for bank in banks)
    each = sum(total(token_bytes(bank, group, tokens=10_000, wire_bytes=2)) for bank in banks) / 10_000
    return round(weights / each)


def test_the_modes_of_attention_cross_where_the_rough_formula_says():
    """stack_facts 1.4: H E h / P = 2,048 tokens for H 16, E 8, h 128, P 8, to within 1.5."""
    sizes = {"num_heads": 16, "head_dim": 128, "num_experts": 8, "top_k": 4}
    banks = SwitchHeadConfig.model_validate(sizes).banks(place(2048))
    assert 2048 / 1.5 < crossing(banks, 8) < 2048 * 1.5


@pytest.mark.parametrize(("experts", "rough"), [(128, 2048), (512, 8192)])
def test_the_modes_of_an_mlp_cross_where_the_rough_formula_says(experts: int, rough: int):
    """stack_facts 1.4: N g / min(k, P - 1) for g 128, k 8; 2,048 and 8,192 are N g / k, of many ranks."""
    banks = SigmaMoEConfig.model_validate(SIGMA_MOE | {"num_experts": experts}).banks(place(1024))
    assert rough / 1.5 < crossing(banks, 64) < rough * 1.5
    assert rough * 8 / 7 / 1.5 < crossing(banks, 8) < rough * 8 / 7 * 1.5


def test_auto_takes_fewer_bytes_and_says_both_numbers():
    group, bank = ExpertGroup(8, 8), MLP
    few, many = (choose_exchange(bank, group, tokens=tokens, wire_bytes=2) for tokens in (1000, 100_000))
    assert (few.mode, many.mode, few.columns, many.columns) == ("tokens", "weights", 1, 1)
    assert few.tokens_bytes < few.weights_bytes == many.weights_bytes == 2 * 7 * (128 / 8) * 2**18 * 2
    assert many.tokens_bytes > many.weights_bytes
    sentence = few.sentence("layers.0.feedforward.experts")
    assert sentence == (
        f"layers.0.feedforward.experts: tokens, {few.tokens_bytes / 1e6:.1f} MB per micro-step and rank against 117 MB of weights"
    )
    of_tokens = f"{many.tokens_bytes / 1e9:.2f} GB of tokens"
    assert many.sentence("x") == f"x: weights, 117 MB per micro-step and rank against {of_tokens}"


def test_a_mode_that_is_given_is_taken():
    group = ExpertGroup(2, 2)
    for tokens in (1, 10**6):
        for mode in ("tokens", "weights"):
            choice = choose_exchange(MLP, group, tokens=tokens, wire_bytes=2, exchange=mode)
            assert (choice.mode, choice.columns) == (mode, 1)
    assert choose_exchange(PUBLISHED, ExpertGroup(8, 8), tokens=9, wire_bytes=2, exchange="weights").columns == 1


@pytest.mark.parametrize(("width", "top_k", "columns"), [(1024, 1, 8), (1024, 16, 4), (1024, 64, 2), (64, 64, 1)])
def test_auto_takes_the_columns_with_the_fewest_bytes(width: int, top_k: int, columns: int):
    """A 8 to 512: more columns share the width, and each needs every id, gate and partial product."""
    ranks, experts = 8, 8 * top_k
    by_columns = {}
    for number in (1, 2, 4, 8):  # every row shard is hit, as good as
        rows = 4 * (ranks - 1) / number * width * 2 + 4 * (ranks - 1)
        by_columns[number] = rows + experts * number * (1 - 1 / ranks) * (12 if number == 1 else 20)
    assert min(by_columns, key=by_columns.__getitem__) == columns
    (bank,) = PEERConfig(num_experts=1024**2, num_heads=8, top_k=top_k, key_dim=128).banks(place(width))
    choice = choose_exchange(bank, ExpertGroup(ranks, ranks), tokens=8192, wire_bytes=2, exchange="tokens")
    assert choice.columns == columns
    assert choice.tokens_bytes / 8192 == pytest.approx(by_columns[columns], rel=0.01)
    assert (f"tokens in {columns} columns, " in choice.sentence("x")) == (columns > 1)


def test_auto_leaves_segments_of_at_least_32_bytes_and_divides_the_width():
    group = ExpertGroup(4, 4)

    def columns(width: int, wire_bytes: int) -> int:
        (bank,) = PKMConfig(num_keys=100, num_heads=4, top_k=1).banks(place(width))
        return choose_exchange(bank, group, tokens=9, wire_bytes=wire_bytes).columns

    assert [columns(48, wire_bytes) for wire_bytes in (2, 4)] == [2, 4]  # 3 segments, or 6
    assert [columns(width, 4) for width in (64, 66, 67)] == [4, 2, 1]
    assert columns(4, 4) == 1


def test_columns_that_are_given_are_kept_and_banks_without_a_table_have_none():
    small = replace(PUBLISHED, num_groups=16)  # its weights are far fewer bytes
    group = ExpertGroup(8, 8)
    choices = [choose_exchange(small, group, tokens=8192, wire_bytes=2, table_columns=n) for n in ("auto", 1, 2)]
    assert [(choice.mode, choice.columns) for choice in choices] == [("weights", 1), ("weights", 1), ("tokens", 2)]
    assert choose_exchange(MLP, group, tokens=1, wire_bytes=2, exchange="tokens", table_columns=2).columns == 1
