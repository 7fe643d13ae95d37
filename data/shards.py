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

import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
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
_OCTAL = re.compile(rb"[ \0]*[0-7]+[ \0]*")
_NPY = re.compile(
    rb"\x93NUMPY\x01\0..\{'descr': '([<|][iu][1248])', 'fortran_order': False, 'shape': \((\d{1,15}),\), \} *\n",
    re.DOTALL,
)
MAX_RUN_BYTES = 1 << 24  # read at once: the documents of a row, unless a foreign shard has pictures between them
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
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise RuntimeError(
            f"the sidecar {path} of shard {info.name} is missing: restore it, or {rebuild_hint(folder)}"
        ) from None
    except OSError as error:
        raise RuntimeError(
            f"the sidecar {path} cannot be read ({error.strerror}): restore it, or correct its permissions"
        ) from error
    if hashlib.sha256(content).hexdigest() != info.sidecar_sha256:
        raise RuntimeError(
            f"the sidecar {path} has not the checksum that the index records: restore it, or {rebuild_hint(folder)}"
        )
    records = np.frombuffer(content, dtype=SIDECAR_DTYPE)
    found = len(records), int(records["tokens"].sum(dtype=np.int64))
    if found != (info.documents, info.tokens):
        raise RuntimeError(
            f"the sidecar {path} and the index must agree, but it has {found[0]} documents and {found[1]} tokens, and the index says "
            f"{info.documents} and {info.tokens}: {rebuild_hint(folder)}"
        )
    return records


def read_documents(
    path: Path,
    records: np.ndarray,
    *,
    end: int,
    field: str,
    tokenizer: Tokenizer,
    on_damage: Callable[[RuntimeError], None] | None = None,
) -> Iterator[np.ndarray | None]:
    """Yields the ids, end token included, of consecutive documents of a tar, given their records of the sidecar.

    end: the byte at which the next document begins, or the tar's size. Each document is judged by itself, so what is yielded for it
    depends on no other. Raises RuntimeError, naming file and byte, if one is not what its record says; with `on_damage` that is told
    the error, and None is yielded.
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
        run = _Run(path, file, field=field, first=int(records["offset"][0]), end=end)
        for record in records.tolist():
            try:
                tokens = _read_document(run, record, tokenizer=tokenizer)
            except RuntimeError as error:
                if on_damage is None:
                    raise
                on_damage(error)
                tokens = None
            yield tokens


class _Run:
    """Consecutive documents, in memory where they are not too far apart.

    A plain header is read here, which takes a tenth of the time of a tar iterator: what has an extended header, is far apart or
    looks wrong goes to webdataset's, whose judgement is the last.
    """

    def __init__(self, path: Path, file: io.BufferedReader, *, field: str, first: int, end: int) -> None:
        self.path, self.field = path, field
        self._file, self._first, self._content = file, first, b""
        if end - first <= MAX_RUN_BYTES:
            with suppress(OSError):
                file.seek(first)
                self._content = file.read(end - first)

    def member(self, offset: int) -> Member:
        """The document whose header lies at `offset` of the tar."""
        start = offset - self._first
        header = self._content[start : start + tarfile.BLOCKSIZE]
        if (
            header[_TYPE] in (tarfile.REGTYPE, tarfile.AREGTYPE)
            and _OCTAL.fullmatch(header[_SIZE])
            and _sum_is_right(header)
        ):
            start += tarfile.BLOCKSIZE
            size = int(header[_SIZE].strip(b" \0"), 8)
            content = self._content[start : start + size]
            if len(content) == size:
                return Member(name=header[_NAME].rstrip(b"\0").decode("utf-8", "replace"), content=content)
        try:
            self._file.seek(offset)
        except OSError as error:
            raise damaged(self.path, offset, f"seeking there fails ({error})") from error
        member = next(iterate_members(self.path, self._file, field=self.field), None)
        if member is None:
            raise damaged(self.path, offset, "the tar ends before this document")
        return member


def _sum_is_right(header: bytes) -> bool:
    """Whether the sum of a tar header's bytes, its checksum's own counted as blanks, is its checksum. Half of an Adler-32 is 1 and that
    sum modulo 65521, in a tenth of the time of sum().
    """
    if not _OCTAL.fullmatch(header[_CHECKSUM]):
        return False
    written = int(header[_CHECKSUM].strip(b" \0"), 8)
    return (zlib.adler32(header) & 0xFFFF) == (1 + written + sum(header[_CHECKSUM]) - 8 * ord(" ")) % 65521


def _read_document(run: _Run, record: tuple[int, int, int], *, tokenizer: Tokenizer) -> np.ndarray:
    offset, num_tokens, crc32 = record
    member = run.member(offset)
    if zlib.crc32(member.content) != crc32:
        raise damaged(run.path, offset, f"the document {member.name} has not the checksum that the index records")
    tokens = decode_document(run.path, member, field=run.field, tokenizer=tokenizer)
    if len(tokens) != num_tokens:
        raise damaged(
            run.path, offset, f"the document {member.name} has {len(tokens)} tokens, but the index says {num_tokens}"
        )
    return tokens


def iterate_members(path: Path, file: io.BufferedReader, *, field: str) -> Iterator[Member]:
    """Yields the documents (members with extension `field`) from the file's position on, by webdataset's iterator."""
    position = file.tell()
    try:
        stream: Any = file  # webdataset takes a stream here, although it says TarFile
        for member in tar_file_iterator(stream, select_files=lambda name: field_of(name) == field):
            name = (
                member["fname"].encode("utf-8", "backslashreplace").decode()
            )  # for messages, which a console must print
            yield Member(name=name, content=member["data"])
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
    lowest = 0 if tokens.dtype.kind == "u" else int(tokens.min(initial=0))
    if lowest < 0 or int(tokens.max(initial=0)) >= tokenizer.vocab_size:
        raise RuntimeError(
            f"the ids of the document {member.name} in {path} must be below the tokenizer's vocab_size "
            f"{tokenizer.vocab_size}, but they go from {tokens.min()} to {tokens.max()}: use the tokenizer that made "
            "them"
        )
    ends = len(tokens) > 0 and tokens[-1] == tokenizer.end_token
    return (tokens if ends else np.append(tokens, tokenizer.end_token)).astype(tokenizer.dtype, copy=False)


def _array_of(content: bytes) -> np.ndarray:
    """What numpy's reader gives. Plain flat integers are taken apart here: numpy parses their header as Python, in tens of microseconds."""
    plain = _NPY.match(content)
    if plain is None or plain.end() != 10 + int.from_bytes(content[8:10], "little"):
        try:
            return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        except (
            Exception
        ) as error:  # of hostile headers numpy's reader raises MemoryError, TokenError, RecursionError, ...
            reason = " ".join(str(error).split())
            raise ValueError(f"{type(error).__name__}: {reason[:100]}") from error
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
