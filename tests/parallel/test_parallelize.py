"""parallelize: every layout draws the weights of one process, bit for bit, and no rank draws what it does not own."""

import math

import numpy as np
import pytest

from model.parameters import logical_parameters, materialize
from model.transformer import Transformer
from parallel.parallelize import parallelize
from tests.parallel.two_steps import MODEL, VOCABULARY, Piece, assemble, open_world


def drawn(ep_size: int) -> list[Piece]:
    with open_world(ep_size) as mesh:
        model = Transformer(MODEL, vocab_size=VOCABULARY, backend="reference")
        parallelize(model, mesh, seed=7)
        for parameter in logical_parameters(model):  # padding is zero
            assert not parameter.tensor.detach().flatten()[parameter.numel :].any()
        return pieces(model)


def pieces(model: Transformer) -> list[Piece]:
    return [
        Piece(p.name, p.spec.shape, p.start, p.tensor.detach().flatten()[: p.numel].numpy().copy())
        for p in logical_parameters(model)
    ]


@pytest.mark.parametrize(("processes", "ep_size"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_the_first_weights_are_those_of_one_process_bit_for_bit(pool, processes, ep_size):
    alone = Transformer(MODEL, vocab_size=VOCABULARY, backend="reference")
    materialize(alone, seed=7)
    expected = assemble(pieces(alone))
    ranks = pool(processes).run(drawn, ep_size)
    found = assemble(piece for rank in ranks for piece in rank)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    banks = [piece for rank in ranks for piece in rank if "experts" in piece.name]
    held = sum(piece.values.size for piece in banks)
    whole = sum(math.prod(piece.shape) for piece in banks) // processes
    assert held == whole * (processes // ep_size), "each expert group holds every expert once"


def seen_in_training(ep_size: int) -> list[str]:
    with open_world(ep_size) as mesh:
        model = Transformer(MODEL, vocab_size=VOCABULARY, backend="reference")
        parallelize(model, mesh, seed=7)
        return sorted({type(m.dispatcher).__name__ for m in model.modules() if hasattr(m, "dispatcher")})


@pytest.mark.parametrize(("ep_size", "kind"), [(1, "LocalDispatcher"), (2, "AllToAllDispatcher")])
def test_rows_stay_at_home_when_every_rank_has_all_experts(pool, ep_size, kind):
    assert pool(2).run(seen_in_training, ep_size) == [[kind]] * 2
