"""Tables: where rows lie, how they are drawn, what their owner computes, what is reported (invariants 10, 11, 14, 16, 18 and 19)."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.tables import sums
from model.dispatch import Copies, LocalDispatcher, LocalPlan
from model.lookup import neurons, table_reports, table_routing, table_rows, weighted_rows
from model.parameters import ExpertBank, Table, logical_parameters, materialize, normal, zeros
from model.product_keys import PairChoice
from model.router import RouterReport
from tests.model import build
from train.optimizer import parameter_groups

J, H, K, D = 4, 2, 3, 5  # 16 rows


def grid(num_keys: int) -> tuple[Tensor, Tensor]:
    first, second = torch.meshgrid(torch.arange(num_keys), torch.arange(num_keys), indexing="ij")
    return first.flatten(), second.flatten()


@pytest.mark.parametrize("num_keys", [1, 2, 7, 8, 12])
def test_every_pair_has_its_row_and_rows_along_a_diagonal_are_neighbours(num_keys: int):
    first, second = grid(num_keys)
    rows = table_rows(first, second, num_keys=num_keys)
    assert sorted(rows.tolist()) == list(range(num_keys**2))
    for row in range(num_keys**2):
        (place,) = (rows == row).nonzero().flatten().tolist()
        assert (first[place] + second[place]) % num_keys == row // num_keys
        assert first[place] == row % num_keys


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_where_the_ranks_divide_the_keys_each_owns_as_many_rows_and_as_many_of_each_sub_key(ranks: int):
    first, second = grid(8)
    owners = table_rows(first, second, num_keys=8) // (64 // ranks)
    for rank in range(ranks):
        for keys in (first, second):
            assert torch.equal(keys[owners == rank].bincount(minlength=8), torch.full((8,), 8 // ranks))


def table(*, rows: int = 3000, rank: int = 0, size: int = 1) -> Table:
    built = Table(rows, {"up": ((3,), normal(1.0)), "down": ((2,), normal(0.5))})
    built.shard(rank=rank, size=size)
    materialize(built, seed=5)
    return built


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_a_table_is_drawn_alike_at_every_sharding_and_its_padding_is_zero(size: int):
    """3000 rows in blocks of 1024: every range but one is cut out of a block, or spans two."""
    whole, ranks = table(), [table(rank=rank, size=size) for rank in range(size)]
    for name in ("up", "down"):
        joined = torch.cat([part.get_parameter(name) for part in ranks])
        assert torch.equal(joined[:3000], whole.get_parameter(name))
        assert not joined[3000:].any()
    covered = [(p.start, p.start + p.numel) for part in ranks for p in logical_parameters(part) if p.attribute == "up"]
    assert [i for start, end in covered for i in range(start, end)] == list(range(9000))


def test_a_rank_of_a_table_may_hold_nothing_but_padding():
    built = table(rows=5, rank=3, size=4)
    assert torch.equal(built.get_parameter("up"), torch.zeros(2, 3))


def test_a_block_of_rows_takes_one_generator_and_no_two_blocks_are_alike():
    drawn = []

    def counted(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        drawn.append(shape)
        return normal(1.0)(shape, generator)

    built = Table(3000, {"rows": ((2,), counted)})
    materialize(built, seed=5)
    assert drawn == [(1024, 2), (1024, 2), (952, 2)]
    rows = built.get_parameter("rows").detach()
    assert len(rows[:, 0].unique()) > 2990


def test_tables_never_decay_and_banks_do():
    model = torch.nn.ModuleList([table(), ExpertBank(3, {"bank": ((2, 2), zeros)})])
    names = {
        group["name"]: [tuple(p.shape) for p in group["params"]] for group in parameter_groups(model, weight_decay=0.1)
    }
    assert names == {"decay": [(3, 2, 2)], "no_decay": [(3000, 3), (3000, 2)]}


def picks(*, tokens: int = 7, one_expert: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """First and second sub-keys, different within a head unless all take one expert, and gates: (T, H, K) each."""
    draws = torch.Generator().manual_seed(4)
    ids = (
        torch.stack([torch.randperm(J * J, generator=draws)[:K] for _ in range(tokens * H)])
        if tokens
        else torch.zeros(0, K)
    )
    ids = ids.long().view(tokens, H, K)
    first, second = ids // J, ids % J
    if one_expert:
        first, second = torch.full_like(first, 2), torch.full_like(second, 1)
    return first, second, build.normal(tokens, H, K, seed=6)


def plan_of(first: Tensor, second: Tensor, gates: Tensor, bank: Table) -> LocalPlan:
    routing = table_routing(table_rows(first, second, num_keys=J), gates, bank)
    (exchange,) = LocalDispatcher().plan(routing)
    arriving = LocalDispatcher().dispatch(exchange, torch.zeros(len(first), 0), label="")
    seen: list[LocalPlan] = []
    LocalDispatcher().combine(arriving, lambda rows, plan: (seen.append(plan), rows)[1], label="").wait()
    return seen[0]


def both_ways(*, tokens: int, one_expert: bool, kind: str) -> tuple[list[Tensor], list[Tensor], Any]:
    """Output and gradients of the owner's sum, and those of plain autograd through a gather of all copies in expert order."""
    bank = Table(J * J, {})
    first, second, gates = picks(tokens=tokens, one_expert=one_expert)
    x, up, down = build.normal(tokens, D, seed=1), build.normal(J * J, D, seed=2), build.normal(J * J, D, seed=3)
    leaves = [leaf.requires_grad_() for leaf in (x, up, down, gates)]
    cotangent = build.normal(tokens, D, seed=9)
    plan = plan_of(first, second, gates, bank)
    rows = table_rows(first, second, num_keys=J)
    if kind == "pkm":
        found, expected = weighted_rows(down, plan), (gates[..., None] * down[rows]).sum((1, 2))
    else:
        found = neurons(x, up, down, plan, activation="gelu")
        hidden = (x[:, None, None] * up[rows]).sum(-1)
        expected = ((gates * F.gelu(hidden))[..., None] * down[rows]).sum((1, 2))
    leaves = leaves if kind == "peer" else [down, gates]
    sums = [
        [y.detach(), *torch.autograd.grad((y * cotangent).sum(), leaves)]
        for y in (found, expected)
    ]  # fmt: skip
    return sums[0], sums[1], rows


