"""Experts on other ranks than the first ones: the same results, every tensor where its expert is, and nothing where there is none."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from model.owners import OwnerTable
from model.parameters import ExpertBank, Table, logical_parameters
from parallel.moving import Move
from tests.parallel.pieces import Piece, assemble
from tests.parallel.placed import random_tables
from tests.parallel.test_same_as_one_process import assert_same
from tests.parallel.test_zero import pieces_of, train_one
from tests.parallel.two_steps import Case, many_processes, one_process, open_engine, rows
from train import checkpoint
from train.evaluate import evaluate
from train.step import StepSettings, train_step

LAYOUTS = [(2, 2), (4, 2), (4, 4)]  # the 5 MLP experts leave padding at each
reference = cache(one_process)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(("processes", "ep_size"), LAYOUTS)
def test_experts_at_random_places_equal_one_process(pool, processes: int, ep_size: int, stage: int):
    case = Case(ep_size=ep_size, stage=stage, optimizer="adamw", placed=True)
    expected = reference(Case(optimizer="adamw"))
    assert_same(pool(processes).run(many_processes, case), expected, rtol=1e-4, atol=1e-5)


plain = Case(ep_size=4, placed=True)
recomputed = replace(plain, accumulation_steps=2).with_model(recompute=True, dropout=0.2)
PEER = {"num_experts": 9, "num_heads": 2, "top_k": 3, "key_dim": 6}
VARIANTS = {
    "SGD": replace(plain, ep_size=2, stage=1),
    "dropout of experts and channels": replace(plain, stage=1).with_model(
        switchhead={"expert_dropout": 0.3},
        sigma_moe={"router": "softmax_after", "hidden_dropout": 0.3, "expert_dropout": 0.3, "num_shared_experts": 2},
    ),
    "average keys": replace(plain, stage=2).with_model(sigma_moe={"router": "average_keys", "load_weight": 1.0}),
    "two nodes": replace(plain, node_size=2, stage=1),
    "two nodes, parts, recompute": replace(recomputed, node_size=2, chunks=2, stage=2),
    "parts, every projection": replace(plain, chunks=2).with_model(
        switchhead={"experts": ("q", "k", "v", "o"), "routers": "separate"}
    ),
    "balancing bias": replace(plain, ep_size=2, stage=2).with_model(
        sigma_moe={"balance": "bias", "bias_update_speed": 0.2, "entropy_weight": 0.0},
        switchhead={"entropy_weight": 1.0},
    ),
    "shared over the depth": replace(plain, ep_size=2, accumulation_steps=2).with_model(
        num_layers=4, distinct_layers=2, norm="peri"
    ),
    "beside a table": replace(plain, stage=1).with_model(feedforwards=("sigma_moe", "peer"), peer=PEER),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_models_and_exchanges_at_random_places_equal_one_process(pool, name: str):
    case = VARIANTS[name]
    alone = replace(case, ep_size=1, stage=0, chunks=1, node_size=None, placed=False)
    assert_same(pool(4).run(many_processes, case), reference(alone), rtol=1e-4, atol=1e-5)


def moved_about(case: Case) -> tuple[list[list[Piece]], bool, bool]:
    """What this rank stores after a step: before the move, after one, after another, and at the first places again.

    Then: whether the padding was zero at each, and whether the weights to compute with were those that are stored.
    """
    with open_engine(case) as engine:
        train_one(engine, case, step=0)
        seen, empty, computed = [pieces_of(engine.fragments())], [], []
        first = {path: engine.placement.table(path) for path in engine.placement.banks}
        for tables in (random_tables(engine, seed=1), random_tables(engine, seed=2), first):
            engine.placement.place(tables)
            seen.append(pieces_of(engine.fragments()))
            empty.append(padding_is_zero(engine))
            computed.append(stored_is_computed_with(engine))
        return seen, all(empty), all(computed)


def padding_is_zero(engine) -> bool:
    """In weights and moments, of what the groups leave of the banks that move."""
    for parameter in logical_parameters(engine.model):
        bank, held = parameter.module, engine.held(parameter)
        if not isinstance(bank, ExpertBank) or isinstance(bank, Table) or held is None:
            continue
        weights = torch.zeros(parameter.tensor.numel(), dtype=torch.bool)
        for local, _, numel in parameter.ranges:
            weights[local : local + numel] = True
        for view in held.tensors.values():
            if view[~weights[held.start : held.start + held.numel]].any():
                return False
    return True


def stored_is_computed_with(engine) -> bool:
    parameters = [(parameter, engine.held(parameter)) for parameter in logical_parameters(engine.model)]
    return all(
        torch.equal(p.tensor.detach().flatten()[held.start : held.start + held.numel], held.tensors["master"])
        for p, held in parameters
        if held is not None
    )


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(("processes", "ep_size"), LAYOUTS)
def test_weights_and_moments_move_bit_for_bit_and_leave_nothing_behind(pool, processes: int, ep_size: int, stage: int):
    ranks = pool(processes).run(moved_about, Case(ep_size=ep_size, stage=stage, optimizer="adamw"))
    moments = [assemble(piece for seen, *_ in ranks for piece in seen[moment]) for moment in range(4)]
    experts = moments[0]["layers.0.feedforward.experts.up/exp_avg_sq"].reshape(5, -1)
    assert len({row.tobytes() for row in experts}) == 5, "experts must differ, or a mix-up does not show"
    for after in moments[1:]:
        assert after.keys() == moments[0].keys()
        for name, values in moments[0].items():
            np.testing.assert_array_equal(after[name], values, err_msg=name)
    assert all(empty for _, empty, _ in ranks), "padding must be zero"
    assert all(computed for *_, computed in ranks)
    starts = [[(piece.name, piece.start) for piece in ranks[0][0][moment]] for moment in range(4)]
    assert starts[0] == starts[3] != starts[1], "the first rank must have had other experts in between"


def saved(folder: str, case: Case) -> list[Piece]:
    with open_engine(case) as engine:
        train_one(engine, case, step=0)
        state = checkpoint.TrainState(step=1, position=16, config={}, extra={})
        checkpoint.save(Path(folder), state=state, fragments=engine.owned_fragments(), mesh=engine.mesh, keep=1)
        return pieces_of(engine.fragments())


def read(folder: str, case: Case) -> list[Piece]:
    with open_engine(case) as engine:
        for part in engine.fragments():
            for values in part.tensors.values():
                values.fill_(torch.nan)  # what is not read must show
        newest = checkpoint.latest(Path(folder), mesh=engine.mesh)
        assert newest is not None
        checkpoint.load(newest, fragments=engine.fragments(), mesh=engine.mesh)
        return pieces_of(engine.fragments())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_checkpoint_of_moved_experts_is_read_at_any_layout_and_the_other_way(pool, tmp_path: Path, stage: int):
    there = Case(ep_size=4, stage=stage, optimizer="adamw", placed=True)
    here = [
        (4, there),
        (2, Case(optimizer="adamw", ep_size=2, stage=2, placed=True)),
        (1, Case(optimizer="adamw", stage=1)),
    ]
    written = assemble(piece for rank in pool(4).run(saved, str(tmp_path / "moved"), there) for piece in rank)
    stayed = replace(there, placed=False)
    first = assemble(piece for rank in pool(4).run(saved, str(tmp_path / "stayed"), stayed) for piece in rank)
    for processes, case in here:
        for folder, wanted in (("moved", written), ("stayed", first)):
            found = assemble(
                piece for rank in pool(processes).run(read, str(tmp_path / folder), case) for piece in rank
            )
            assert found.keys() == wanted.keys()
            for name in wanted:
                np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def counted(case: Case) -> tuple[list[dict[str, list[int]]], list[dict[str, np.ndarray]]]:
    """Loads over all ranks after a step and an evaluation of it, and this rank's router reports of that step."""
    with open_engine(case) as engine:
        engine.placement.count()
        batches = rows(case, rank=engine.mesh.rank, num_ranks=engine.mesh.world_size)
        settings = StepSettings(case.accumulation_steps, seed=3, mask_documents=True)
        result = train_step(engine, batches, engine.mesh, settings, step=0, lr=0.1)
        seen = [engine.placement.loads()]
        evaluate(
            engine, rows(case, rank=engine.mesh.rank, num_ranks=engine.mesh.world_size), engine.mesh, settings, step=0
        )
        seen.append(engine.placement.loads())
        engine.placement.move()
        seen.append(engine.placement.loads())
        return seen, [{name: report.count_G.numpy() for name, report in result.reports.items()}]


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_counted_are_the_copies_for_each_group_of_training_steps(pool, recompute: bool):
    """Against what the routers report; recompute counts everything twice."""
    ranks = pool(4).run(counted, Case(ep_size=2, stage=1, accumulation_steps=2).with_model(recompute=recompute))
    loads, evaluated, after = ranks[0][0]
    assert all(seen == ranks[0][0] for seen, _ in ranks)
    assert len(loads) == 6
    for path, load_G in loads.items():
        layer, name = path.rsplit(".", 1)
        report = {"experts": "mlp", "value_experts": "value", "output_experts": "output"}[name]
        (router,) = [key for key in ranks[0][1][0] if key.startswith(layer.rsplit(".", 1)[0]) and key.endswith(report)]
        total_G = sum(reports[0][router] for _, reports in ranks)
        np.testing.assert_array_equal(load_G, (1 + recompute) * total_G, err_msg=path)
    assert evaluated == loads, "an evaluation does not count"
    assert not any(sum(load_G) for load_G in after.values()), "counting begins anew after a move"


