"""`make` sets itself up once, finds an interpreter that really runs, and says what is missing where there is none.

Run on a copy of the Makefile in an empty folder, with a shell script in the place of Python that writes down what it is asked.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FAKE_PYTHON = """#!/bin/sh
echo "$(basename "$0") $*" >> "$LOG"
case "$*" in *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python;; esac
"""
BROKEN_PYTHON = """#!/bin/sh
echo "a version manager's stub" >&2
exit 127
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the Makefile, an empty lock file, and bin/ with the few tools that the recipe needs."""
    folder = tmp_path / "clone"
    (folder / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "requirements.lock").write_text("")
    for tool in ("sh", "make", "touch", "mkdir", "cp", "basename", "sed", "rm", "find"):
        (folder / "bin" / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")
    return folder


def install(folder: Path, name: str, script: str) -> None:
    path = folder / "bin" / name
    path.write_text(script)
    path.chmod(0o755)


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": str(folder / "bin"), "LOG": str(folder / "log"), "HOME": str(folder)}
    return subprocess.run(["make", *arguments], cwd=folder, env=environ, capture_output=True, text=True, timeout=60)


def test_without_a_fitting_python_the_sentence_names_what_was_tried(clone: Path) -> None:
    install(clone, "python3.12", BROKEN_PYTHON)
    done = make(clone, ".venv/installed")
    assert done.returncode != 0
    assert "error: Python 3.11 or 3.12" in done.stderr
    assert "none of python3.12 python3.11 python3 is that" in done.stderr
    assert "make PYTHON=" in done.stderr
    assert "making .venv" not in done.stdout
    assert not (clone / ".venv").exists()


def test_a_python_that_does_not_run_is_passed_over(clone: Path) -> None:
    install(clone, "python3.12", BROKEN_PYTHON)
    install(clone, "python3.11", FAKE_PYTHON)
    done = make(clone, ".venv/installed")
    assert done.returncode == 0, done.stderr
    assert "making .venv with python3.11" in done.stdout


def test_the_second_call_installs_nothing_until_the_lock_file_changes(clone: Path) -> None:
    install(clone, "python3.11", FAKE_PYTHON)
    for _ in range(2):
        assert make(clone, ".venv/installed", "PIP_ARGS=--no-index").returncode == 0
    log = (clone / "log").read_text()
    assert log.count("-m venv --clear .venv") == 1
    assert log.count("-m pip install --requirement requirements.lock --no-index") == 1
    later = (clone / ".venv" / "installed").stat().st_mtime + 10
    os.utime(clone / "requirements.lock", (later, later))
    assert make(clone, ".venv/installed").returncode == 0
    log = (clone / "log").read_text()
    assert (log.count("-m venv"), log.count("-m pip install")) == (1, 2)


def test_the_interpreter_can_be_named(clone: Path) -> None:
    install(clone, "python3.12", FAKE_PYTHON)
    install(clone, "mine", FAKE_PYTHON)
    assert "making .venv with mine" in make(clone, ".venv/installed", "PYTHON=mine").stdout


def test_clean_leaves_the_runs_alone_and_says_so(clone: Path) -> None:
    kept = clone / "runs" / "tiny_cpu" / "checkpoints"
    kept.mkdir(parents=True)
    for gone in (".venv/bin", "train/__pycache__", ".pytest_cache"):
        (clone / gone).mkdir(parents=True)
    done = make(clone, "clean")
    assert done.returncode == 0, done.stderr
    assert "runs/ (shards, checkpoints, metrics) is left alone" in done.stdout
    assert kept.exists()
    assert not [path for path in (".venv", "train/__pycache__", ".pytest_cache") if (clone / path).exists()]


def test_the_verbs_are_there_and_ci_calls_two_of_them() -> None:
    text = (ROOT / "Makefile").read_text()
    assert all(f"\n{verb}:" in text for verb in ("train", "test", "check", "fuzz", "drills", "clean"))
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    assert ci.read_text().splitlines()[-2:] == ["make check", "make test"]
