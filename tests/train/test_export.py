"""Exports: what other programs find in them, and that evaluation and generation find the model that was trained."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.tokenizer import load_tokenizer
from tests.train.disk_states import plant, recorded
from tests.train.tiny_job import ALONE, another_tokenizer, tiny_config, write_shards
from train import checkpoint_tool
from train.checkpoint import latest, read_tensors
from train.config import Config
from train.evaluate import score
from train.export import read_export, write_export
from train.generate import Sampling, generate
from train.run import run
from train.source import CheckpointSource, read_from
from train.trained import load_run

CPU = torch.device("cpu")
BIAS = {"num_experts": 5, "expert_dim": 4, "top_k": 2, "balance": "bias"}  # a state that is no weight
PEER = {"num_experts": 16, "num_heads": 2, "top_k": 2, "key_dim": 4}
XL = {"num_heads": 2, "head_dim": 4, "positions": "xl", "memory_blocks": 1}
KINDS: dict[str, dict[str, Any]] = {
    "switchall": {"sigma_moe": BIAS},
    "table": {"feedforwards": ["peer"], "sigma_moe": None, "peer": PEER},
    "memory": {"mixers": ["attention"], "switchhead": None, "attention": XL},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run folder of each kind."""
    folders = {}
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    for kind, model in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        write_shards(folder / "shards", seed=1)
        run(config_of(folder, model), ALONE)
        folders[kind] = folder / "run"
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
    return folders


def config_of(folder: Path, model: dict[str, Any]) -> Config:
    return tiny_config(folder, model=model)


def export(run_folder: Path, out: Path, *options: str) -> Path:
    assert checkpoint_tool.main(["export", str(run_folder), str(out), *options]) == 0
    return out


def source_of(run_folder: Path) -> CheckpointSource:
    source = read_from(run_folder, lambda source: source, setting="DIR")
    assert isinstance(source, CheckpointSource)
    return source


def expected(run_folder: Path) -> dict[str, torch.Tensor]:
    """Weights and states of the newest checkpoint, without the memory of the data's streams."""
    path = latest(run_folder / "checkpoints")
    assert path is not None
    states = {name: value for name, value in read_tensors(path).items() if not name.startswith("memory.")}
    return read_tensors(path, kind="master") | states


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_holds_every_expert_in_its_logical_shape(trained: dict[str, Path], tmp_path: Path, kind: str):
    out = export(trained[kind], tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    found, wanted = load_file(out / "model.safetensors"), expected(trained[kind])
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value), name
    config = json.loads((out / "config.json").read_text())
    assert (config["format"], config["version"], config["step"]) == ("switchyard-export", 1, 3)
    assert config["vocab_size"] == found["embedding.weight"].shape[0]
    assert config["model"]["d_model"] == 8
    assert load_tokenizer(out / "tokenizer.json").tokenizer_id == config["tokenizer_id"]


def test_some_names_and_shapes_are_those_of_the_page(trained: dict[str, Path], tmp_path: Path):
    found = load_file(export(trained["switchall"], tmp_path / "out") / "model.safetensors")
    assert found["layers.0.mixer.value_experts.weight"].shape == (2 * 3, 8, 4)
    assert found["layers.0.feedforward.experts.up"].shape == (5, 8, 4)
    assert found["layers.0.feedforward.selection.bias"].shape == (5,)


def test_bfloat16_rounds_all_but_routers_and_states(trained: dict[str, Path], tmp_path: Path):
    found = load_file(export(trained["switchall"], tmp_path / "out", "--dtype", "bfloat16") / "model.safetensors")
    wide = {name for name, value in found.items() if value.dtype == torch.float32}
    assert wide == {
        "layers.0.mixer.value_router.weight",
        "layers.0.mixer.output_router.weight",
        "layers.0.feedforward.router.weight",
        "layers.0.feedforward.selection.bias",
    }
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    assert max(places[name][1] for name in wide) == min(places[name][0] for name in places.keys() - wide), (
        "wide elements come first, so that every tensor begins at a multiple of its element size"
    )
    for name, value in expected(trained["switchall"]).items():
        assert torch.equal(found[name], value if name in wide else value.bfloat16()), name


