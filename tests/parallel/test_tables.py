"""Product-key tables over an expert group: the layers in float64, the queries' statistics, checkpoints at another ep_size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.context import BatchContext
from model.parameters import logical_parameters, materialize, states_of
from model.product_key_config import PEERConfig, PKMConfig
from model.section import Place
from parallel.expert import AllToAllDispatcher
from parallel.parallelize import parallelize
from parallel.volume import BankExchange
from tests.parallel.pieces import Piece, assemble
from tests.parallel.test_zero import train_one
from tests.parallel.two_steps import Case, open_engine, open_world
from train import checkpoint

D, LENGTH, SEQUENCES = 6, 4, [3, 0, 5, 1]  # one rank has no rows
# 9 rows on 2 ranks leave one of padding, on 4 ranks three; every third rank of 4 ends inside a diagonal
LAYERS = {
    "pkm": PKMConfig(num_keys=3, num_heads=2, top_k=4, scores="relu"),
    "gated": PKMConfig(num_keys=3, num_heads=2, top_k=4, key_dim=4, query_norm="batch", gated=True),
    "peer": PEERConfig(num_experts=9, num_heads=2, top_k=3, key_dim=4, query_norm="none"),
    "batch-normed": PEERConfig(num_experts=9, num_heads=2, top_k=3, key_dim=4),
}


def rows_of(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and cotangent."""
    drawn = torch.Generator().manual_seed(100 + rank)
    shape = (SEQUENCES[rank], LENGTH, D)
    return tuple(torch.randn(shape, generator=drawn, dtype=torch.float64) for _ in range(2))  # pyright: ignore[reportReturnType]


def built(kind: str) -> Any:
    return LAYERS[kind].build(Place(D, 2, 0, ("attention",) * 2, "reference", 0.0))


def results(layer: Any, x: torch.Tensor, cotangent: torch.Tensor) -> dict[str, Any]:
    x = x.requires_grad_()
    output = layer(x, BatchContext(torch.arange(len(x)), None, 1, 0))
    (output.y_BSD * cotangent).sum().backward()
    gradients = [
        Piece(p.name, p.spec.shape, p.start, p.tensor.grad.flatten()[: p.numel].numpy(), p.box)  # pyright: ignore[reportOptionalMemberAccess]
        for p in logical_parameters(layer)
    ]
    return {
        "y": output.y_BSD.detach().numpy(),
        "x": x.grad.numpy(),  # pyright: ignore[reportOptionalMemberAccess]
        "gradients": gradients,
        "updates": {name: update.numpy() for name, update in output.updates.items()},
        "counts": {name: report.count_G.numpy() for name, report in output.reports.items()},
    }


def by_columns(columns: int) -> dict[str, BankExchange]:
    """PKM's table and PEER's, by path in the layer."""
    return dict.fromkeys(("table", "experts"), BankExchange("tokens", columns, 0.0, 0.0))


def on_this_rank(kind: str, ep_size: int, columns: int) -> dict[str, Any]:
    with open_world(ep_size) as mesh:
        layer = built(kind)
        parallelize(layer, mesh, seed=7, exchanges=by_columns(columns))
        assert isinstance(layer.dispatcher, AllToAllDispatcher) == (ep_size > 1)
        layer.double()
        return results(layer, *rows_of(mesh.rank))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("processes", "ep_size", "columns"), [(4, 2, 1), (4, 4, 1), (2, 2, 1), (4, 2, 2), (4, 4, 2), (2, 2, 2)]
)
def test_outputs_gradients_and_updates_equal_one_process_in_float64(pool, processes, ep_size, columns, kind):
    alone = built(kind)
    materialize(alone, seed=7, dtype=torch.float64)
    x, cotangent = (torch.cat(parts) for parts in zip(*map(rows_of, range(processes)), strict=True))
    expected = results(alone, x, cotangent)
    ranks = pool(processes).run(on_this_rank, kind, ep_size, columns)

    found = {key: np.concatenate([rank[key] for rank in ranks]) for key in ("y", "x")}
    for key in ("y", "x"):
        np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=1e-13)
    for wanted in expected["gradients"]:
        total = np.zeros(wanted.values.size)
        for rank in ranks:  # replicated weights get a share from every rank, a table's rows one from each expert group
            (piece,) = [piece for piece in rank["gradients"] if piece.name == wanted.name]
            total[piece.elements()] += piece.values
        np.testing.assert_allclose(total, wanted.values, rtol=0, atol=1e-12, err_msg=wanted.name)
    for rank in ranks:
        for name, update in expected["updates"].items():
            np.testing.assert_allclose(rank["updates"][name], update, rtol=0, atol=1e-14)
            np.testing.assert_array_equal(rank["updates"][name], ranks[0]["updates"][name])
    keys, copies = (np.sum([rank["counts"][name] for rank in ranks], axis=0) for name in ("keys", "ranks"))
    np.testing.assert_array_equal(keys, expected["counts"]["keys"])
    assert len(copies) == ep_size // columns
    assert copies.sum() == expected["counts"]["ranks"].sum()


