"""ZeroEngine's seams: what it writes and reads for a checkpoint, and the contracts with DeepSpeed's private names."""

import math
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from model.fragments import Fragment, Held
from model.parameters import ExpertBank
from parallel.zero import ZeroEngine, _deepspeed_config
from tests.parallel.pieces import Piece, assemble
from tests.parallel.two_steps import Case, open_engine, optim_config, rows
from train.step import StepSettings, train_step

LAYOUTS = [(2, 1), (2, 2), (4, 2), (4, 4)]
SETTINGS = StepSettings(accumulation_steps=1, seed=3, mask_documents=True)


def pieces_of(fragments: list[Fragment]) -> list[Piece]:
    return [
        Piece(f"{part.name}/{kind}", part.shape, part.start, values.numpy().copy())
        for part in fragments
        for kind, values in part.tensors.items()
    ]


def train_one(engine: ZeroEngine, case: Case, *, step: int, lr: float | None = None) -> float:
    lr = optim_config(case).lr if lr is None else lr
    batches = rows(case, rank=engine.mesh.rank, num_ranks=engine.mesh.world_size)
    for _ in range(step):
        next(batches)
    return train_step(engine, batches, engine.mesh, SETTINGS, step=step, lr=lr).loss


def written(case: Case) -> list[Piece]:
    with open_engine(case) as engine:
        train_one(engine, case, step=0)
        return pieces_of(engine.owned_fragments())


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(("processes", "ep_size"), LAYOUTS)
def test_the_ranks_write_every_element_of_every_tensor_exactly_once(pool, processes, ep_size, stage):
    pieces = [
        piece
        for rank in pool(processes).run(written, Case(ep_size=ep_size, stage=stage, optimizer="adamw"))
        for piece in rank
    ]
    whole = assemble(pieces)  # fails on a gap
    sizes = {piece.name: math.prod(piece.shape) for piece in pieces}
    assert sum(piece.values.size for piece in pieces) == sum(sizes.values()), "an element is written twice"
    assert {name.rpartition("/")[2] for name in whole} == {"master", "exp_avg", "exp_avg_sq"}
    assert sizes["layers.0.feedforward.experts.up/master"] == 5 * 32 * 12, "all experts, no padding"


def interrupted(case: Case) -> tuple[list[float], list[float], list[Piece], list[Piece]]:
    """Losses and state after two steps in one go, and after a step whose state is carried into a new engine."""
    with open_engine(case) as engine:
        losses = [train_one(engine, case, step=0)]
        kept = {
            part.name: {kind: values.clone() for kind, values in part.tensors.items()} for part in engine.fragments()
        }
        losses.append(train_one(engine, case, step=1))
        state = pieces_of(engine.fragments())
    with open_engine(case) as engine:
        for part in engine.fragments():
            for kind, values in part.tensors.items():
                values.fill_(torch.nan)  # what is not put back must show
                values.copy_(kept[part.name][kind])
        engine.restored(step=1)
        resumed = [losses[0], train_one(engine, case, step=1)]
        return losses, resumed, state, pieces_of(engine.fragments())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_state_put_back_into_a_new_engine_repeats_the_next_step_bit_for_bit(pool, stage, dtype):
    case = Case(ep_size=2, stage=stage, optimizer="adamw", dtype=dtype)
    for losses, resumed, state, resumed_state in pool(4).run(interrupted, case):
        assert losses == resumed
        for piece, again in zip(state, resumed_state, strict=True):
            np.testing.assert_array_equal(piece.values, again.values, err_msg=piece.name)


def moved(case: Case) -> list[list[Piece]]:
    """What this rank holds at first, after an update with rate 0, and after one with another rate."""
    with open_engine(case) as engine:
        seen = [pieces_of(engine.fragments())]
        for step, lr in enumerate((0.0, 0.02)):
            train_one(engine, case, step=step, lr=lr)
            seen.append(pieces_of(engine.fragments()))
        return seen


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_each_update_is_made_with_the_rate_it_is_given(pool, stage):
    case = Case(ep_size=2, stage=stage)
    ranks = pool(2).run(moved, case)
    first, still, after = (assemble(piece for rank in ranks for piece in rank[moment]) for moment in range(3))
    for name in first:
        np.testing.assert_array_equal(first[name], still[name], err_msg=name)
        assert not np.array_equal(first[name], after[name]), name


