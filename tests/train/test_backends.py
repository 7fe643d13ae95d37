"""Which backend each bank gets, by what measurement, and what a run that starts again on the same machine takes."""

import json
import platform
import shutil
from pathlib import Path

import pytest
import torch
import triton

from kernels import tuning
from kernels.grouped_matmul import grouped_matmul
from model.expert_choice import BankWork
from model.parameters import ExpertBank
from tests.train.tiny_job import ALONE, tiny_config, write_shards
from train import backends
from train.backends import by_layers, choose_backends
from train.build import build_model, choose_exchanges, load_model
from train.config import Layout
from train.engine import LocalMesh
from train.run import run
from train.run_folder import RunFolder
from train.works import bank_works

CPU = torch.device("cpu")


class SecondRank(LocalMesh):
    """Of two: it is told what rank 0 says, one thing after the other."""

    rank, world_size = 1, 2

    def __init__(self, *told) -> None:
        super().__init__(CPU)
        self.told = iter(told)

    def all_gather_object(self, value):
        return [next(self.told), value]


@pytest.fixture
def config(tmp_path, torch_as_it_was):
    write_shards(tmp_path / "shards", seed=1)
    return tiny_config(tmp_path, model={"num_layers": 2})  # two layers with equal banks


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """What was measured; every candidate of the MLP is slower than the one before, of the rest it is faster."""
    found: list[str] = []

    def seconds(self: BankWork, backend: str, *, device: torch.device) -> float:
        found.append(f"{self.bank.label} {backend}")
        return float(len(found)) if self.bank.label == "mlp" else 1 / len(found)

    monkeypatch.setattr(BankWork, "seconds", seconds)
    return found


def works_of(config, ep_size: int = 1, processes: int = 1):
    layout = Layout(ep_size=ep_size, node_size=ep_size)
    exchanges = choose_exchanges(config, layout, processes=processes) if ep_size > 1 else {}
    return bank_works(config, layout, exchanges, processes=processes)


def test_each_kind_of_bank_is_measured_once_and_gets_its_fastest(config, measured):
    works = works_of(config)
    chosen = choose_backends(config, works, LocalMesh(CPU))
    assert sorted(measured) == sorted(
        f"{label} {name}" for label in ("value", "output", "mlp") for name in ("torch", "loop")
    )
    assert chosen.of_module == {path: "torch" if work.bank.label == "mlp" else "loop" for path, work in works.items()}
    model = build_model(config, vocab_size=20)
    chosen.apply(model)
    of_model = {path: bank.backend for path, bank in model.named_modules() if isinstance(bank, ExpertBank)}
    assert of_model == chosen.of_module


def test_a_run_computes_with_what_was_chosen(config, measured, monkeypatch):
    used = set()

    def recorded(rows, weights, *, backend, **options):
        used.add((tuple(weights.shape[1:]), backend))
        return grouped_matmul(rows, weights, backend=backend, **options)

    monkeypatch.setattr("model.experts.grouped_matmul", recorded)
    run(config, ALONE)
    by_widths = {work.widths: "torch" if work.bank.label == "mlp" else "loop" for work in works_of(config).values()}
    assert by_widths.items() <= used
    assert {backend for _, backend in used} == {"torch", "loop"}


def test_a_backend_that_is_named_is_taken_without_measuring(config, measured):
    named = config.model_copy(update={"model": config.model.model_copy(update={"expert_backend": "loop"})})
    chosen = choose_backends(named, works_of(named), LocalMesh(CPU))
    assert set(chosen.of_module.values()) == {"loop"}
    assert not measured
    refused = config.model_copy(update={"model": config.model.model_copy(update={"expert_backend": "triton_dense"})})
    with pytest.raises(ValueError, match="triton backend computes on a GPU"):
        choose_backends(refused, works_of(refused), LocalMesh(CPU))


