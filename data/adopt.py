"""The index of a plain webdataset that others made: tars of .npy token ids or of .txt/.text, with a tokenizer.json
beside them.

Reads every tar once and writes its sidecar; the tars themselves are not touched. Called by data/index.py on the first
use of a folder that has tars and no index.
"""

import re
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.shards import (
    FIELDS,
    SHARD_SUFFIX,
    SIDECAR_DTYPE,
    SIDECAR_SUFFIX,
    ShardInfo,
    decode_document,
    field_of,
    iterate_members,
    write_sidecar,
)
from data.tokenizer import Tokenizer

LEAST_END_BYTES = 2 * tarfile.BLOCKSIZE  # zeros with which a tar ends; most writers add more
METADATA = re.compile(r"__[^/]*__($|/)")  # names that webdataset's iterator passes over


@dataclass(frozen=True)
class PlainShards:
    """What the tars of a folder hold."""

    field: str
    shards: tuple[ShardInfo, ...]


def adopt_shards(folder: Path, *, tokenizer: Tokenizer) -> PlainShards:
    """Reads all tars of `folder` in the order of their names and writes a sidecar for each.

    Every sample must have the same kind of document. Raises RuntimeError, naming the tar, if one is damaged or cannot be read, a
    sample is not so, or a sidecar's place is taken; OSError if a sidecar cannot be written.
    """
    paths = sorted(folder.glob(f"*{SHARD_SUFFIX}"))
    for path in paths:
        _check_sidecar_is_ours(path.with_suffix(SIDECAR_SUFFIX))
    field = _document_field(paths)
    shards = []
    for path in paths:
        try:
            records = _records_of(path, field=field, tokenizer=tokenizer)
        except OSError as error:
            raise _unreadable(path, error) from error
        shards.append(write_sidecar(path, records))
    return PlainShards(field=field, shards=tuple(shards))


def _check_sidecar_is_ours(path: Path) -> None:
    """Other programs write .idx files beside tars too (DALI, wids). Ours can be left by an adoption that was cut off."""
    if not path.exists():
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(content) % SIDECAR_DTYPE.itemsize == 0:
        offsets = np.frombuffer(content, dtype=SIDECAR_DTYPE)["offset"]
        if not (offsets % tarfile.BLOCKSIZE).any() and (offsets[1:] > offsets[:-1]).all():
            return
    raise RuntimeError(
        f"the sidecar of {path.with_suffix(SHARD_SUFFIX).name} is to be {path}, but another program's file has that name: move it "
        "away, or link the tars into a folder of their own"
    )


def _document_field(paths: Sequence[Path]) -> str:
    for path in paths:
        try:
            names = [name for name, _ in _members(path)]
        except OSError as error:
            raise _unreadable(path, error) from error
        if not names:
            continue
        fields = {field_of(name) for name in names}
        for field in FIELDS:
            if field in fields:
                return field
        raise RuntimeError(
            f"the shard {path} must hold documents as {', '.join('.' + field for field in FIELDS)}, but its members are "
            f"like {names[:3]} (all that follows the first dot of a file name is its kind): convert it, or run python -m data.prepare on "
            "its texts"
        )
    raise RuntimeError(
        f"the shards in {paths[0].parent} must hold documents, but all {len(paths)} are empty: copy them again"
    )


def _records_of(path: Path, *, field: str, tokenizer: Tokenizer) -> np.ndarray:
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
    return records


def _members(path: Path) -> list[tuple[str, int]]:
    """Name and byte offset of each member that webdataset makes a part of a sample."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = list(tar)
            end = tar.offset  # of the header that was taken for the end
    except tarfile.TarError as error:
        raise RuntimeError(
            f"the shard {path} cannot be read as an uncompressed tar ({error}): copy it again, or decompress it"
        ) from error
    _check_end(path, end)
    linked = next((member.name for member in members if member.islnk() or member.issym()), None)
    if linked is not None:
        raise RuntimeError(
            f"the members of the shard {path} must be files, but {linked} is a link, which webdataset passes over: pack the shard "
            "again with tar --dereference --hard-dereference"
        )
    files = [(member.name, member.offset) for member in members if member.isreg()]
    return [(name, offset) for name, offset in files if field_of(name) and not METADATA.match(name)]


def _check_end(path: Path, end: int) -> None:
    """tarfile takes any header that it cannot read for the end of the tar, and so would lose what follows."""
    with path.open("rb") as file:
        file.seek(end)
        first = file.read(tarfile.BLOCKSIZE)
        if first.strip(b"\0"):
            raise RuntimeError(f"the shard {path} is damaged: there is no header at byte {end}; copy it again")
        num_zeros = len(first)
        while chunk := file.read(1 << 20):
            if chunk.strip(b"\0"):
                raise RuntimeError(
                    f"the shard {path} must be one whole tar, but it ends at byte {end} and more follows (a header was lost, or "
                    "several tars were joined by cat): copy it again, or pack it as one tar"
                )
            num_zeros += len(chunk)
    if num_zeros < LEAST_END_BYTES:
        raise RuntimeError(
            f"the shard {path} is truncated (a tar ends with {LEAST_END_BYTES} zero bytes): copy it again"
        )


def _unreadable(path: Path, error: OSError) -> RuntimeError:
    return RuntimeError(f"{path} cannot be read ({error.strerror or error}): restore it, or correct its permissions")