def narrow_on_this_rank(kind: str) -> tuple[np.ndarray, bool]:
    """The output under autocast, and whether all gradients came out in float32."""
    with open_world(2) as mesh:
        layer = built(kind)
        parallelize(layer, mesh, seed=7, exchanges=by_columns(1))
        x, cotangent = (part.float() for part in rows_of(mesh.rank))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x.requires_grad_(), BatchContext(torch.arange(len(x)), None, 1, 0)).y_BSD
        assert y.dtype == torch.bfloat16
        (y.float() * cotangent).sum().backward()
        gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
        return y.detach().float().numpy(), all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("kind", LAYERS)
def test_under_bfloat16_autocast_ranks_are_as_near_to_float32_as_one_process(pool, kind):
    """The choice is made in float32, so only what travels and the sums are rounded."""
    alone = built(kind)
    materialize(alone, seed=7)
    x = torch.cat([rows_of(rank)[0].float() for rank in range(2)])
    with torch.no_grad():
        exact = alone(x, BatchContext(torch.arange(len(x)), None, 1, 0)).y_BSD.numpy()
    ranks = pool(2).run(narrow_on_this_rank, kind)
    found = np.concatenate([y for y, _ in ranks])
    np.testing.assert_allclose(found, exact, rtol=0, atol=0.02 * np.abs(exact).max())
    assert all(in_float32 for _, in_float32 in ranks)


PEER = {"num_experts": 9, "num_heads": 2, "top_k": 3, "key_dim": 6}


def case(ep_size: int, columns: int, stage: int) -> Case:
    sections: dict[str, Any] = {"feedforwards": ("peer",), "sigma_moe": None, "peer": PEER}
    return Case(ep_size=ep_size, stage=stage, optimizer="adamw", table_columns=columns).with_model(**sections)


def held_by(engine: Any) -> list[Piece]:
    return [
        Piece(f"{part.name}/{kind}", part.shape, part.start, values.numpy().copy(), part.box)
        for part in engine.fragments()
        for kind, values in part.tensors.items()
    ]


def saved(folder: str, ep_size: int, columns: int, stage: int) -> list[Piece]:
    with open_engine(case(ep_size, columns, stage)) as engine:
        train_one(engine, case(ep_size, columns, stage), step=0)
        state = checkpoint.TrainState(step=1, position=16, config={}, extra={})
        fragments = engine.owned_fragments()
        tensors = states_of(engine.model) if engine.mesh.rank == 0 else {}
        checkpoint.save(Path(folder), state=state, fragments=fragments, mesh=engine.mesh, keep=1, tensors=tensors)
        return held_by(engine)


def read(folder: str, ep_size: int, columns: int, stage: int) -> list[Piece]:
    with open_engine(case(ep_size, columns, stage)) as engine:
        for part in engine.fragments():
            for values in part.tensors.values():
                values.fill_(torch.nan)  # what is not read must show
        newest = checkpoint.latest(Path(folder), mesh=engine.mesh)
        assert newest is not None
        checkpoint.load(newest, fragments=engine.fragments(), mesh=engine.mesh)
        return held_by(engine)


@pytest.mark.parametrize(
    ("columns", "stage", "readers"),
    [
        (1, 1, [(2, 1, 2), (2, 2, 1), (1, 1, 0)]),
        (2, 1, [(2, 2, 2), (2, 1, 1), (1, 1, 1)]),
        (4, 0, [(2, 2, 0), (2, 1, 2)]),
    ],
)
def test_a_table_saved_in_one_layout_is_read_in_another(pool, tmp_path: Path, columns: int, stage: int, readers: list):
    """ep_size, columns and stage of the readers; in two row shards of nine rows one is padding."""
    written = assemble(piece for rank in pool(4).run(saved, str(tmp_path), 4, columns, stage) for piece in rank)
    for layout in readers:
        found = assemble(piece for rank in pool(2).run(read, str(tmp_path), *layout) for piece in rank)
        assert found.keys() == written.keys()
        for name in found:
            np.testing.assert_array_equal(found[name], written[name], err_msg=name)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    on_disk = checkpoint.read_tensors(newest, kind="master")["layers.0.feedforward.experts.up"]
    assert on_disk.shape == (9, 32)
    np.testing.assert_array_equal(on_disk.flatten(), written["layers.0.feedforward.experts.up/master"])
    states = checkpoint.read_tensors(newest)
    assert states["layers.1.feedforward.router.batch_norm.mean"].any()