def test_a_run_keeps_what_was_measured_and_takes_it_when_it_starts_again(config, measured):
    run(config, ALONE)
    folder, times = RunFolder(Path(config.run.dir)), len(measured)
    kept = json.loads(folder.kernels.read_text())
    assert times == 6
    assert len(kept["seconds"]) == 3
    assert all(
        name.startswith(f"{platform.machine()}, {torch.get_num_threads()} threads, torch 2.")
        for name in kept["seconds"]
    )
    kept["tiles"] = {"a GPU: ('op', 16)": 1}
    folder.kernels.write_text(json.dumps(kept))
    again = choose_backends(config, works_of(config), LocalMesh(CPU))
    assert len(measured) == times
    assert list(again.seconds.values()) == list(kept["seconds"].values())
    assert again.tiles == kept["tiles"] == tuning.decisions()
    again.write(folder)
    assert json.loads(folder.kernels.read_text()) == kept
    longer = config.model_copy(
        update={"data": config.data.model_copy(update={"sequence_length": 2 * config.data.sequence_length})}
    )
    choose_backends(longer, works_of(longer), LocalMesh(CPU))
    assert len(measured) == 2 * times


def test_the_other_ranks_take_what_rank_zero_found_and_measure_nothing(config, measured):
    works = works_of(config)
    of_zero = choose_backends(config, works, LocalMesh(CPU))
    measured.clear()
    serving = {name: ["loop", "torch"] for name in of_zero.seconds}
    told = [{name: {"reference": 1.0} for name in of_zero.seconds}, {"a GPU: op": 2}]
    chosen = choose_backends(config, works, SecondRank([serving, None], told))
    assert not measured
    assert set(chosen.of_module.values()) == {"reference"}
    assert chosen.tiles == {"a GPU: op": 2}


def test_what_another_machine_measured_stays_and_this_one_measures_for_itself(config, measured, monkeypatch):
    """There and back: the first machine finds its own choice again."""
    folder, works = RunFolder(Path(config.run.dir)), works_of(config)
    folder.path.mkdir(parents=True)
    of_machine = {}
    for machine in ("first", "second", "first"):
        monkeypatch.setattr(backends, "_described", lambda work, device, machine=machine: f"{machine}: {work}")
        chosen = choose_backends(config, works, LocalMesh(CPU))
        chosen.write(folder)
        assert of_machine.setdefault(machine, chosen.seconds) == chosen.seconds
    assert of_machine["first"] != of_machine["second"]
    assert len(measured) == 12


def test_a_resumed_run_that_measures_anew_says_so(config, measured):
    """Not a new one, nor a resumed one that finds its times."""
    run(config, ALONE)
    folder, works = RunFolder(Path(config.run.dir)), works_of(config)
    sentences = [
        f"kernels.json has no time for {work}: measured anew; on a GPU last bits may differ from before"
        for work in dict.fromkeys(map(str, works.values()))
    ]

    def told() -> list[str]:
        return [note for note in choose_backends(config, works, LocalMesh(CPU)).notes() if "kernels.json" in note]

    assert told() == []
    folder.kernels.write_text('{"seconds": {}, "tiles": {}}')
    assert told() == sentences
    folder.kernels.unlink()
    assert told() == sentences
    shutil.rmtree(folder.checkpoints)
    assert told() == []


def test_ranks_without_triton_are_named_together_by_their_reason():
    with_triton, without = {"x": ["triton", "torch"], "y": ["torch"]}, {"x": ["torch"], "y": ["torch"]}
    told = [[with_triton, None], *[[without, "not installed"]] * 3, [without, "no GPU"]]
    assert backends._lacking(told, []) == [
        "ranks 1-3 of 5 have no triton backend: not installed",
        "rank 4 of 5 has no triton backend: no GPU",
    ]
    assert backends._lacking([[without, "not installed"]] * 2, []) == []


