"""Which backends tables, the choice of their rows, top-k attention and shift mixing get."""

import importlib
import itertools
from typing import Any

import pytest
import torch

from model.part_choice import PartWork
from parallel.volume import BankExchange, Mode
from tests.train.tiny_job import tiny_config, write_shards
from train import build
from train.build import build_model, choose_kernels
from train.config import Layout
from train.engine import LocalMesh
from train.works import table_works

CPU, ALONE = torch.device("cpu"), Layout(ep_size=1, node_size=1)
OPS = ("product_key_topk", "shift_mix", "tables.routes")
RELATIVES = {
    "mixers": ["hsm"],
    "switchhead": None,
    "hsm": {"variant": "constant"},
    "feedforwards": ["peer"],
    "sigma_moe": None,
    "peer": {"num_experts": 64, "num_heads": 2, "top_k": 2, "key_dim": 8},
    "num_layers": 2,
}


@pytest.fixture
def config_of(tmp_path, torch_as_it_was):
    write_shards(tmp_path / "shards", seed=1)
    return lambda **model: tiny_config(tmp_path, model=RELATIVES | model)


def serve(monkeypatch) -> None:
    """The Triton backends are candidates."""
    for op in OPS:
        monkeypatch.setattr(importlib.import_module(f"kernels.{op}"), "why_not_triton", lambda device_type: None)


def chosen_by(config):
    model: Any = build_model(config, vocab_size=256)
    return model, *choose_kernels(config, ALONE, LocalMesh(CPU), model)


def test_each_part_is_measured_where_there_is_a_choice_and_told_what_was_fastest(config_of, monkeypatch):
    """A GPU's choice is played here: the Triton backends serve, and take half of the time for tables alone."""
    found = []

    def seconds(self: PartWork, backend: str, *, device: torch.device) -> float:
        found.append(f"{self.name.split()[0]} {backend}")
        return 0.5 if ("table" in self.name) == (backend == "triton") else 1.0

    monkeypatch.setattr(PartWork, "seconds", seconds)
    serve(monkeypatch)
    model, chosen, notes = chosen_by(config_of())
    # equal choices and tables are measured once; the two layers shift by 1 and by 2
    assert sorted(found) == sorted(
        f"{part} {backend}" for part in ("2", "shift", "shift", "table") for backend in ("torch", "triton")
    )
    chosen.apply(model)
    for layer in model.layers:
        assert (layer.mixer.backend, layer.feedforward.router.backend) == ("torch", "torch")
        assert layer.feedforward.experts.backend == "triton"
    (told,) = (note for note in notes if "experts" in note)
    assert told.startswith("layers.0-1.feedforward.experts: computed by triton; ms forward and backward: ")
    assert "triton 500.00" in told


@pytest.mark.parametrize("asked", ["auto", "torch"])
def test_a_backend_that_is_named_or_alone_is_not_measured(config_of, monkeypatch, asked: str):
    monkeypatch.delattr(PartWork, "work")
    _, chosen, notes = chosen_by(config_of(kernel_backend=asked))
    assert set(chosen.of_module.values()) == {"torch"}
    assert chosen.kept is None
    assert notes == []


def test_on_a_gpu_a_single_candidate_is_measured_for_its_tiles(config_of, monkeypatch):
    found = []
    monkeypatch.setattr(PartWork, "seconds", lambda self, backend, *, device: float(found.append(backend) or 1.0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    for op in OPS:
        monkeypatch.setattr(importlib.import_module(f"kernels.{op}"), "why_not_triton", lambda device_type: "no Triton")
    config = config_of()
    _, notes = choose_kernels(config, ALONE, LocalMesh(torch.device("cuda")), build_model(config, vocab_size=256))
    assert set(found) == {"torch"}
    assert len(found) == 4  # two shifts, one choice of rows, one table
    assert all(note.endswith("computed by torch; the only candidate") for note in notes)


def test_a_backend_that_cannot_serve_is_refused_with_those_that_can(config_of):
    with pytest.raises(
        ValueError, match=r"can serve layers\.0\.feedforward\.experts .*on this device, torch, but it is triton"
    ):
        chosen_by(config_of(kernel_backend="triton"))


def test_a_rank_is_measured_with_its_rows_and_columns_of_a_table(config_of):
    """64 rows of 8: of four ranks, two share the columns, and each pair has half of the rows. Of the 4 x 8 tokens of all ranks those
    arrive of whose four choices (two heads, two each) one is in this rank's range: counted over all that four choices can be.
    """
    config, layout = config_of(), Layout(ep_size=4, node_size=4)
    paths = list(table_works(config, ALONE, {}, processes=1))
    modes: list[tuple[Mode, int, int, int, int]] = [
        ("tokens", 1, 4, 16, 8),
        ("tokens", 2, 2, 32, 4),
        ("weights", 1, 1, 64, 8),
    ]
    for mode, columns, ranges, rows, width in modes:
        exchange = BankExchange(mode, columns, tokens_bytes=0.0, weights_bytes=0.0)
        works = table_works(config, layout, dict.fromkeys(paths, exchange), processes=4)
        output, arrived, up, down, _ = works[paths[0]].work("torch", device=CPU)()
        assert up.shape == down.shape == (rows, width)
        choices = list(itertools.product(range(ranges), repeat=2 * 2))
        tokens = 8 if mode == "weights" else 4 * 8 * sum(0 in ranges_K for ranges_K in choices) / len(choices)
        assert len(output) == len(arrived) == round(tokens)


def test_a_backend_that_does_not_fit_into_memory_is_not_taken(config_of, monkeypatch):
    def seconds(self: PartWork, backend: str, *, device: torch.device) -> float:
        if backend == "torch":
            raise torch.OutOfMemoryError("no room")
        return 1.0

    serve(monkeypatch)
    monkeypatch.setattr(PartWork, "seconds", seconds)
    _, chosen, notes = chosen_by(config_of())
    assert set(chosen.of_module.values()) == {"triton"}
    assert all("torch no room" in note for note in notes)


def test_who_only_reads_a_model_takes_what_serves_it(config_of, monkeypatch):
    """A run on a GPU names triton; its model is read on a CPU. And where triton serves, it is taken."""
    config = config_of(kernel_backend="triton")
    values = {}
    monkeypatch.setattr(build, "fill", lambda model, values, *, device: None)
    for wanted in ("torch", "triton"):
        model: Any = build.load_model(values, config, vocab_size=256, device=CPU)
        assert {model.layers[0].mixer.backend, model.layers[1].feedforward.experts.backend} == {wanted}
        serve(monkeypatch)
