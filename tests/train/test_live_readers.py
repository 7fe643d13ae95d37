"""Reading beside a run that goes on: a checkpoint that the run takes away while it is read is no damage, and the newest one is read."""

import contextlib
import dataclasses
import importlib
import itertools
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.thread_mesh import STATE, draw, on_ranks, save_split
from tests.train.tiny_job import ALONE, tiny_config, write_shards
from train import checkpoint_folder, storage
from train.checkpoint import latest, read_tensors
from train.checkpoint_tool import main
from train.run import run
from train.source import CheckpointSource, read_all, read_from
from train.together import on_every_rank
from train.trained import load_run

CPU = torch.device("cpu")


@contextlib.contextmanager
def goes_on(read: str, go_on: Callable[[], object], *, times: int = 1) -> Iterator[None]:
    """Before the function `read` is called for the first times, the run goes on."""
    module, name = read.rsplit(".", 1)
    left, lock, real = [times], threading.Lock(), getattr(importlib.import_module(module), name)

    def late(*arguments: Any, **how: Any) -> Any:
        with lock:
            if left[0]:
                left[0] -= 1
                go_on()
        return real(*arguments, **how)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(read, late)
        yield
    assert left[0] < times


def save(run_folder: Path, step: int) -> None:
    """What a save with checkpoint.keep 1 leaves: a checkpoint of this step (a copy of an earlier one) and no other."""
    folder = run_folder / "checkpoints"
    before = checkpoint_folder.meant(folder)
    assert before is not None
    shutil.copytree(folder / before, checkpoint_folder.partial_path(folder, step))
    checkpoint_folder.publish(folder, step, keep=1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run folder with the steps 100 to 300, of which only the checkpoints are there."""
    for step in (100, 200, 300):
        save_split(tmp_path / "run" / "checkpoints", draw(1), 3, state=dataclasses.replace(STATE, step=step))
    return tmp_path / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps, with shards beside it."""
    folder = tmp_path_factory.mktemp("live")
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    write_shards(folder / "shards", seed=1)
    run(tiny_config(folder, model={"expert_backend": "reference"}), ALONE)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def live(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


@pytest.mark.parametrize(
    ("command", "read"),
    [
        (["list"], "train.inventory.read_manifest"),
        (["verify"], "train.inventory.read_manifest"),
        (["verify"], "train.inventory.check_file"),
        (["list", "--verify"], "train.inventory.check_file"),
    ],
)
def test_list_and_verify_tell_of_what_is_there_at_the_end(saved: Path, capsys, command: list[str], read: str):
    with goes_on(read, lambda: save(saved, 400)):
        assert main([*command, str(saved)]) == 0
    said = capsys.readouterr().out
    assert "damaged" not in said
    assert "400" in said
    assert "300" not in said
    if command == ["verify"]:
        assert said.splitlines()[-1] == f"a resume would use {saved}/checkpoints/step_000400"


def test_the_newest_whole_one_is_looked_for_again(saved: Path, caplog: pytest.LogCaptureFixture):
    with goes_on("train.checkpoint.check_files", lambda: save(saved, 400)):
        found = on_ranks(3, lambda mesh: latest(saved / "checkpoints", mesh=mesh))
    assert found == [saved / "checkpoints" / "step_000400"] * 3
    assert not caplog.text


@pytest.mark.parametrize("reader", ["verify", "latest"])
def test_a_run_that_is_faster_at_every_look_is_a_sentence(saved: Path, capsys, reader: str):
    step = itertools.count(400, 100)
    read = {"verify": "train.inventory.check_file", "latest": "train.checkpoint.check_files"}[reader]
    sentence = f"{saved}/checkpoints must stay while it is read, but a run in that folder goes on"
    with goes_on(read, lambda: save(saved, next(step)), times=10**6):
        if reader == "verify":
            assert main(["verify", str(saved)]) == 1
            assert f"error: {sentence}" in capsys.readouterr().err
        else:
            with pytest.raises(RuntimeError, match=sentence):
                latest(saved / "checkpoints")


@pytest.mark.parametrize("read", ["train.source.read_manifest", "train.source.read_parts"])
def test_a_model_is_read_from_the_checkpoint_that_stays(live: Path, tmp_path: Path, read: str):
    with goes_on(read, lambda: save(live, 4)):
        found = load_run(live, device=CPU)
    assert found.path == live / "checkpoints" / "step_000004"
    with goes_on(read, lambda: save(live, 5)):
        assert main(["export", str(live), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    exported = load_run(tmp_path / "out", device=CPU).model.state_dict()
    for name, value in read_tensors(live / "checkpoints" / "step_000005", kind="master").items():
        assert torch.equal(exported[name], value)


def test_all_ranks_begin_again_with_the_same_checkpoint(live: Path):
    def path_of(mesh: Any) -> Path:
        def work(source: Any) -> Path:
            assert isinstance(source, CheckpointSource)
            on_every_rank(mesh, lambda: read_all(source))
            return source.path

        return read_from(live, work, setting="run.init_from", mesh=mesh)

    with goes_on("train.source.read_parts", lambda: save(live, 4)):
        assert on_ranks(3, path_of) == [live / "checkpoints" / "step_000004"] * 3


def test_the_checkpoint_that_the_user_named_is_not_replaced_by_another(live: Path, capsys):
    named = live / "checkpoints" / "step_000003"
    with (
        goes_on("train.source.read_parts", lambda: save(live, 4)),
        pytest.raises(RuntimeError, match=f"{named} must stay while it is read"),
    ):
        load_run(named, device=CPU)


def test_a_file_that_torch_cannot_map_is_a_sentence(live: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(file: Path, *, framework: str) -> None:
        raise RuntimeError(f"unable to open file <{file}> in read-only mode: No such file or directory (2)")

    monkeypatch.setattr(storage, "safe_open", refuse)
    with pytest.raises(
        RuntimeError, match=r"rank_00000.safetensors cannot be read \(unable .*\): use another checkpoint"
    ):
        load_run(live, device=CPU)


@pytest.mark.parametrize("place", ["run", "run/checkpoints", "run/checkpoints/step_000003"])
def test_the_folder_that_one_stands_in_may_be_named_by_a_dot(live: Path, tmp_path: Path, monkeypatch, place: str):
    monkeypatch.chdir(tmp_path / place)
    assert main(["export", ".", str(tmp_path / "out")]) == 0
    if "step" not in place:
        assert main(["verify", "."]) == 0
