"""What the nodes of the preflight's tests share: shards, and a free port. Called by: pytest."""

import socket
from pathlib import Path

import numpy as np
import pytest

from data.tokenizer import bytes_tokenizer
from data.writer import ShardSetWriter


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
