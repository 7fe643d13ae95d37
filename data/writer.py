"""Writing shards: one tar with its sidecar, and a folder of them with tokenizer and index.

What is written depends on the documents alone: no clock, no user name, no path. data/shards.py owns the layout of a
tar, data/index.py that of a folder. Used by data/prepare.py.
"""

import io
import os
import zlib
from pathlib import Path

import numpy as np
from webdataset.writer import TarWriter

from data.files import write_whole
from data.index import write_index
from data.shards import SHARD_SUFFIX, SIDECAR_DTYPE, TOKEN_FIELD, ShardInfo, write_sidecar
from data.tokenizer import TOKENIZER_FILE, Tokenizer


class ShardSetWriter:
    """Writes a new folder of shards of about `shard_tokens` tokens each, and at the end its index."""

    def __init__(self, folder: Path, *, tokenizer: Tokenizer, shard_tokens: int) -> None:
        folder.mkdir()
        write_whole(folder / TOKENIZER_FILE, tokenizer.to_bytes())
        self._folder = folder
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._shard: ShardWriter | None = None
        self.shards: list[ShardInfo] = []
        self.num_documents = 0
        self.num_bytes = 0

    def add(self, tokens: np.ndarray, *, num_bytes: int) -> None:
        """Appends a document of `num_bytes` bytes of text."""
        if self._shard is None:
            self._shard = ShardWriter(self._folder / f"{self._folder.name}-{len(self.shards):06d}{SHARD_SUFFIX}")
        self._shard.add(tokens, key=f"{self.num_documents:09d}")
        self.num_documents += 1
        self.num_bytes += num_bytes
        if self._shard.num_tokens >= self._shard_tokens:
            self.end_shard()

    def end_shard(self) -> None:
        """Ends the current shard, if it has a document: the next one starts another."""
        if self._shard is not None:
            self.shards.append(self._shard.close())
            self._shard = None

    def close(self) -> None:
        """Writes what makes the folder a set of shards."""
        self.end_shard()
        write_index(self._folder, shards=self.shards, field=TOKEN_FIELD, tokenizer=self._tokenizer)

    def summary(self) -> str:
        """One line for the console."""
        num_tokens = sum(shard.tokens for shard in self.shards)
        return (
            f"{self._folder.name}: {self.num_documents:,} documents, {self.num_bytes / 1e6:.1f} MB of text, "
            f"{num_tokens:,} tokens ({self.num_bytes / num_tokens:.2f} bytes a token), {len(self.shards)} shards"
        )


class ShardWriter:
    """Writes one tar of tokenised documents, and its sidecar."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._writer = TarWriter(self._file, user="", group="", mtime=0, encoder=False, compress=False)
        self._records: list[tuple[int, int, int]] = []
        self.num_tokens = 0

    def add(self, tokens: np.ndarray, *, key: str) -> None:
        """Appends a document: its ids, end token included, under a key without dots."""
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, tokens, allow_pickle=False)
        content = buffer.getvalue()
        self._records.append((self._writer.tarstream.offset, len(tokens), zlib.crc32(content)))
        self._writer.write({"__key__": key, TOKEN_FIELD: content})
        self.num_tokens += len(tokens)

    def close(self) -> ShardInfo:
        """Ends the tar and writes its sidecar."""
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return write_sidecar(self._path, np.array(self._records, dtype=SIDECAR_DTYPE))
