"""What tests of the program share: main() without a run; and those of the preflight: shards, a free port. Called by: pytest."""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.tokenizer import bytes_tokenizer
from data.writer import ShardSetWriter
from parallel.config import ProcessInfo
from train import run
from train.config import Config
from train.preemption import Preemption

TINY = str(Path(__file__).resolve().parents[2] / "configs" / "tiny_cpu.yaml")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("preflight")
    for name in ("train", "heldout"):
        writer = ShardSetWriter(out / name, tokenizer=(tokenizer := bytes_tokenizer()), shard_tokens=10**9)
        writer.add(np.array([1, 2, 3, 0], dtype=tokenizer.dtype), num_bytes=3)
        writer.end_shard()
        writer.close()
    return out


@pytest.fixture
def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Config, ProcessInfo], None]], None]:
    """Replaces the run itself, and undoes what main() does to the process."""
    for name in [name for name in os.environ if name.startswith(("SLURM_STEP", "OMPI_", "PMI_", "MPI_LOCAL"))]:
        monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(Preemption, "listen", lambda self: None)

    def replace(body: Callable[[Config, ProcessInfo], None]) -> None:
        monkeypatch.setattr(run, "run", lambda config, info, preemption: body(config, info))

    return replace