def test_a_rank_is_measured_with_what_it_holds(config):
    tokens = config.model_copy(update={"parallel": config.parallel.model_copy(update={"exchange": "tokens"})})
    weights = config.model_copy(update={"parallel": config.parallel.model_copy(update={"exchange": "weights"})})
    alone = works_of(config)
    for path, work in works_of(tokens, ep_size=2, processes=2).items():
        assert (work.num_groups, work.whole) == (-(-alone[path].num_groups // 2), False)
        assert work.tokens == alone[path].tokens // 2
    for path, work in works_of(weights, ep_size=2, processes=2).items():
        assert (work.num_groups, work.whole) == (-(-alone[path].num_groups // 2) * 2, True)


def test_the_tokens_are_those_of_a_micro_step_and_of_memory_up_to_a_limit(config):
    data, mixer = config.data, config.model.switchhead
    assert mixer is not None
    rows = {work.bank.label: work.tokens for work in works_of(config).values()}
    assert set(rows.values()) == {data.global_batch_size // config.optim.accumulation_steps * data.sequence_length}
    twice = config.model_copy(update={"optim": config.optim.model_copy(update={"accumulation_steps": 2})})
    assert {2 * work.tokens for work in works_of(twice).values()} == set(rows.values())
    memory = mixer.model_copy(update={"positions": "xl", "memory_blocks": 1})
    with_memory = config.model_copy(update={"model": config.model.model_copy(update={"switchhead": memory})})
    assert {work.bank.label: work.tokens / rows["mlp"] for work in works_of(with_memory).values()} == {
        "value": 2,
        "output": 1,
        "mlp": 1,
    }
    long = config.model_copy(update={"data": data.model_copy(update={"sequence_length": 10**6})})
    assert {work.tokens for work in works_of(long).values()} == {2048}


def test_the_setting_of_the_hidden_activations_is_measured_too(config):
    kept = config.model.sigma_moe.model_copy(update={"keep_hidden": True})
    changed = config.model_copy(update={"model": config.model.model_copy(update={"sigma_moe": kept})})
    assert {work.keep_hidden for work in works_of(changed).values() if work.bank.label == "mlp"} == {True}
    assert {work.keep_hidden for work in works_of(config).values()} == {False}


@pytest.mark.parametrize(("named", "precision"), [("", "highest"), (", tf32", "high")])
def test_another_rounding_of_a_gpu_is_measured_for_itself(config, monkeypatch, named: str, precision: str):
    """What torch.set_float32_matmul_precision, or the environment, may have changed between two starts."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    (work, *_) = works_of(config).values()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        compilers = f"torch {torch.__version__}, triton {triton.__version__}"
        assert backends._described(work, torch.device("cuda")) == f"a GPU, {compilers}{named}: {work}"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_run_tells_the_kernels_the_tiles_that_were_kept(config, measured):
    folder = RunFolder(Path(config.run.dir))
    folder.path.mkdir(parents=True)
    folder.kernels.write_text(json.dumps({"seconds": {}, "tiles": {"a GPU: op": 1}}))
    chosen = choose_backends(config, works_of(config), LocalMesh(CPU))
    tuning.decide({})
    chosen.apply(build_model(config, vocab_size=20))
    assert tuning.decisions() == {"a GPU: op": 1}


def test_a_single_candidate_is_said_to_be_one_and_not_kept(config, monkeypatch):
    monkeypatch.setattr(BankWork, "candidates", lambda self, device_type: ["loop"])
    chosen = choose_backends(config, works_of(config), LocalMesh(CPU))
    assert all(note.endswith("computed by loop; the only candidate") for note in chosen.notes())
    Path(config.run.dir).mkdir(parents=True)
    chosen.write(RunFolder(Path(config.run.dir)))
    assert "loop" not in RunFolder(Path(config.run.dir)).kernels.read_text()


def test_a_saved_model_computes_with_the_backend_of_its_config(config, monkeypatch):
    monkeypatch.setattr("train.build.fill", lambda model, values, *, device: None)
    named = config.model_copy(update={"model": config.model.model_copy(update={"expert_backend": "loop"})})
    model = load_model({}, named, vocab_size=20, device=CPU)
    assert {bank.backend for bank in model.modules() if isinstance(bank, ExpertBank)} == {"loop"}


def test_what_auto_could_not_choose_is_said(config):
    half = config.model_copy(update={"run": config.run.model_copy(update={"dtype": "bfloat16"})})
    (sentence,) = {text.split(" got ")[0] for text in backends.excluded(half, works_of(half), CPU)}
    assert sentence.startswith("model.expert_backend auto: the torch backend of grouped_matmul needs widths")
    assert backends.excluded(config, works_of(config), CPU) == []


def test_equal_layers_are_named_together():
    found = {f"layers.{depth}.mixer.x": depth in (1, 5) for depth in (0, 1, 2, 3, 5)} | {"layers.0.feedforward.x": True}
    assert by_layers(found) == [
        (False, "layers.0,2-3.mixer.x"),
        (True, "layers.1,5.mixer.x"),
        (True, "layers.0.feedforward.x"),
    ]
