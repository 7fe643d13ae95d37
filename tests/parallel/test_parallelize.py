"""parallelize: every layout draws the weights of one process, bit for bit, and no rank draws what it does not own."""

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from model.parameters import logical_parameters, materialize
from model.transformer import Transformer
from parallel.expert import AllToAllDispatcher
from parallel.parallelize import parallelize
from parallel.statistics import AllRankStatistics
from tests.parallel.pieces import Piece, assemble
from tests.parallel.two_steps import MODEL, VOCABULARY, Case, exchanges_of, open_world


def drawn(ep_size: int) -> list[Piece]:
    with open_world(ep_size) as mesh:
        model = Transformer(MODEL, vocab_size=VOCABULARY, backend="reference")
        parallelize(model, mesh, seed=7, exchanges=exchanges_of(Case(ep_size=ep_size), mesh.world_size))
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
        parallelize(model, mesh, seed=7, exchanges=exchanges_of(Case(ep_size=ep_size), mesh.world_size))
        return sorted({type(m.dispatcher).__name__ for m in model.modules() if hasattr(m, "dispatcher")})


@pytest.mark.parametrize(("ep_size", "kind"), [(1, "LocalDispatcher"), (2, "AllToAllDispatcher")])
def test_rows_stay_at_home_when_every_rank_has_all_experts(pool, ep_size, kind):
    assert pool(2).run(seen_in_training, ep_size) == [[kind]] * 2


def layers_seen(exchange: Literal["tokens", "weights"]) -> list[tuple[str, list[str], int]]:
    """Of each layer with a dispatcher: the path that it will write into the ledger, the banks whose weights travel, the parts."""
    case = replace(Case(ep_size=2), exchange=exchange)
    with open_world(2) as mesh:
        model = Transformer(MODEL, vocab_size=VOCABULARY, backend="reference")
        parallelize(model, mesh, seed=7, exchanges=exchanges_of(case, 2), chunks=3)
        paths = {module: path for path, module in model.named_modules()}
        for path, module in model.named_modules():
            if isinstance(statistics := getattr(module, "statistics", None), AllRankStatistics):
                assert statistics.where.layer == path
        found = [getattr(module, "dispatcher", None) for module in model.modules()]
        return [
            (one.layer, sorted(paths[bank] for bank in one.gathered), one.chunks)
            for one in found
            if isinstance(one, AllToAllDispatcher)
        ]


@pytest.mark.parametrize("exchange", ["tokens", "weights"])
def test_each_layer_has_a_dispatcher_that_knows_its_path_and_what_travels(pool, exchange):
    seen, *_ = pool(2).run(layers_seen, exchange)
    parts = [f"layers.{depth}.{part}" for depth in range(2) for part in ("mixer", "feedforward")]
    names = {"mixer": ["output_experts", "value_experts"], "feedforward": ["experts"]}
    banks = sorted(f"{part}.{name}" for part in parts for name in names[part.split(".")[2]])
    assert seen == [(part, banks if exchange == "weights" else [], 3) for part in parts]


def without_its_shape() -> str:
    with open_world(2) as mesh:
        model = Transformer(MODEL, vocab_size=VOCABULARY, backend="reference")
        chosen = exchanges_of(Case(ep_size=2), 2)
        del chosen["layers.1.mixer.output_experts"]
        with pytest.raises(RuntimeError) as caught:
            parallelize(model, mesh, seed=7, exchanges=chosen)
        return str(caught.value)


def test_a_bank_that_its_section_does_not_name_is_an_error(pool):
    for sentence in pool(2).run(without_its_shape):
        assert "banks(), but layers.1.mixer.output_experts is not" in sentence
