"""What a process is before the model: deterministic, with a number of threads that the run fixes."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.config import ProcessInfo
from tests.train.tiny_job import ALONE, tiny_config
from train.build import open_world, set_up_torch
from train.config import Config, Layout
from train.crash import CrashFile
from train.identity import in_common
from train.run_folder import RunFolder


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path)


@pytest.fixture(autouse=True)
def _fresh_process(torch_as_it_was, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    torch.use_deterministic_algorithms(False)


def ranks_on_a_node(count: int) -> ProcessInfo:
    return ALONE.model_copy(update={"world_size": count, "local_world_size": count})


def test_an_operation_without_a_deterministic_form_is_an_error(config):
    set_up_torch(config, ALONE)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize(("found", "kept"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_cublas_gets_a_workspace_that_makes_it_deterministic(config, monkeypatch, found, kept):
    if found:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", found)
    set_up_torch(config, ALONE)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == kept


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(6, 2, 3), (7, 2, 3), (2, 4, 1)])
def test_the_ranks_of_a_node_share_the_cores_that_they_may_use(config, monkeypatch, cores, ranks, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    torch.set_num_threads(2)
    set_up_torch(config, ranks_on_a_node(ranks))
    assert torch.get_num_threads() == threads


def test_a_number_of_threads_that_the_user_gave_is_kept(config, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    set_up_torch(config, ALONE)
    assert torch.get_num_threads() == 2


def entered(config: Config) -> contextlib.AbstractContextManager[Any]:
    """The world of the first of two processes."""
    info, layout = ranks_on_a_node(2), Layout(ep_size=1, node_size=2)
    crash = CrashFile(RunFolder(Path(config.run.dir)), info)
    return open_world(config, info, layout, device=torch.device("cpu"), crash=crash)


def test_the_processes_meet_by_what_they_have_in_common(config, monkeypatch: pytest.MonkeyPatch):
    named = []

    def open_mesh(info: ProcessInfo, *, run: dict[str, str], **settings: Any) -> None:
        named.append(run)
        raise RuntimeError("far enough")

    monkeypatch.setattr("parallel.mesh.open_mesh", open_mesh)
    with pytest.raises(RuntimeError, match="far enough"), entered(config):
        pass
    assert named == [in_common(config)]


def test_only_the_start_has_a_limit_and_all_of_it(config, monkeypatch: pytest.MonkeyPatch):
    told: list[Any] = []

    def part(name: str) -> Callable[..., Any]:
        @contextlib.contextmanager
        def enter(*given: Any, **settings: Any) -> Iterator[None]:
            told.append((name, *given[:1]) if name == "limit" else name)
            yield
            told.append(f"{name} left")

        return enter

    for place, name in (("limit.ended_after", "limit"), ("mesh.open_mesh", "mesh"), ("watchdog.watch", "watch")):
        monkeypatch.setattr(f"parallel.{place}", part(name))
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"meeting_s": 7.0})})
    with entered(config):
        told.append("run")
    assert told == [("limit", 2 * 7.0 + 600.0), "mesh", "watch", "limit left", "run", "watch left", "mesh left"]
