"""What a node finds out about itself, and what becomes of a check that fails or hangs."""

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from train import node_facts
from train.node_facts import NodeFacts, from_json, measure_clock, run_each
from train.node_gpus import Gpu


def test_a_clock_is_compared_with_the_folders_own(tmp_path: Path):
    """The folder's clock is this machine's here, so a clock that is 100 s ahead sees it 100 s behind."""
    assert measure_clock(tmp_path / "deep" / "mark")["clock_s"] == pytest.approx(0.0, abs=1.0)
    found = measure_clock(tmp_path / "mark", clock=lambda: time.time() + 100)
    assert found["clock_s"] == pytest.approx(-100.0, abs=1.0)
    assert 0 <= found["clock_error_s"] < 10


def test_a_check_that_fails_or_hangs_costs_only_itself():
    forever = threading.Event()

    def fail() -> dict:
        raise RuntimeError("the disk is gone: bring it back")

    def break_down() -> dict:
        raise KeyError("x")

    checks = {"good": lambda: {"a": 1}, "bad": fail, "bug": break_down, "hangs": lambda: {"b": forever.wait()}}
    found, problems = run_each(checks, limit_s=0.5)
    forever.set()
    assert found == {"a": 1}
    assert problems.pop("bad") == "the disk is gone: bring it back"
    assert problems.pop("bug") == "KeyError: 'x'"
    assert "must end within 0.5 s, but it hangs" in problems.pop("hangs")
    assert not problems


def test_facts_survive_the_way_to_another_node():
    gpu = Gpu(
        index=1, uuid="GPU-1", name="x", total_gb=80.0, free_gb=None, ecc=None, uncorrected=None, processes=("p",)
    )
    facts = NodeFacts(rank=3, node="n3", promised=None, versions={"a": None}, gpus=(gpu, gpu), clock_s=0.5)
    told = json.loads(json.dumps(facts.to_json()))
    assert from_json({3: told}) == ({3: facts}, [])
    assert replace(facts, rank=4) != facts
    # those of another version of the program
    assert from_json({0: {"rank": 0, "node": "n0"}, 1: ["n1"], 3: told}) == ({3: facts}, [0, 1])


def test_a_check_that_ends_after_it_was_called_hanging_does_not_count(monkeypatch: pytest.MonkeyPatch):
    class Late(threading.Thread):
        """Ends just after it was found alive."""

        def join(self, timeout: float | None = None) -> None:
            pass

        def is_alive(self) -> bool:
            super().join()
            return not hasattr(self, "asked") and setattr(self, "asked", True) is None

    monkeypatch.setattr(node_facts.threading, "Thread", Late)
    found, problems = run_each({"late": lambda: {"a": 1}}, limit_s=0.0)
    assert (found, list(problems)) == ({}, ["late"])


def test_changes_of_a_clone_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def git(*arguments: str) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        node_facts.subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, env=environ)

    (tmp_path / "file").write_text("a")
    git("init", "-q")
    git("add", "file")
    git("commit", "-qm", "one")
    monkeypatch.setattr(node_facts, "ROOT", tmp_path)
    monkeypatch.setattr("train.run_folder.ROOT", tmp_path)
    commits = []
    for text in ("a", "b", "c", "b"):
        (tmp_path / "file").write_text(text)
        commits.append(node_facts._versions()["commit"])
    clean, b, c, again = commits
    assert "+" not in clean
    assert b.startswith(f"{clean}+changes-")
    assert b == again != c
