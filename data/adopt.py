"""The index of a plain webdataset that others made: tars of .npy token ids or of .txt/.text, with a tokenizer.json
beside them.

Reads every tar once and writes its sidecar; the tars themselves are not touched. Called by data/index.py on the first
use of a folder that has tars and no index.
"""

import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.shards import (
    FIELDS,
    SHARD_SUFFIX,
    SIDECAR_DTYPE,
    ShardInfo,
    decode_document,
    field_of,
    iterate_members,
    write_sidecar,
)
from data.tokenizer import Tokenizer

END_OF_TAR = bytes(2 * 512)
METADATA = re.compile(r"__[^/]*__($|/)")  # names that webdataset's iterator passes over


@dataclass(frozen=True)
class PlainShards:
    """What the tars of a folder hold."""

    field: str
    shards: tuple[ShardInfo, ...]


def adopt_shards(folder: Path, *, tokenizer: Tokenizer) -> PlainShards:
    """Reads all tars of `folder` in the order of their names and writes a sidecar for each.

    Every sample must have the same kind of document. Raises RuntimeError, naming the tar, if one is truncated or a
    sample is not so.
    """
    paths = sorted(folder.glob(f"*{SHARD_SUFFIX}"))
    field = _document_field(paths[0])
    return PlainShards(
        field=field, shards=tuple(_adopt_shard(path, field=field, tokenizer=tokenizer) for path in paths)
    )


def _document_field(path: Path) -> str:
    names = [name for name, _ in _members(path)]
    fields = {field_of(name) for name in names}
    for field in FIELDS:
        if field in fields:
            return field
    raise RuntimeError(
        f"the shard {path} must hold documents as {', '.join('.' + field for field in FIELDS)}, but its members are "
        f"like {names[:3]}: convert it, or run python -m data.prepare on its texts"
    )


def _adopt_shard(path: Path, *, field: str, tokenizer: Tokenizer) -> ShardInfo:
    members = _members(path)
    offsets = [offset for name, offset in members if field_of(name) == field]
    num_samples = len({name[: name.index(".", name.rfind("/") + 1)] for name, _ in members})
    if num_samples != len(offsets):
        raise RuntimeError(
            f"each sample of the shard {path} must have one .{field} document, but it has {num_samples} samples and "
            f"{len(offsets)} such documents: repair the shard or leave it out"
        )
    records = np.zeros(len(offsets), dtype=SIDECAR_DTYPE)
    with path.open("rb") as file:
        for record, offset, member in zip(records, offsets, iterate_members(path, file, field=field), strict=True):
            tokens = decode_document(path, member, field=field, tokenizer=tokenizer)
            record["offset"], record["tokens"], record["crc32"] = offset, len(tokens), zlib.crc32(member.content)
    return write_sidecar(path, records)


def _members(path: Path) -> list[tuple[str, int]]:
    """Name and byte offset of each member that webdataset makes a part of a sample."""
    try:
        with tarfile.open(path, "r:") as tar:
            files = [(member.name, member.offset) for member in tar if member.isreg()]
    except tarfile.TarError as error:
        raise RuntimeError(
            f"the shard {path} cannot be read as an uncompressed tar ({error}): copy it again, or decompress it"
        ) from error
    with path.open("rb") as file:
        file.seek(-len(END_OF_TAR), 2)
        if file.read() != END_OF_TAR:
            raise RuntimeError(
                f"the shard {path} is truncated (a tar ends with {len(END_OF_TAR)} zero bytes): copy it again"
            )
    return [(name, offset) for name, offset in files if field_of(name) and not METADATA.match(name)]
