"""What kernels.json keeps of a run's measurements, and what later starts take of it: a GPU is played."""

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from model.expert_choice import BankWork
from tests.train.test_backends import works_of
from tests.train.tiny_job import tiny_config, write_shards
from train.backends import Backends, choose_backends
from train.engine import LocalMesh
from train.run_folder import RunFolder

GPU = torch.device("cuda")


@pytest.fixture
def config(tmp_path, torch_as_it_was):
    write_shards(tmp_path / "shards", seed=1)
    return tiny_config(tmp_path, model={"num_layers": 2})  # two layers with equal banks: three works


@pytest.fixture
def gpu(monkeypatch) -> Any:
    """A GPU is played: which backends of a bank can serve, and how long they take; infinite: no room. measured: what was."""
    times = {"triton": 1.0, "torch": 2.0, "loop": 5.0}
    played = SimpleNamespace(candidates=["triton", "torch"], seconds=times, measured=[])

    def seconds(self: BankWork, backend: str, *, device: torch.device) -> float:
        played.measured.append(backend)
        if played.seconds[backend] == math.inf:
            raise torch.OutOfMemoryError("no room")
        return played.seconds[backend]

    monkeypatch.setattr(BankWork, "seconds", seconds)
    monkeypatch.setattr(BankWork, "candidates", lambda self, device_type: list(played.candidates))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return played


def start(config) -> Backends:
    """A start of the run on the played GPU, up to its kernels.json."""
    chosen = choose_backends(config, works_of(config), LocalMesh(GPU))
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    chosen.write(RunFolder(Path(config.run.dir)))
    return chosen


@pytest.mark.parametrize("lacking", [["torch"], ["loop"]])
def test_after_a_start_without_a_backend_the_first_choice_is_found_again(config, gpu, lacking: list[str]):
    """torch's time was kept; the loop, which is left where torch refuses too, is measured. No time is dropped."""
    found = []
    for candidates in (["triton", "torch"], lacking, ["triton", "torch"]):
        gpu.candidates = candidates
        found.append(start(config).of_module)
    assert [set(of_module.values()) for of_module in found] == [{"triton"}, set(lacking), {"triton"}]
    assert gpu.measured == ["triton", "torch"] * 3 + ["loop"] * 3 * (lacking == ["loop"])
    kept = json.loads(RunFolder(Path(config.run.dir)).kernels.read_text())
    assert all(times.items() >= {"triton": 1.0, "torch": 2.0}.items() for times in kept["seconds"].values())


def test_a_candidate_that_came_later_is_not_measured(config, gpu):
    """It might be faster: a run that went on with it would have other last bits."""
    gpu.candidates = ["torch"]
    start(config)
    gpu.candidates = ["triton", "torch"]
    chosen = start(config)
    assert set(chosen.of_module.values()) == {"torch"}
    assert gpu.measured == ["torch"] * 3
    assert all(
        note.endswith("computed by torch; ms forward and backward: triton not kept, torch 2000.00")
        for note in chosen.notes()
    )


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "device": lambda patch: patch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU"),
    "torch": lambda patch: patch.setattr(torch, "__version__", "3.0.0"),
    "triton": lambda patch: patch.setattr(triton, "__version__", "4.0.0"),
    "no triton": lambda patch: patch.setitem(sys.modules, "triton", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_on_another_gpu_or_with_other_compilers_a_resumed_run_measures_anew_and_says_so(
    config, gpu, monkeypatch, change: str
):
    """There and back: what the first start measured is found again."""
    start(config)
    (RunFolder(Path(config.run.dir)).checkpoints / "step_000001").mkdir(parents=True)
    with monkeypatch.context() as changed:
        CHANGES[change](changed)
        notes = start(config).notes()
    assert gpu.measured == ["triton", "torch"] * 6
    assert len([note for note in notes if "measured anew; on a GPU last bits may differ" in note]) == 3
    assert not [note for note in start(config).notes() if "anew" in note]
    assert len(gpu.measured) == 12


def test_a_file_from_before_triton_was_in_the_names_is_measured_anew(config, gpu):
    start(config)
    kernels = RunFolder(Path(config.run.dir)).kernels
    kernels.write_text(kernels.read_text().replace(f", triton {triton.__version__}", ""))
    start(config)
    assert gpu.measured == ["triton", "torch"] * 6


def test_what_had_no_room_is_not_kept_and_not_taken_when_it_has_room(config, gpu):
    gpu.seconds["triton"] = math.inf
    first = start(config)
    assert all("triton no room, torch 2000.00" in note for note in first.notes())
    kept = json.loads(RunFolder(Path(config.run.dir)).kernels.read_text())
    assert [set(times) for times in kept["seconds"].values()] == [{"torch"}] * 3
    gpu.seconds["triton"] = 1.0
    assert set(first.of_module.values()) == set(start(config).of_module.values()) == {"torch"}
    assert gpu.measured == ["triton", "torch"] * 3


def test_a_time_without_room_that_was_kept_is_dropped(config, gpu):
    """Once they were written, as Infinity, which is no JSON."""
    start(config)
    kernels = RunFolder(Path(config.run.dir)).kernels
    kernels.write_text(kernels.read_text().replace('"triton": 1.0', '"triton": Infinity'))
    assert set(start(config).of_module.values()) == {"torch"}
    assert "Infinity" not in kernels.read_text()
    assert len(gpu.measured) == 6


def test_where_no_candidate_has_room_the_run_ends_with_the_work_and_the_device(config, gpu):
    gpu.seconds |= {"triton": math.inf, "torch": math.inf}
    work = re.escape(str(next(iter(works_of(config).values()))))
    sentence = f"pass of {work} must fit .* of a GPU, but triton and torch found no room: .* optim.accumulation_steps"
    with pytest.raises(RuntimeError, match=sentence):
        start(config)
    assert not RunFolder(Path(config.run.dir)).kernels.exists()


def test_on_a_gpu_a_single_candidate_is_measured_for_its_tiles(config, gpu):
    gpu.candidates = ["triton"]
    chosen = start(config)
    assert gpu.measured == ["triton"] * 3
    assert all(note.endswith("computed by triton; the only candidate") for note in chosen.notes())


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"seconds": {}}',
        '{"seconds": 3, "tiles": {}}',
        '{"seconds": {"work": 3}, "tiles": {}}',
        '{"seconds": {"work": {"loop": "fast"}}, "tiles": {}}',
        '{"seconds": {"work": {"loop": -1.0}}, "tiles": {}}',
        '{"seconds": {"work": {"loop": -Infinity}}, "tiles": {}}',
        '{"seconds": {"work": {"loop": NaN}}, "tiles": {}}',
        '{"seconds": {}, "tiles": {"op": 1.5}}',
        '{"seconds": {}, "tiles": {"op": -1}}',
        '{"seconds": {}, "tiles": {"op": 4}}',
    ],
)
def test_a_damaged_file_is_named(config, text):
    path = RunFolder(Path(config.run.dir)).kernels
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(RuntimeError, match=r"kernels\.json keeps which kernels .* remove it") as caught:
        choose_backends(config, works_of(config), LocalMesh(GPU))
    assert "\n" not in str(caught.value)
