"""Experts on other ranks than the first ones: the same results, every tensor where its expert is, and nothing where there is none."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from model.parameters import ExpertBank, Table, logical_parameters
from tests.parallel.pieces import Piece, assemble
from tests.parallel.placed import random_tables
from tests.parallel.test_same_as_one_process import assert_same
from tests.parallel.test_zero import pieces_of, train_one
from tests.parallel.two_steps import Case, many_processes, one_process, open_engine

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
        first = {path: engine.placement._table_of(path) for path in engine.placement.banks}
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
