"""product_key_topk by every backend, Triton's in the interpreter: the choice against scoring all pairs, scores and gradients against a
loop in float64 (invariants 1 to 3, 7 and 8 of specs of arXiv 2407.04153, section 6)."""

# pyright: reportArgumentType=false
# A launch passes numbers where a kernel declares tl.constexpr.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.product_key_topk import PairChoice, cpu, product_key_topk
from kernels.product_key_topk.cpu import staircase
from kernels.product_key_topk.kernel import _id, _pack, _score
from tests.kernels.compare import assert_same

Run = Callable[..., Any]
Inputs = dict[str, Tensor]
LEAVES = ("queries", "keys")
NAMES = ("scores", "first", "second", *LEAVES)
BACKENDS = ("triton", "torch", "reference")
SIZES = [(4, 1), (4, 4), (4, 16), (5, 7), (7, 8), (12, 16), (23, 9), (40, 32)]  # sub-keys of a half, picks


@dataclass(frozen=True)
class Case:
    """T tokens, H heads with K picks, J sub-keys of width C. own: which of queries and keys each head has for itself."""

    tokens: int
    heads: int
    picks: int
    num_keys: int
    width: int
    own: tuple[str, ...] = LEAVES


# A tile has 16 tokens, 128 sub-keys and 16 of the width.
CASES = {
    "T5_H2_K4_J7_C3": Case(5, 2, 4, 7, 3),
    "T37_H3_K16_J4_C40_one_query_and_all_pairs": Case(37, 3, 16, 4, 40, own=("keys",)),
    "T17_H3_K9_J130_C33_one_set_of_keys_two_blocks": Case(17, 3, 9, 130, 33, own=("queries",)),
    "T6_H2_K1_J5_C4_one_pick": Case(6, 2, 1, 5, 4),
    "T3_H1_K3_J2_C2_more_picks_than_keys": Case(3, 1, 3, 2, 2),
    "T1_H1_K1_J1_C1_scalars": Case(1, 1, 1, 1, 1),
    "T0_H2_K3_J4_C5_no_tokens": Case(0, 2, 3, 4, 5),
}


def make_inputs(case: Case, *, whole_numbers: bool = False) -> Inputs:
    """whole_numbers: of -1 to 1, whose products are exact and often equal."""
    generator = torch.Generator().manual_seed(0)
    heads = {name: case.heads if name in case.own else 1 for name in LEAVES}
    shapes = {
        "queries": (case.tokens, heads["queries"], 2, case.width),
        "keys": (heads["keys"], 2, case.num_keys, case.width),
        "gradient": (case.tokens, case.heads, case.picks),
    }
    draw = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: each.sign().round() if whole_numbers and name in LEAVES else each for name, each in draw.items()}