def banks_of(case: Case) -> list[str]:
    with open_engine(case) as engine:
        return engine.placement.banks


def test_only_banks_whose_rows_travel_are_moved(pool):
    mixed = Case(ep_size=2).with_model(feedforwards=("sigma_moe", "peer"), peer=PEER)
    mixers = [f"layers.{layer}.mixer.{name}" for layer in range(2) for name in ("value_experts", "output_experts")]
    assert sorted(pool(2).run(banks_of, mixed)[0]) == sorted([*mixers, "layers.0.feedforward.experts"])
    assert pool(2).run(banks_of, replace(mixed, exchange="weights"))[0] == []
    assert pool(2).run(banks_of, Case())[0] == []


def broken(case: Case) -> list[bool | str]:
    """Rank 1 has no memory for what travels: what each rank is told, and whether all is as it was."""
    with open_engine(case) as engine:
        before = pieces_of(engine.fragments())
        path = "layers.1.feedforward.experts"
        tables = {path: random_tables(engine)[path]}
        fails = RuntimeError("no memory") if engine.mesh.rank == 1 else None
        with (
            mock.patch("parallel.placement.Move", wraps=Move, side_effect=fails),
            pytest.raises(RuntimeError) as caught,
        ):
            engine.placement.place(tables)
        after = pieces_of(engine.fragments())
        same = [
            (old.name, old.start) == (new.name, new.start) and np.array_equal(old.values, new.values)
            for old, new in zip(before, after, strict=True)
        ]
        return [str(caught.value), all(same), engine.placement.tables() == {}]


