"""Logical parameters: equal values at every sharding, padding, names and counts."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.parameters import (
    DeclaringModule,
    ExpertBank,
    Table,
    add_updates,
    count_parameters,
    logical_parameters,
    materialize,
    normal,
    ones,
    states_of,
    truncated_normal,
    zeros,
)
from model.transformer import Transformer
from tests.model.build import VOCABULARY, model_config, switchall_config

SIZES = pytest.mark.parametrize("size", [1, 2, 3, 4, 7])


def model(*, rank: int = 0, size: int = 1, seed: int = 5) -> Any:
    """A SwitchAll with 6 groups in its attention banks and 5 in its MLP bank, sharded as parallel/ does it."""
    built = Transformer(switchall_config(), vocab_size=VOCABULARY, backend="reference")
    for module in built.modules():
        if isinstance(module, ExpertBank):
            module.shard(rank=rank, size=size)
    materialize(built, seed=seed)
    return built


def blocks(built: nn.Module) -> dict[tuple[str, int], Tensor]:
    """Every separately drawn block by (name, expert group), constants left out."""
    found = {}
    for parameter in logical_parameters(built):
        if parameter.spec.draw not in (zeros, ones):
            parts = parameter.tensor if isinstance(parameter.module, ExpertBank) else [parameter.tensor]
            found |= {(parameter.name, group): part.detach() for group, part in enumerate(parts)}
    return found


@SIZES
def test_the_owned_groups_of_all_ranks_are_the_unsharded_bank_bit_for_bit_and_the_padding_is_zero(size: int):
    whole = {parameter.name: parameter for parameter in logical_parameters(model())}
    ranks = [list(logical_parameters(model(rank=rank, size=size))) for rank in range(size)]
    for of_all_ranks in zip(*ranks, strict=True):
        expected = whole[of_all_ranks[0].name]
        if isinstance(expected.module, ExpertBank):
            groups = expected.tensor.shape[0]
            joined = torch.cat([part.tensor for part in of_all_ranks])
            assert joined.shape[0] == math.ceil(groups / size) * size
            assert torch.equal(joined[:groups], expected.tensor)
            assert not joined[groups:].any()
        else:
            assert all(torch.equal(part.tensor, expected.tensor) for part in of_all_ranks)


@SIZES
def test_the_ranges_of_all_ranks_cover_every_logical_element_once(size: int):
    ranks = [list(logical_parameters(model(rank=rank, size=size))) for rank in range(size)]
    for of_all_ranks in zip(*ranks, strict=True):
        elements = math.prod(of_all_ranks[0].spec.shape)
        if isinstance(of_all_ranks[0].module, ExpertBank):
            covered = [i for part in of_all_ranks for i in range(part.start, part.start + part.numel)]
            assert covered == list(range(elements))
        else:
            assert {(part.start, part.numel) for part in of_all_ranks} == {(0, elements)}


def table(*, rank: int = 0, size: int = 1, columns: int = 1, rows: int = 2500) -> Table:
    """Two weights of 6 and 12 columns, in blocks of 1024 rows."""
    built = Table(rows, {"up": ((6,), normal(1.0)), "down": ((12,), normal(0.5))})
    built.shard(rank=rank, size=size, columns=columns)
    materialize(built, seed=5)
    return built


@pytest.mark.parametrize(("row_shards", "columns"), [(1, 2), (1, 6), (2, 3), (3, 2), (4, 1), (7, 6)])
def test_rows_and_columns_of_a_table_are_drawn_as_in_one_piece(row_shards: int, columns: int):
    """rank = row shard * columns + column; what is drawn together (1024 rows) is cut by rows and by columns."""
    size = row_shards * columns
    ranks = [table(rank=rank, size=size, columns=columns) for rank in range(size)]
    for name, expected in table().named_parameters():
        rows = [
            torch.cat([ranks[row * columns + column].get_parameter(name) for column in range(columns)], dim=1)
            for row in range(row_shards)
        ]
        joined = torch.cat(rows)
        assert torch.equal(joined[:2500], expected)
        assert not joined[2500:].any()
    for rank, built in enumerate(ranks):
        assert (built.column, built.columns, built.num_ranks) == (rank % columns, columns, row_shards)
        assert built.num_local == math.ceil(2500 / row_shards)
        assert built.first_group == rank // columns * built.num_local


@pytest.mark.parametrize(("row_shards", "columns", "rows"), [(1, 2, 5), (2, 3, 5), (3, 2, 7), (4, 6, 5)])
def test_the_boxes_of_all_ranks_hold_every_element_once_and_lie_where_the_weights_lie(
    row_shards: int, columns: int, rows: int
):
    whole = {p.name: p.tensor for p in logical_parameters(table(rows=rows))}
    count = {name: torch.zeros(tensor.shape) for name, tensor in whole.items()}
    for rank in range(row_shards * columns):
        built = table(rank=rank, size=row_shards * columns, columns=columns, rows=rows)
        for parameter in logical_parameters(built):
            assert parameter.start == 0
            assert parameter.box is not None
            place = tuple(slice(*side) for side in parameter.box)
            held = parameter.tensor.flatten()[: parameter.numel]
            assert torch.equal(held, whole[parameter.name][place].flatten())
            count[parameter.name][place] += 1
    assert all((seen == 1).all() for seen in count.values())
    assert all(parameter.box is None for parameter in logical_parameters(table(rank=1, size=3)))


def test_a_rank_of_a_column_may_hold_nothing_but_padding():
    built = table(rank=7, size=8, columns=2, rows=5)  # two rows to a shard, six in the first three
    assert [(p.box, p.numel) for p in logical_parameters(built)] == [(((5, 5), (3, 6)), 0), (((5, 5), (6, 12)), 0)]
    assert not any(parameter.any() for parameter in built.parameters())
    assert count_parameters(built) == 5 * 18


@pytest.mark.parametrize(
    ("size", "columns", "sentence"),
    [
        (
            6,
            4,
            "must divide the ranks that share it, but they are 4 and the ranks that share it 6: set parallel.table_columns to a divisor",
        ),
        (
            4,
            4,
            "must divide the width of up, but they are 4 and the width of up 6: set parallel.table_columns to a divisor",
        ),
    ],
)
def test_columns_that_do_not_divide_are_refused_with_both_values(size: int, columns: int, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        table(rank=0, size=size, columns=columns)


def test_a_rank_may_hold_nothing_but_padding():
    bank = ExpertBank(5, {"up": ((2, 3), normal(1.0)), "down": ((3, 2), normal(1.0))})
    bank.shard(rank=6, size=7)
    materialize(bank, seed=1)
    assert (bank.num_local, bank.first_group) == (1, 6)
    assert torch.equal(bank.get_parameter("up"), torch.zeros(1, 2, 3))
    assert [parameter.numel for parameter in logical_parameters(bank)] == [0, 0]
    assert count_parameters(bank) == 60


@pytest.mark.parametrize(("size", "rank"), [(2, 1), (4, 0), (4, 3), (7, 6)])
def test_names_shapes_order_and_count_do_not_depend_on_the_sharding(size: int, rank: int):
    def described(built: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
        return [(parameter.name, parameter.spec.shape) for parameter in logical_parameters(built)]

    assert described(model(rank=rank, size=size)) == described(model())
    assert count_parameters(model(rank=rank, size=size)) == count_parameters(model())


def test_the_count_is_that_of_the_tensors_of_one_process():
    assert count_parameters(model()) == sum(parameter.numel() for parameter in model().parameters())


def test_names_are_paths_and_every_parameter_has_one():
    built = Transformer(model_config(), vocab_size=VOCABULARY, backend="reference")
    named = dict(built.named_parameters())
    assert [parameter.name for parameter in logical_parameters(built)] == list(named)
    assert all(parameter.tensor is named[parameter.name] for parameter in logical_parameters(built))


def test_no_two_blocks_are_drawn_alike_even_with_the_same_shape():
    found = blocks(model())
    assert len({tuple(block.flatten()[:4].tolist()) for block in found.values()}) == len(found) > 50


def test_the_same_seed_draws_the_same_weights_and_another_seed_others():
    first, again, other = blocks(model()), blocks(model()), blocks(model(seed=6))
    for name, block in first.items():
        assert torch.equal(block, again[name])
        assert not (block == other[name]).any()


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    model()
    assert torch.equal(torch.rand(3), expected)


def test_float64_weights_are_the_float32_weights_exactly():
    narrow, wide = model(), model()
    materialize(wide, seed=5, dtype=torch.float64)
    for left, right in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert right.dtype == torch.float64
        assert torch.equal(left.double(), right)


def test_nothing_is_allocated_before_materialize():
    built = Transformer(model_config(), vocab_size=VOCABULARY, backend="reference")
    assert all(parameter.is_meta for parameter in built.parameters())


def test_truncated_normal_is_cut_at_two_sigma_and_has_exactly_the_wanted_standard_deviation():
    values = truncated_normal(0.3)((200, 100), torch.Generator().manual_seed(1)).double()
    assert values.std().item() == pytest.approx(0.3, rel=1e-5)
    cut = 2 / 0.8796  # a normal cut at two sigma has a standard deviation of 0.8796
    assert 0.98 * cut < (values.abs().max() / 0.3).item() < 1.01 * cut


def test_a_parameter_that_was_not_declared_is_refused_by_name():
    built = model()
    built.layers[1].extra = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"layers\.1\.extra\.weight was not: use DeclaringModule\.declare"):
        count_parameters(built)


def test_a_declared_parameter_is_known_by_its_full_shape():
    module = DeclaringModule()
    module.declare("table", (3, 4), normal(1.0))
    assert [(p.name, p.spec.shape, p.start, p.numel) for p in logical_parameters(module)] == [("table", (3, 4), 0, 12)]


class Counting(DeclaringModule):
    """A module with a state beside its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.declare("weight", (2,), ones)
        self.declare_state("seen", (3,), value=0.5)


def counting() -> nn.Module:
    model = nn.Module()
    model.add_module("inner", Counting())
    return model


def test_a_state_starts_at_its_value_without_a_gradient_and_is_no_parameter():
    model = counting()
    materialize(model, seed=1, dtype=torch.float64)
    (seen,) = states_of(model).values()
    assert seen.tolist() == [0.5] * 3
    assert seen.dtype == torch.float64
    assert not seen.requires_grad
    assert [parameter.name for parameter in logical_parameters(model)] == ["inner.weight"]
    assert count_parameters(model) == 2


def test_updates_are_added_to_their_states():
    model = counting()
    materialize(model, seed=1)
    add_updates(model, {"inner.seen": torch.tensor([1.0, 2.0, -0.5])})
    assert states_of(model)["inner.seen"].tolist() == [1.5, 2.5, 0.0]


def test_a_buffer_that_was_not_declared_is_refused():
    model = counting()
    model.register_buffer("forgotten", torch.zeros(1))
    with pytest.raises(RuntimeError, match="forgotten was not: use"):
        states_of(model)
