"""One shard: a webdataset tar with one member per document, and its binary sidecar.

Owns the tar's and the sidecar's layout, and every byte read from or written to them; data/index.py owns the folder. A
document is a .npy array of token ids: it says its own type and length, any webdataset reader can decode it, and it is
read with allow_pickle=False (raw integers would need a second place for the type). Shards of others may hold text
(.txt, .text), tokenised as it is read. The sidecar has one record per document: its byte offset in the tar, its number
of tokens (end token included) and the crc32 of the member, so that a reader seeks to any document and notices each
damaged one without hashing the whole tar.

Only local files are opened, by us: webdataset's own opener, which also runs `pipe:` commands, is never called
(data/remote.py fetches what lies elsewhere).
"""

import io
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.tariterators import base_plus_ext, tar_file_iterator

from data.files import sha256_of, write_whole
from data.tokenizer import Tokenizer

SIDECAR_DTYPE = np.dtype([("offset", "<u8"), ("tokens", "<u4"), ("crc32", "<u4")])
SHARD_SUFFIX = ".tar"
SIDECAR_SUFFIX = ".idx"
TOKEN_FIELD = "npy"
_NAME, _SIZE, _CHECKSUM, _TYPE = slice(0, 100), slice(124, 136), slice(148, 156), slice(156, 157)  # of a tar's header
_OCTAL = re.compile(rb" *[0-7]+[ \0]*")
_NPY = re.compile(
    rb"\x93NUMPY\x01\0..\{'descr': '([<|][iu][1248])', 'fortran_order': False, 'shape': \((\d+),\), \} *\n", re.DOTALL
)
FIELDS = (TOKEN_FIELD, "txt", "text")  # the members that can be documents, the preferred one first


@dataclass(frozen=True)
class ShardInfo:
    """What the index records of one shard."""

    name: str  # of the tar, without folder
    bytes: int
    sha256: str
    documents: int
    tokens: int
    sidecar_sha256: str


@dataclass(frozen=True)
class Member:
    """A document as it lies in the tar."""

    name: str
    content: bytes


def write_sidecar(path: Path, records: np.ndarray) -> ShardInfo:
    """Writes the sidecar of the tar at `path`; returns what the index has to record."""
    sidecar = path.with_suffix(SIDECAR_SUFFIX)
    write_whole(sidecar, records.tobytes())
    return ShardInfo(
        name=path.name,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        documents=len(records),
        tokens=int(records["tokens"].sum(dtype=np.int64)),
        sidecar_sha256=sha256_of(sidecar),
    )


def read_sidecar(folder: Path, info: ShardInfo) -> np.ndarray:
    """The records (SIDECAR_DTYPE) of one shard. Raises RuntimeError if they are not those that the index describes."""
    path = (folder / info.name).with_suffix(SIDECAR_SUFFIX)
    if not path.is_file():
        raise RuntimeError(f"the sidecar {path} of shard {info.name} is missing: restore it, or {rebuild_hint(folder)}")
    if sha256_of(path) != info.sidecar_sha256:
        raise RuntimeError(
            f"the sidecar {path} has not the checksum that the index records: restore it, or {rebuild_hint(folder)}"
        )
    return np.fromfile(path, dtype=SIDECAR_DTYPE)


def read_documents(
    path: Path,
    records: np.ndarray,
    *,
    field: str,
    tokenizer: Tokenizer,
    on_damage: Callable[[RuntimeError], None] | None = None,
) -> Iterator[np.ndarray | None]:
    """Yields the ids, end token included, of documents of a tar, given their records of the sidecar.

    Each document is sought and judged by itself, so what is yielded for it depends on no other. Raises RuntimeError, naming file
    and byte, if one is not what its record says; with `on_damage` that is told the error, and None is yielded.
    """
    try:
        file = _open(path)
    except RuntimeError as error:
        if on_damage is None:
            raise
        on_damage(error)
        yield from [None] * len(records)
        return
    with file:
        for offset, num_tokens, crc32 in records.tolist():
            try:
                tokens = _read_document(path, file, (offset, num_tokens, crc32), field=field, tokenizer=tokenizer)
            except RuntimeError as error:
                if on_damage is None:
                    raise
                on_damage(error)
                tokens = None
            yield tokens


def _read_document(
    path: Path, file: io.BufferedReader, record: tuple[int, int, int], *, field: str, tokenizer: Tokenizer
) -> np.ndarray:
    offset, num_tokens, crc32 = record
    member = _read_member(path, file, offset, field=field)
    if zlib.crc32(member.content) != crc32:
        raise damaged(path, offset, f"the document {member.name} has not the checksum that the index records")
    tokens = decode_document(path, member, field=field, tokenizer=tokenizer)
    if len(tokens) != num_tokens:
        raise damaged(
            path, offset, f"the document {member.name} has {len(tokens)} tokens, but the index says {num_tokens}"
        )
    return tokens