def by_backend(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """Empty memory holds NaN: torch fills it where results must repeat."""
    leaves = [inputs[name].detach().requires_grad_() for name in LEAVES]
    torch.use_deterministic_algorithms(True)
    try:
        choice = product_key_topk(*leaves, top_k=inputs["gradient"].shape[2], backend=backend)
        gradients = torch.autograd.grad(choice.scores_THK, leaves, inputs["gradient"].to(choice.scores_THK.dtype))
    finally:
        torch.use_deterministic_algorithms(False)
    first, second = choice.first_THK, choice.second_THK
    return dict(zip(NAMES, (choice.scores_THK.detach(), first, second, *gradients), strict=True))


def in_small_tiles(inputs: Inputs) -> dict[str, Tensor]:
    """By the kernels with tiles of 16 x 16, 16 at a time, so that a small shape has many."""
    import kernels.product_key_topk.kernel as kernel

    before = kernel.TILES
    kernel.TILES = [kernel.Tiles(16, 16, 16, 4)]
    try:
        return by_backend(inputs, "triton")
    finally:
        kernel.TILES = before


def all_pairs(scores_THZJ: Tensor, picks: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best scores and their sub-keys by scoring every pair, among equal ones the lowest id a J + b."""
    sums_THG = (scores_THZJ[..., 0, :, None] + scores_THZJ[..., 1, None, :]).flatten(-2)
    ordered = sums_THG.sort(dim=-1, descending=True, stable=True)
    ids_THK = ordered.indices[..., :picks]
    return ordered.values[..., :picks], ids_THK // scores_THZJ.shape[-1], ids_THK % scores_THZJ.shape[-1]


def loop(inputs: Inputs) -> dict[str, Tensor]:
    """In float64; the gradients pick after pick."""
    queries, keys, gradient = (inputs[name].double() for name in (*LEAVES, "gradient"))
    heads = gradient.shape[1]
    scores = torch.stack(
        [
            torch.stack(
                [queries[:, h % queries.shape[1], z] @ keys[h % len(keys), z].T for z in (0, 1)], dim=1
            )
            for h in range(heads)
        ],
        dim=1,
    )  # fmt: skip
    best, first, second = all_pairs(scores, gradient.shape[2])
    of_queries, of_keys = torch.zeros_like(queries), torch.zeros_like(keys)
    for t, h, k in torch.ones_like(gradient).nonzero().tolist():
        for z, ids in enumerate((first, second)):
            q, row = (t, h % queries.shape[1], z), (h % len(keys), z, int(ids[t, h, k]))
            of_queries[q] += gradient[t, h, k] * keys[row]
            of_keys[row] += gradient[t, h, k] * queries[q]
    return dict(zip(NAMES, (best, first, second, of_queries, of_keys), strict=True))


@pytest.mark.parametrize("whole_numbers", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("name", CASES)
def test_scores_choice_and_gradients_equal_a_loop_over_the_picks(
    name: str, whole_numbers: bool, interpreted: Run
) -> None:
    inputs = make_inputs(CASES[name], whole_numbers=whole_numbers)
    wanted = loop(inputs)
    assert_same(interpreted(by_backend, inputs, "triton"), wanted)
    for backend in ("torch", "reference"):
        found = by_backend({name: each.double() for name, each in inputs.items()}, backend)
        assert_same(found, wanted, tolerance=1e-13)


@given(
    tokens=st.integers(0, 20),
    heads=st.integers(1, 2),
    picks=st.integers(1, 12),
    num_keys=st.integers(1, 40),
    width=st.integers(1, 20),
    own=st.sampled_from([LEAVES, LEAVES[:1], LEAVES[1:]]),
    whole_numbers=st.booleans(),
)
def test_any_shape_in_any_number_of_tiles_equals_a_loop(interpreted: Run, whole_numbers: bool, **shape: Any) -> None:
    case = Case(**shape | {"picks": min(shape["picks"], shape["num_keys"] ** 2)})
    inputs = make_inputs(case, whole_numbers=whole_numbers)
    wanted = loop(inputs)
    assert_same(interpreted(in_small_tiles, inputs), wanted)
    assert_same(by_backend(inputs, "torch"), wanted)


def chosen(scores_THZJ: Tensor, picks: int, backend: str) -> PairChoice:
    """Of scores that are given: as queries of J numbers, with the unit vectors for sub-keys. 0 * x + y is y, so they stay what they are."""
    keys_1ZJJ = torch.eye(scores_THZJ.shape[-1], dtype=scores_THZJ.dtype).expand(1, 2, -1, -1)
    return product_key_topk(scores_THZJ, keys_1ZJJ, top_k=picks, backend=backend)


@pytest.fixture(params=BACKENDS)
def choose(request: pytest.FixtureRequest, interpreted: Run) -> Callable[[Tensor, int], PairChoice]:
    """By each backend, from scores in float32."""
    call = interpreted if request.param == "triton" else lambda function, *args: function(*args)
    return lambda scores_THZJ, picks: PairChoice(*call(chosen, scores_THZJ.float(), picks, request.param))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


Choose = Callable[[Tensor, int], PairChoice]


@pytest.mark.parametrize(("num_keys", "picks"), SIZES)
def test_the_choice_is_that_of_scoring_all_pairs(choose: Choose, num_keys: int, picks: int) -> None:
    scores = normal(9, 2, 2, num_keys, seed=picks)
    for found, wanted in zip(choose(scores, picks), all_pairs(scores, picks), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(("num_keys", "picks"), SIZES)
def test_among_equal_scores_the_lowest_expert_id_wins(choose: Choose, num_keys: int, picks: int) -> None:
    """Whole numbers add up exactly, so every tie is one of equal parts or of different parts with the same sum; 0 is also -0."""
    draws = torch.Generator().manual_seed(picks)
    spans = torch.tensor([1, 2, 4]).repeat_interleave(5)[:, None, None, None]
    scores = (torch.rand(15, 1, 2, num_keys, generator=draws) * spans).floor()
    scores *= torch.randint(0, 2, scores.shape, generator=draws) * 2 - 1
    for found, wanted in zip(choose(scores, picks)[1:], all_pairs(scores, picks)[1:], strict=True):
        assert torch.equal(found, wanted)


@triton.jit
def pack_and_unpack(scores, ids, packed, unpacked, unpacked_ids, N: tl.constexpr):
    n = tl.arange(0, N)
    numbers = _pack(tl.load(scores + n), tl.load(ids + n))
    tl.store(packed + n, numbers)
    tl.store(unpacked + n, _score(numbers))
    tl.store(unpacked_ids + n, _id(numbers))


def packed(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = torch.empty_like(ids, dtype=torch.int64), torch.empty_like(scores), torch.empty_like(ids)
    pack_and_unpack[(1,)](scores, ids, *found, len(scores))
    return found


def test_packed_numbers_are_in_the_order_of_scores_and_then_of_lower_ids(interpreted: Run) -> None:
    """A sum of negative products that underflow is -0.0 on a GPU, where the interpreter makes it 0.0: both are one score."""
    numbers = torch.tensor([-torch.inf, -3e38, -1.0, -1e-38, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 1.0, 3e38, torch.inf])
    scores = torch.cat([numbers, numbers.flip(0), torch.full((8,), -0.0)])
    ids = torch.arange(len(scores), dtype=torch.int32)
    ids[-1] = 2**31 - 2
    found, unpacked, unpacked_ids = interpreted(packed, scores, ids)
    assert torch.equal(found.argsort(descending=True), scores.sort(descending=True, stable=True).indices)
    assert torch.equal(unpacked, scores)
    assert torch.equal(unpacked_ids, ids)


def test_ties_that_only_rounding_makes_leave_the_scores_of_the_choice_right(choose: Choose) -> None:
    scores = normal(30, 1, 2, 12) + 2.0**20  # sums are rounded to steps of 1/8 or 1/4
    best = all_pairs(scores, 16)[0]
    assert (best.diff(dim=-1) == 0).any()
    choice = choose(scores, 16)
    assert torch.equal(choice.scores_THK, best)
    assert all(len(row.unique()) == 16 for row in (choice.first_THK * 12 + choice.second_THK).flatten(0, 1))


def test_scores_of_all_sizes_are_in_order(choose: Choose) -> None:
    """Not their ids: a small part is lost beside a large one, so nearly all sums are ties that rounding makes."""
    powers = torch.randint(-38, 37, (20, 1, 2, 9), generator=torch.Generator().manual_seed(1))
    scores = normal(20, 1, 2, 9) * 10.0**powers
    assert torch.equal(choose(scores, 6).scores_THK, all_pairs(scores, 6)[0])


def test_the_first_pick_is_the_best_of_both_halves_and_the_second_shares_one_with_it(choose: Choose) -> None:
    scores = normal(30, 2, 2, 9)
    choice = choose(scores, 12)
    assert torch.equal(choice.first_THK[..., 0], scores[..., 0, :].argmax(-1))
    assert torch.equal(choice.second_THK[..., 0], scores[..., 1, :].argmax(-1))
    same = (choice.first_THK[..., :2].diff() == 0) | (choice.second_THK[..., :2].diff() == 0)
    assert same.all()


def test_a_constant_added_to_a_half_changes_no_choice(choose: Choose) -> None:
    scores = (normal(20, 2, 2, 6) * 64).round()
    before, after = choose(scores, 5), choose(scores + torch.tensor([48.0, -160.0])[:, None], 5)
    assert torch.equal(before.first_THK, after.first_THK)
    assert torch.equal(before.second_THK, after.second_THK)
    assert torch.equal(before.scores_THK - 112.0, after.scores_THK)


@pytest.mark.parametrize(("picks", "count"), [(8, 20), (16, 50), (32, 119), (64, 280), (128, 645)])
def test_the_number_of_candidates_is_the_sum_of_k_div_i(picks: int, count: int) -> None:
    assert len(staircase(picks, 1024)[0]) == count == sum(picks // i for i in range(1, picks + 1))


def test_candidate_ranks_are_those_whose_product_is_at_most_k() -> None:
    first, second = staircase(6, 4)
    assert sorted(zip(first, second, strict=True)) == [
        (0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 0)
    ]  # fmt: skip


def test_chunks_of_tokens_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(Case(23, 2, 5, 9, 4))
    whole = by_backend(inputs, "torch")
    monkeypatch.setitem(cpu.CHUNK_ELEMENTS, "cpu", 5 * 2 * 2 * 9)
    assert_same(by_backend(inputs, "torch"), whole)