@pytest.mark.parametrize("kind", ["pkm", "peer"])
@pytest.mark.parametrize(("tokens", "one_expert"), [(7, False), (7, True), (1, False), (0, False)])
@pytest.mark.parametrize("chunk", [1, 3 * D, 2**20])
def test_the_owners_sums_in_chunks_equal_plain_autograd(
    chunk: int, tokens: int, one_expert: bool, kind: str, monkeypatch
):
    monkeypatch.setattr(sums, "CHUNK_ELEMENTS", chunk)
    found, expected, _ = both_ways(tokens=tokens, one_expert=one_expert, kind=kind)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-13)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_what_a_copy_gets_does_not_depend_on_where_the_table_is_cut(ranks: int):
    first, second, gates = picks(tokens=50)
    rows_C = table_rows(first, second, num_keys=J).flatten()
    # rows of 32 bytes: how MKL adds up a dot product depends on how its operands are aligned
    x, up, down = (build.normal(n, 8, seed=n, dtype=torch.float32) for n in (50, 16, 16))
    gates_C = gates.float().flatten()

    def of_range(start: int, end: int) -> Tensor:
        """Each copy its own output row, so that nothing is summed: (held copies, D), where they came."""
        (held_C,) = ((rows_C >= start) & (rows_C < end)).nonzero(as_tuple=True)
        outputs_C = torch.arange(len(held_C))
        plan = Copies(rows_C[held_C] - start, held_C // (H * K), outputs_C, None, end - start, len(held_C)).sort()
        plan = plan.with_gates(gates_C[held_C])
        found = torch.zeros(len(rows_C), 8)
        found[held_C] = neurons(x, up[start:end], down[start:end], plan, activation="gelu")
        return found

    size = J * J // ranks
    parts = [of_range(start, start + size) for start in range(0, J * J, size)]
    assert torch.equal(torch.stack(parts).sum(0), of_range(0, J * J))


def test_rows_that_nobody_picks_get_exactly_zero_gradients():
    found, _, rows = both_ways(tokens=2, one_expert=False, kind="peer")
    unpicked = torch.ones(J * J, dtype=torch.bool)
    unpicked[rows.flatten()] = False
    assert unpicked.sum() >= 4
    for gradient in found[2:4]:
        assert not gradient[unpicked].any()
        assert gradient[~unpicked].any(dim=1).all()


def test_two_runs_are_equal_bit_for_bit():
    first, again = (both_ways(tokens=7, one_expert=False, kind="peer")[0] for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))


def test_the_plan_has_each_copy_once_and_its_segments_add_up_to_tokens_times_picks():
    first, second, gates = picks()
    plan = plan_of(first, second, gates, Table(J * J, {}))
    counts = plan.offsets_L.diff(prepend=torch.zeros(1, dtype=torch.int32))
    assert torch.equal(counts.long(), table_rows(first, second, num_keys=J).flatten().bincount(minlength=J * J))
    assert plan.offsets_L[-1] == 7 * H * K
    order = plan.gates_C.sort().indices
    assert torch.equal(plan.gates_C[order], gates.flatten().sort().values)
    assert torch.equal(plan.row_index_C, plan.output_index_C)
    assert torch.equal(plan.row_index_C.bincount(), torch.full((7,), H * K))


