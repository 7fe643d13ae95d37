"""Small shard sets for the tests of data/."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from data import remote
from data.tokenizer import END_TOKEN, Tokenizer, bytes_tokenizer
from data.writer import ShardSetWriter
from tests.data.http_server import Server, serve

END = 0

ShardsOfDocuments = Sequence[Sequence[Sequence[int]]]


@pytest.fixture(scope="session")
def wide_tokenizer() -> Tokenizer:
    """Ids enough to give every place of a small line its own: id 1 + n stands for the n-th pair of letters."""
    letters = [chr(ord("a") + i) for i in range(26)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [first + second for first in letters for second in letters]
    return Tokenizer(
        json.dumps(
            {
                "model": {
                    "type": "BPE",
                    "vocab": {END_TOKEN: END} | {text: i + 1 for i, text in enumerate([*pairs, *alphabet])},
                    "merges": [],
                },
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                "added_tokens": [{"id": END, "content": END_TOKEN, "special": True}],
                "decoder": {"type": "ByteLevel"},
            }
        )
    )


@pytest.fixture
def write_shards(tmp_path: Path) -> Callable[..., Path]:
    """Writes shards with exactly these documents (ids without end token) and returns their folder."""

    def write(shards: ShardsOfDocuments, *, name: str = "train", tokenizer: Tokenizer | None = None) -> Path:
        tokenizer = tokenizer or bytes_tokenizer()
        writer = ShardSetWriter(tmp_path / name, tokenizer=tokenizer, shard_tokens=10**9)
        for documents in shards:
            for document in documents:
                writer.add(np.array([*document, END], dtype=tokenizer.dtype), num_bytes=len(document))
            writer.end_shard()
        writer.close()
        return tmp_path / name

    return write


@pytest.fixture
def random_shards() -> ShardsOfDocuments:
    """Five shards of unequal documents; 418 tokens with the end tokens."""
    generator = np.random.default_rng(7)
    lengths = [[1, 40, 3], [90], [17, 17, 5, 0, 21], [60, 2], [33, 71, 44]]
    return [[generator.integers(1, 257, length).tolist() for length in shard] for shard in lengths]


@pytest.fixture
def folder(write_shards, random_shards) -> Path:
    return write_shards(random_shards)


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serve(folder.parent) as state:
        yield state


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