def _read_member(path: Path, file: io.BufferedReader, offset: int, *, field: str) -> Member:
    """The document whose header lies at `offset`. A plain header is read here, in a fifth of the time that a tar iterator takes
    (a document of 500 tokens in 15 us instead of 80); what has an extended one goes to webdataset's.
    """
    try:
        file.seek(offset)
        header = file.read(tarfile.BLOCKSIZE)
        if header[_TYPE] in (tarfile.REGTYPE, tarfile.AREGTYPE) and _OCTAL.fullmatch(header[_SIZE]):
            if sum(header) - sum(header[_CHECKSUM]) + 8 * ord(" ") != int(header[_CHECKSUM].strip(b" \0") or b"0", 8):
                raise damaged(path, offset, "the tar's header there has not its checksum")
            size = int(header[_SIZE].strip(b" \0"), 8)
            content = file.read(size)
            if len(content) != size:
                raise damaged(path, offset, "the tar ends inside this document")
            return Member(name=header[_NAME].rstrip(b"\0").decode("utf-8", "replace"), content=content)
        file.seek(offset)
    except (OSError, ValueError) as error:
        raise damaged(path, offset, f"reading the tar from there on fails ({error})") from error
    member = next(iterate_members(path, file, field=field), None)
    if member is None:
        raise damaged(path, offset, "the tar ends before this document")
    return member


def iterate_members(path: Path, file: io.BufferedReader, *, field: str) -> Iterator[Member]:
    """Yields the documents (members with extension `field`) from the file's position on, by webdataset's iterator."""
    position = file.tell()
    try:
        stream: Any = file  # webdataset takes a stream here, although it says TarFile
        for member in tar_file_iterator(stream, select_files=lambda name: field_of(name) == field):
            yield Member(name=member["fname"], content=member["data"])
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        reason = str(error).partition(" @ ")[0]  # webdataset appends its file object
        raise damaged(path, position, f"reading the tar from there on fails ({reason})") from error


def decode_document(path: Path, member: Member, *, field: str, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a member, ended by the end token if it does not end so itself. Never decodes a pickle.

    Raises RuntimeError, naming file and member, if the content is not text (or a flat array of the tokenizer's ids).
    """
    try:
        if field != TOKEN_FIELD:
            return tokenizer.encode_document(member.content.decode("utf-8"))
        tokens = _array_of(member.content)
    except (ValueError, EOFError) as error:
        raise RuntimeError(
            f"the document {member.name} in {path} cannot be read ({error}): repair or remove it"
        ) from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise RuntimeError(
            f"the document {member.name} in {path} must be a flat array of integers, but it is {tokens.dtype} of "
            f"{tokens.shape}"
        )
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < tokenizer.vocab_size:
        raise RuntimeError(
            f"the ids of the document {member.name} in {path} must be below the tokenizer's vocab_size "
            f"{tokenizer.vocab_size}, but they go from {tokens.min()} to {tokens.max()}: use the tokenizer that made "
            "them"
        )
    ends = len(tokens) > 0 and tokens[-1] == tokenizer.end_token
    return (tokens if ends else np.append(tokens, tokenizer.end_token)).astype(tokenizer.dtype, copy=False)


def _array_of(content: bytes) -> np.ndarray:
    """What numpy's reader gives. Plain flat integers are taken apart here: numpy parses their header as Python, for 30 us."""
    plain = _NPY.match(content)
    if plain is None:
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    return np.frombuffer(content, dtype=plain[1].decode(), count=int(plain[2]), offset=plain.end())


def field_of(name: str) -> str | None:
    """The extension by which webdataset knows a member: what follows the first dot of the file name, in lower case."""
    extension = base_plus_ext(name)[1]
    return extension.lower() if extension else None


def _open(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise RuntimeError(
            f"the shard {path} cannot be opened ({error.strerror}): restore it, or {rebuild_hint(path.parent)}"
        ) from error


def damaged(path: Path, offset: int, what: str) -> RuntimeError:
    """The error of a shard that is not what it should be."""
    return RuntimeError(
        f"the shard {path} is damaged at byte {offset}: {what}; restore the file or {rebuild_hint(path.parent)}"
    )


def rebuild_hint(folder: Path) -> str:
    """What to do about a shard set that cannot be trusted."""
    return f"prepare the shards in {folder} again"