def test_large_models_are_several_files_with_the_index_of_the_hub(trained: dict[str, Path], tmp_path: Path):
    source = source_of(trained["switchall"])
    write_export(tmp_path / "out", source, dtype="float32", shard_bytes=2000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    count = len(names)
    assert count > 2
    assert names == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    wanted, total = expected(trained["switchall"]), 0
    for name in names:
        found = load_file(tmp_path / "out" / name)
        assert {tensor for tensor, file in index["weight_map"].items() if file == name} == found.keys()
        assert len(found) == 1 or sum(value.nbytes for value in found.values()) <= 2000
        total += sum(value.nbytes for value in found.values())
        for tensor, value in found.items():
            assert torch.equal(value, wanted.pop(tensor))
    assert not wanted
    assert index["metadata"]["total_size"] == total
    again = load_run(tmp_path / "out", device=CPU)
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, expected(trained["switchall"])[name])


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_evaluated_and_writes_like_the_run(trained: dict[str, Path], tmp_path: Path, kind: str):
    out = export(trained[kind], tmp_path / "out")
    figures, texts = [], []
    for folder in (trained[kind], out):
        loaded = load_run(folder, device=CPU)
        heldout = loaded.config.data.heldout
        figures.append(score(loaded, device=CPU, heldout=heldout, max_tokens=100, memory_blocks=None))
        texts.append(list(generate(loaded, "ab", Sampling(temperature=1.0, top_p=1.0, seed=1), max_tokens=20)))
    assert figures[0] == figures[1]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 3


def test_the_step_that_is_asked_for_is_exported(tmp_path: Path, torch_as_it_was: None):
    write_shards(tmp_path / "shards", seed=1)
    run(tiny_config(tmp_path, checkpoint={"every_steps": 2}), ALONE)
    out = export(tmp_path / "run", tmp_path / "out", "--step", "2")
    assert read_export(out).step == 2
    weights = read_tensors(tmp_path / "run" / "checkpoints" / "step_000002", kind="master")
    assert torch.equal(load_file(out / "model.safetensors")["output.weight"], weights["output.weight"])


def test_a_kill_at_any_instant_leaves_no_export_or_a_whole_one(trained: dict[str, Path], tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    place = tmp_path / "place"
    place.mkdir()
    with recorded(place, monkeypatch) as recorder:
        export(trained["switchall"], place / "out")
    assert len(recorder.states) > 5
    whole = recorder.states[-1]
    for i, tree in enumerate(recorder.states):
        visible = {name: data for name, data in tree.items() if not name.startswith("out.partial")}
        assert visible in ({}, whole)
        killed = plant(tree, tmp_path / f"killed{i}")
        if not visible:
            export(trained["switchall"], killed / "out")
            assert [path.name for path in killed.iterdir()] == ["out"]


def test_what_is_there_is_not_overwritten(trained: dict[str, Path], tmp_path: Path, capsys):
    (tmp_path / "out").mkdir()
    assert checkpoint_tool.main(["export", str(trained["switchall"]), str(tmp_path / "out")]) == 2
    assert "OUT must be a new folder" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "config", "version", "tokenizer"])
def test_a_damaged_export_is_named(trained: dict[str, Path], tmp_path: Path, damage: str):
    out = export(trained["switchall"], tmp_path / "out")
    weights, config = out / "model.safetensors", json.loads((out / "config.json").read_text())
    data = weights.read_bytes()
    if damage == "flipped":
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        weights.write_bytes(data[:-1])
    elif damage == "gone":
        weights.unlink()
    elif damage == "tokenizer":
        (out / "tokenizer.json").write_bytes(another_tokenizer().to_bytes())
    else:
        changed = {"config": {"step": -1}, "version": {"version": 2}}[damage]
        (out / "config.json").write_text(json.dumps(config | changed))
    file = {"config": "config.json", "version": "config.json", "tokenizer": "tokenizer.json"}
    with pytest.raises(ValueError if damage == "tokenizer" else RuntimeError, match=file.get(damage, weights.name)):
        load_run(out, device=CPU)


def test_a_run_whose_tokenizer_is_another_is_an_error_with_both(trained: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(trained["switchall"], tmp_path / "run"))
    own = load_tokenizer(folder / "tokenizer.json").tokenizer_id
    (folder / "tokenizer.json").write_bytes(another_tokenizer().to_bytes())
    with pytest.raises(ValueError, match=rf"it is {another_tokenizer().tokenizer_id} and .* was trained with {own}"):
        source_of(folder)


def test_a_full_disk_leaves_nothing(trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = source_of(trained["switchall"])

    def read(name: str) -> torch.Tensor:
        raise OSError(28, "No space left on device")

    full: Any = SimpleNamespace(
        **{n: getattr(source, n) for n in ("step", "config", "tokenizer", "shapes", "states")}, read=read
    )
    with pytest.raises(RuntimeError, match="No space left"):
        write_export(tmp_path / "out", full, dtype="float32")
    assert not list(tmp_path.iterdir())
