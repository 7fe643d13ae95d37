"""The folder of a run: its resolved config and the versions that made it. Rank 0 writes; every rank reads.

Owns config.yaml and environment.json, how a small file is replaced, and what is said when one cannot be written. metrics.py owns
metrics.jsonl and tensorboard/, checkpoint.py checkpoints/, kernels_file.py kernels.json, incident.py events.jsonl, crash.py crash.json.
"""

import contextlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.tokenizer import TOKENIZER_FILE
from train.checkpoint_folder import candidates
from train.config import Config, check_resume, to_yaml

logger = logging.getLogger(__name__)

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
    def kernels(self) -> Path:
        return self.path / "kernels.json"

    @property
    def tokenizer(self) -> Path:
        return self.path / TOKENIZER_FILE

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def crash(self) -> Path:
        return self.path / "crash.json"

    @property
    def done(self) -> Path:
        """There, with a line that says the step, once the run has reached run.steps: what a batch script looks for."""
        return self.path / "done"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"


def find_changes(config: Config) -> list[str]:
    """What this run changes against the one that is in its folder, as sentences for the log; nothing for a new run.

    A folder without a checkpoint has nothing to go on from: a run with any config may begin there. (metrics.py keeps what an
    earlier attempt has told.)

    Raises:
        ValueError: the folder holds a run with another config, all keys named; or run.dir is no folder.
        RuntimeError: what lies in the folder cannot be read.
    """
    folder = RunFolder(Path(config.run.dir))
    try:
        if folder.path.exists() and not folder.path.is_dir():
            raise ValueError(
                f"run.dir must be a folder, but {folder.path} is a file: move it, or choose another run.dir"
            )
        if not folder.config.exists() or not candidates(folder.checkpoints):
            return []
        saved = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except OSError as error:
        raise RuntimeError(
            f"{error.filename or folder.path} cannot be read ({error.strerror}): let this user read it, or choose another run.dir"
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RuntimeError(_torn(folder.config)) from error
    if not isinstance(saved, dict):
        raise RuntimeError(_torn(folder.config))
    return check_resume(saved, config)


def _torn(path: Path) -> str:
    return (
        f"{path} must hold the config of the run in its folder, but is damaged: remove it and start again (the checkpoints hold "
        "the config too, and it is compared)"
    )


def write_folder(config: Config, *, shards: Path | None = None) -> None:
    """Writes config.yaml, environment.json and the shards' tokenizer.json. Called by rank 0, after all have looked at the old ones.

    shards: the folder with the tokenizer, if not the first that the config names (it may be fetched).

    Raises:
        RuntimeError: the folder cannot be made or written.
    """
    folder, shards = RunFolder(Path(config.run.dir)), shards or Path(config.data.sources[0].shards)
    with explained(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
    replace_file(folder.config, to_yaml(config))
    replace_file(folder.tokenizer, (shards / TOKENIZER_FILE).read_text(encoding="utf-8"))
    replace_file(folder.environment, json.dumps(describe_environment(), indent=2) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Writes `text` aside, forces it to disk and gives it the name `path`: a kill or a power cut leaves the old file or the new.

    Raises:
        RuntimeError: the disk is full or refuses; `path` is as it was.
    """
    aside = path.with_suffix(".partial")
    with explained(path):
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)


def keep_aside(path: Path) -> None:
    """Moves what an attempt without a checkpoint has left to `path`.1 and so on: the run begins anew. RuntimeError if it cannot."""
    if not path.exists() or path.stat().st_size == 0:
        return
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    aside = next(name for name in numbered if not name.exists())
    with explained(path):
        path.rename(aside)
    logger.warning("%s is of an attempt that left no checkpoint: this run begins anew", aside)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an error of the operating system while writing `path` into a RuntimeError that says what to do."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"{path} cannot be written ({error.strerror or error}): free space there, give this user a folder that it may write, "
            "or choose another run.dir, then start again"
        ) from error


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