def test_a_rank_that_cannot_move_keeps_all_ranks_from_it(pool):
    for sentence, same, at_first_places in pool(2).run(broken, Case(ep_size=2, stage=1, optimizer="adamw")):
        assert sentence == "no memory (rank 1 of 2)"
        assert same
        assert at_first_places


def sent(case: Case) -> tuple[int, int, set[str]]:
    """Bytes of a move that the ledger has, those that a formula gives, and the words of the watchdog."""
    with open_engine(case) as engine:
        path, mesh = "layers.0.feedforward.experts", engine.mesh
        table = OwnerTable((2, 1, 0, 3, 4), 2)  # first all stay on their rank; then 1 and 4 change places
        engine.placement.place({path: table})
        mesh.ledger.take()
        engine.placement.place({path: OwnerTable((2, 4, 0, 3, 1), 2)})
        moves = {where: sent for where, sent in mesh.ledger.take().sent.items() if where.verb == "move"}
        return sum(one.near + one.far for one in moves.values()), 2 * 32 * 12 * 3 * 4, {str(where) for where in moves}


def test_a_move_sends_the_weights_and_moments_of_what_changes_ranks(pool):
    for found, expected, where in pool(2).run(sent, Case(ep_size=2, stage=0, optimizer="adamw")):
        assert found == expected, "one expert: two matrices of 32 x 12, each with two moments, 4 bytes a number"
        assert where == {"move (layers.0.feedforward.experts) of optimizer"}
