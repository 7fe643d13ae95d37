"""The folder of a run: its resolved config and the versions that made it. Rank 0 writes; every rank reads.

Owns config.yaml and environment.json. metrics.py owns metrics.jsonl and tensorboard/, checkpoint.py owns checkpoints/.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train.config import Config, check_resume, to_yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "webdataset", "tokenizers", "safetensors", "pydantic")


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, relative to where the command was typed if `run.dir` is."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"


def find_changes(config: Config) -> list[str]:
    """What this run changes against the one that is in its folder, as sentences for the log; nothing for a new run.

    A folder with a config but neither metrics nor checkpoints holds a run that never took a step: it may be written over.

    Raises:
        ValueError: the folder holds a run with another config, all keys named.
    """
    folder = RunFolder(Path(config.run.dir))
    if not folder.config.exists() or not (folder.metrics.exists() or folder.checkpoints.exists()):
        return []
    return check_resume(yaml.safe_load(folder.config.read_text()), config)


def write_folder(config: Config) -> None:
    """Writes config.yaml and environment.json. Called by rank 0, after every rank has looked at the old ones."""
    folder = RunFolder(Path(config.run.dir))
    folder.path.mkdir(parents=True, exist_ok=True)
    for path, text in (
        (folder.config, to_yaml(config)),
        (folder.environment, json.dumps(describe_environment(), indent=2) + "\n"),
    ):
        aside = path.with_suffix(".partial")  # a config.yaml that a kill cut short would keep the run from resuming
        aside.write_text(text)
        os.replace(aside, path)


def describe_environment() -> dict[str, Any]:
    """Git commit (with "+changes" if the clone has uncommitted ones), Python, platform and package versions."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": sys.argv,
        "packages": packages,
    }


def _git_commit() -> str | None:
    def git(*arguments: str) -> str:
        answer = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=10
        )
        return answer.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None  # not a clone, or no git: the run goes on without it