def asked_of_deepspeed(case: Case, update: bool) -> tuple[int, int, bool]:
    """How often its norm is taken and its loss scale looked after in a step; whether the weights moved."""
    with open_engine(case) as engine:
        wrapper, calls = type(engine._deepspeed.optimizer), []
        spies = {}
        for name in ("scaled_global_norm", "_update_scale"):
            real = getattr(wrapper, name)
            spies[name] = lambda *args, real=real, name=name, **kwargs: (calls.append(name), real(*args, **kwargs))[1]
        before = pieces_of(engine.owned_fragments())
        step = engine.step
        with mock.patch.multiple(wrapper, **spies), mock.patch.object(engine, "step") as asked:
            asked.side_effect = lambda lr, *, accept: step(lr, accept=lambda norm: accept(norm) and update)
            train_one(engine, case, step=0)
        after = pieces_of(engine.owned_fragments())
        moved = any(not np.array_equal(old.values, new.values) for old, new in zip(before, after, strict=True))
        return calls.count("scaled_global_norm"), calls.count("_update_scale"), moved


@pytest.mark.parametrize("update", [True, False])
def test_a_step_asks_deepspeed_for_the_norm_once_and_never_for_a_loss_scale(pool, update):
    """The second norm would be a collective more in each step, the scale a line about an overflow for each skipped one."""
    for found in pool(2).run(asked_of_deepspeed, Case(stage=1), update):
        assert found == (1, 0, update)


def step_with_an_overflow(case: Case) -> str:
    """The sentence of a step in which the gradient of the experts of the last rank overflows; the loss does not."""
    with open_engine(case) as engine:
        if engine.mesh.rank == engine.mesh.world_size - 1:
            bank = next(module for module in engine.model.modules() if isinstance(module, ExpertBank))
            next(bank.parameters(recurse=False)).register_hook(lambda gradient: gradient * 1e38 * 1e38)
        with pytest.raises(RuntimeError) as told:
            train_one(engine, case, step=0)
        return str(told.value)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_overflow_in_the_experts_of_one_rank_stops_every_rank_with_one_sentence(pool, stage):
    first, second = pool(2).run(step_with_an_overflow, Case(ep_size=2, stage=stage))
    assert first == second
    assert "must be finite, but at step 1" in first


def opened_with_a_map_that_is_one_too_far() -> str:
    """As a version of DeepSpeed would have it that lays partitions out differently."""
    true_held = ZeroEngine.held

    def shifted(engine: ZeroEngine, parameter) -> Held | None:
        part = true_held(engine, parameter)
        if part is None or parameter.name != "output.weight":
            return part
        return replace(part, start=part.start + 1)

    try:
        with mock.patch.object(ZeroEngine, "held", shifted), open_engine(Case(stage=1)):
            return "opened"
    except RuntimeError as error:
        return str(error)


def test_an_engine_whose_partition_map_points_elsewhere_does_not_open(pool):
    found = pool(2).run(opened_with_a_map_that_is_one_too_far)
    assert any("must hold the weights of output.weight" in message for message in found)


def compiled_op() -> bool:
    with open_engine(Case(stage=1)):
        return sys.modules["deepspeed.comm.torch"].build_shm_op() is not None


def test_deepspeed_compiles_nothing_at_its_start(pool):
    assert not any(pool(2).run(compiled_op))


@pytest.mark.parametrize(("stage", "clip", "written_clip"), [(0, 0.25, 0.0), (1, 0.25, 0.25), (2, 0.0, 0.0)])
def test_gradient_clipping_is_always_written(stage, clip, written_clip):
    config = _deepspeed_config(stage=stage, clip_grad_norm=clip, accumulation_steps=1, dtype=torch.float32)
    assert config["gradient_clipping"] == written_clip
    assert config["zero_optimization"]["round_robin_gradients"] is False