def test_no_temporary_of_all_copies_is_kept_for_the_backward_pass():
    first, second, gates = picks(tokens=64)
    leaves = [
        value.requires_grad_() for value in (build.normal(64, D), build.normal(16, D), build.normal(16, D), gates)
    ]
    plan = plan_of(first, second, leaves[3], Table(J * J, {}))
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        neurons(leaves[0], leaves[1], leaves[2], plan, activation="gelu")
    assert kept
    assert all(len(shape) == 1 or shape[0] <= 64 for shape in kept)


def test_under_autocast_the_result_and_the_rows_are_bfloat16_and_gradients_of_tables_float32():
    first, second, gates = picks()
    x, up, down = (build.normal(n, D, dtype=torch.float32).requires_grad_() for n in (7, 16, 16))
    plan = plan_of(first, second, gates.float(), Table(J * J, {}))
    exact = neurons(x, up, down, plan, activation="gelu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow, values = neurons(x, up, down, plan, activation="gelu"), weighted_rows(down, plan)
        as_it_travels = neurons(x.bfloat16(), up, down, plan, activation="gelu")
    assert narrow.dtype == values.dtype == torch.bfloat16
    assert torch.equal(narrow, as_it_travels)
    torch.testing.assert_close(narrow.float(), exact, rtol=0.02, atol=0.02 * exact.abs().max().item())
    for gradient in torch.autograd.grad(narrow.float().square().sum(), [x, up, down]):
        assert gradient.dtype == torch.float32


def usage(report: RouterReport) -> tuple[float, float]:
    """Share of the sub-keys in use, and the unevenness in nats that both halves show: see table_reports."""
    share_ZJ = report.probability_G.view(2, -1) / report.num_rows
    entropy = -(share_ZJ * share_ZJ.clamp_min(1e-300).log()).sum()
    return (report.count_G > 0).double().mean().item(), 2 * math.log(share_ZJ.shape[1]) - entropy.item()


def reports_of(first: Tensor, second: Tensor, gates: Tensor, *, ranks: int = 1) -> dict[str, RouterReport]:
    bank = Table(J * J, {})
    bank.shard(rank=0, size=ranks)
    choice = PairChoice(gates, first, second)
    return table_reports(choice, gates, table_rows(first, second, num_keys=J), bank, num_keys=J)


def test_uniform_gates_have_no_unevenness_and_one_expert_for_all_has_log_n():
    first, second = grid(J)
    even = torch.full((1, 1, J * J), 1 / 16, dtype=torch.float64)
    share, unevenness = usage(reports_of(first[None, None], second[None, None], even)["keys"])
    assert share == 1.0
    assert unevenness == pytest.approx(0.0, abs=1e-12)
    one = torch.full((5, 1, 1), 2)
    share, unevenness = usage(reports_of(one, one, torch.ones(5, 1, 1, dtype=torch.float64))["keys"])
    assert share == 1 / J
    assert unevenness == pytest.approx(math.log(J * J), abs=1e-12)


def test_unevenness_is_of_gates_and_never_above_that_of_the_values_themselves():
    first, second, gates = picks(tokens=50)
    gates = gates.abs()
    mass = torch.zeros(J * J, dtype=torch.float64).index_add(0, (first * J + second).flatten(), gates.flatten())
    share = mass / mass.sum()
    exact = math.log(J * J) + (share * share.log()).sum().item()
    found = usage(reports_of(first, second, gates)["keys"])[1]
    assert 0 < found < exact


def test_copies_are_counted_per_sub_key_and_per_rank():
    first, second, gates = picks()
    reports = reports_of(first, second, gates.abs(), ranks=3)  # 6 rows each, and 4 of the last
    keys, ranks = reports["keys"].count_G, reports["ranks"].count_G
    assert keys.tolist() == [
        *first.flatten().bincount(minlength=J).tolist(),
        *second.flatten().bincount(minlength=J).tolist(),
    ]
    owners = table_rows(first, second, num_keys=J).flatten() // 6
    assert ranks.tolist() == owners.bincount(minlength=3).tolist()
    for report, parts in ((reports["keys"], 2), (reports["ranks"], 1)):
        assert report.num_rows == 7
        assert report.probability_G.sum().item() == pytest.approx(parts * 7)


def test_with_all_gates_zero_the_shares_are_those_of_the_copies_and_without_rows_all_is_zero():
    first, second, gates = picks()
    report = reports_of(first, second, torch.zeros_like(gates))["keys"]
    torch.testing.assert_close(report.probability_G, report.count_G / (H * K), rtol=1e-12, atol=0)
    for nothing in reports_of(*picks(tokens=0)).values():
        assert not nothing.count_G.any()
        assert not nothing.probability_G.any()
