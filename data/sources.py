"""Text to prepare: which files of the named sources are text, in which order, and the documents in them.

A plain file is a document, whatever its name, if it has no NUL byte near its start and decodes as UTF-8; others are
skipped and counted. A .jsonl file has one document per line, in a text field. Each may be compressed (.gz, .zst).
Documents longer than a limit are cut at line ends, so that no reader ever holds a huge one. Knows nothing of tokens.
Used by data/prepare.py.
"""

import gzip
import json
import os
import platform
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from io import BufferedIOBase, BufferedReader, BytesIO, RawIOBase
from pathlib import Path

import zstandard

STDLIB = "stdlib"  # the source that every machine has: the standard library of the Python that runs
STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})  # leaves about 12 MB of 31
HEAD_BYTES = 8192  # where a NUL byte says that a file is not text


@dataclass(frozen=True)
class SourceFile:
    """A file that may hold text."""

    path: Path
    source: str  # the source that it was found in, as the user named it
    name: str  # relative to the source: it orders the files and does not depend on the machine
    bytes: int


@dataclass(frozen=True)
class Document:
    """One text, never empty."""

    text: str
    file: SourceFile


def describe_source(source: str) -> str:
    """A source's name in the record of what shards were made from: an absolute path, or the library's version."""
    return f"{STDLIB} of Python {platform.python_version()}" if source == STDLIB else str(Path(source).resolve())


def find_sources(sources: Sequence[str], *, seed: int, excluded: Sequence[Path]) -> list[SourceFile]:
    """All files of the sources (files, folders, or `stdlib`), ordered by a hash of (seed, name).

    Hidden files, caches and what lies under an `excluded` folder are left out. Raises ValueError for a source that does
    not exist.
    """
    files = []
    for number, source in enumerate(sources):
        root = Path(sysconfig.get_path("stdlib") if source == STDLIB else source)
        if root.is_file():
            found = [root]
        elif root.is_dir():
            found = sorted(_walk(root, library=source == STDLIB, excluded={path.resolve() for path in excluded}))
        else:
            raise ValueError(
                f"the source {source} must be a file or a folder, but there is nothing at {root.resolve()}: correct "
                "--source"
            )
        for path in found:
            name = f"{number}/{path.name if path == root else path.relative_to(root).as_posix()}"
            files.append(SourceFile(path=path, source=source, name=name, bytes=path.stat().st_size))
    return sorted(
        files, key=lambda file: (blake2b(os.fsencode(f"{seed}/{file.name}"), digest_size=16).digest(), file.name)
    )


def read_documents(
    files: Sequence[SourceFile], *, text_field: str, document_bytes: int, skipped: Counter[str]
) -> Iterator[Document]:
    """The documents of the files, in order. What is no text is counted in `skipped` by its reason.

    Raises ValueError, naming file and line, for a .jsonl line without the text field; RuntimeError for a damaged .gz or
    .zst.
    """
    for file in files:
        for text in _texts(file.path, text_field=text_field, skipped=skipped):
            try:
                pieces = cut(text, limit=document_bytes)
            except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
                skipped["documents that are not valid Unicode"] += 1
                continue
            for piece in pieces:
                if piece.strip():
                    yield Document(text=piece, file=file)
                else:
                    skipped["empty documents"] += 1


def check_has_text(files: Sequence[SourceFile], *, sources: Sequence[str], text_field: str) -> None:
    """Raises ValueError for a source in which no file has a document. Reads as far as each source's first one."""
    for source in sources:
        of_source = [file for file in files if file.source == source]
        skipped: Counter[str] = Counter()
        if (
            next(read_documents(of_source, text_field=text_field, document_bytes=1 << 20, skipped=skipped), None)
            is None
        ):
            reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "no files"
            raise ValueError(f"the source {source} must hold text, but it has none ({reasons}): correct --source")


def cut(text: str, *, limit: int) -> list[str]:
    """Cuts a text into pieces of at most `limit` (>= 4) bytes of UTF-8, after line ends where there are any."""
    content = text.encode()
    pieces, start = [], 0
    while len(content) - start > limit:
        end = content.rfind(b"\n", start, start + limit) + 1
        if end == 0:
            end = start + limit
            while content[end] & 0xC0 == 0x80:  # not inside a character
                end -= 1
        pieces.append(content[start:end].decode())
        start = end
    return [*pieces, content[start:].decode()]


def _walk(root: Path, *, library: bool, excluded: set[Path]) -> Iterator[Path]:
    left_out = STDLIB_SKIPPED if library else frozenset()
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and name != "__pycache__"
            and name not in left_out
            and (here / name).resolve() not in excluded
        ]
        for name in names:
            if not name.startswith(".") and (not library or name.endswith(".py")) and (here / name).is_file():
                yield here / name


def _texts(path: Path, *, text_field: str, skipped: Counter[str]) -> Iterator[str]:
    with _open(path) as (file, kind):
        if kind == ".jsonl":
            yield from _json_lines(path, file, text_field)
            return
        head = file.read(HEAD_BYTES)
        if b"\0" in head:
            skipped["binary files"] += 1
            return
        try:
            text = (head + file.read()).decode("utf-8")
        except UnicodeDecodeError:
            skipped["files that are not UTF-8"] += 1
            return
        yield text


def _json_lines(path: Path, file: BufferedIOBase, text_field: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[text_field]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"line {number} of {path} must be a JSON object with the text field {text_field!r}, but reading it "
                f"fails ({error!r}): correct the file or --text-field"
            ) from error
        if not isinstance(text, str):
            raise ValueError(
                f"the field {text_field!r} in line {number} of {path} must be a text, but it is {type(text).__name__}: "
                "correct --text-field"
            )
        yield text


class _ZstdFile(RawIOBase):
    """Decompresses zstd frames. The library's own reader takes a file that was cut off for one that ended."""

    def __init__(self, raw: BufferedIOBase) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._compressed = b""
        self._ready = BytesIO()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not (size := self._ready.readinto(buffer)):
            self._compressed = self._compressed or self._raw.read(1 << 17)
            if not self._compressed:
                if not self._frame.eof:
                    raise EOFError("it ends inside a frame")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = BytesIO(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data
        return size


@contextmanager
def _open(path: Path) -> Iterator[tuple[BufferedIOBase, str]]:
    """A file's decompressed bytes, and the extension that says what they are."""
    suffix = path.suffix.lower()
    kind = Path(path.stem).suffix.lower() if suffix in (".gz", ".zst") else suffix
    try:
        with path.open("rb") as raw:
            if suffix == ".gz":
                yield gzip.GzipFile(fileobj=raw), kind
            elif suffix == ".zst":
                yield BufferedReader(_ZstdFile(raw)), kind
            else:
                yield raw, kind
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise RuntimeError(f"the file {path} cannot be decompressed ({error}): restore it or leave it out") from error
