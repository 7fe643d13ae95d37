"""The files of a checkpoint: tensors written in pieces and read by range, checksums, and what makes a write last.

Owns the bytes of the .safetensors files and the calls that force them to disk. Does not own what must be in a checkpoint
(train/manifest.py) nor when a file becomes visible (train/checkpoint.py, the only caller).
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.parameters import Box
from train.boxes import Span, box_of, common, text
from train.manifest import DType, FileEntry, Manifest, Piece, Record

# What a writer holds in host memory at a time: the 12 GB of a GPU reach the disk without a second copy of them.
PIECE_BYTES = 32 * 2**20

DTYPES: dict[DType, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: dict[torch.dtype, DType] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Part:
    """Elements [start, start + values.numel()) of the flat `box` (None: the whole) of the logical tensor `name`, in live storage that is
    read or filled.
    """

    name: str  # "<kind>/<logical name>"
    shape: tuple[int, ...]
    start: int
    values: Tensor  # 1-D
    box: Box | None = None

    @property
    def end(self) -> int:
        return self.start + self.values.numel()

    @property
    def span(self) -> Span:
        return Span(box_of(self.box, self.shape), self.start, self.end)


class Written(Record):
    """What one process wrote: its file (absent if it had nothing to write) and the pieces in it by tensor name."""

    files: dict[str, FileEntry]
    pieces: dict[str, list[Piece]]


def write_file(path: Path, chunks: Iterable[bytes | memoryview], *, size: int) -> FileEntry:
    """Creates `path` (which must not exist) from `chunks`, `size` bytes in all, and forces file and folder to disk.

    The checksum is of the bytes in memory, so that reading the file back compares the disk with what was meant.

    Raises:
        RuntimeError: the disk is full or refuses; says the file, the bytes needed and free, and what to do.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)
    except OSError as error:
        raise RuntimeError(_explain(error, path, size)) from error
    return FileEntry(bytes=size, sha256=digest.hexdigest())


def _explain(error: OSError, path: Path, size: int) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "free space there or choose a run.dir on a larger disk"
    else:
        remedy = "give this user a writable folder there or choose another run.dir"
    free = "an unknown number"
    with contextlib.suppress(OSError):  # the disk may be gone altogether: the first error is the one to report
        free = shutil.disk_usage(path.parent).free
    return f"{path} needs {size} bytes ({free} are free) but could not be written ({error.strerror}): {remedy}, then start again"


def sync_folder(folder: Path) -> None:
    """Forces the names in `folder` to disk: without it a power cut can undo a file's creation or a rename."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems keep names safe on the server and refuse the call
            raise
    finally:
        os.close(handle)


def write_tensors(path: Path, parts: Sequence[Part]) -> Written:
    """Writes `parts` as one safetensors file, each cut into pieces of at most PIECE_BYTES; without elements no file is made.

    One piece at a time is copied to host memory. The safetensors library is not used for writing because it wants all at once.

    Raises:
        RuntimeError: see `write_file`.
    """
    # Wide elements first, so that every piece starts at a multiple of its element size.
    cut = [piece for part in sorted(parts, key=lambda part: -part.values.itemsize) for piece in _cut(part)]
    if not cut:
        return Written(files={}, pieces={})
    header: dict[str, object] = {}
    pieces: dict[str, list[Piece]] = defaultdict(list)
    offset = 0
    for part in cut:
        box = part.span.box
        key = f"{part.name}{'' if box is None else text(box)}@{part.start}"
        size = part.values.numel() * part.values.itemsize
        dtype = DTYPE_NAMES[part.values.dtype]
        header[key] = {"dtype": dtype, "shape": [part.values.numel()], "data_offsets": [offset, offset + size]}
        place = {} if box is None else {"box": [list(side) for side in box]}
        pieces[part.name].append(Piece(file=path.name, key=key, start=part.start, length=part.values.numel(), **place))
        offset += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    start = len(head).to_bytes(8, "little") + head

    def chunks() -> Iterator[bytes | memoryview]:
        yield start
        for part in cut:
            yield _bytes_of(part.values)

    return Written(files={path.name: write_file(path, chunks(), size=len(start) + offset)}, pieces=dict(pieces))


def _cut(part: Part) -> Iterator[Part]:
    step = PIECE_BYTES // part.values.itemsize
    for first in range(0, part.values.numel(), step):
        yield Part(part.name, part.shape, part.start + first, part.values[first : first + step], part.box)


def _bytes_of(values: Tensor) -> memoryview:
    host = (
        values.detach().cpu().contiguous().as_strided(values.shape, (1,))
    )  # a single element may come with any stride
    return host.view(torch.uint8).numpy().data  # by way of bytes, because numpy has no bfloat16


def check_files(path: Path, files: Mapping[str, FileEntry], *, share: int, shares: int) -> None:
    """Compares length and checksum of every `shares`-th file of the checkpoint, from `share` on, with the manifest's `files`.

    Raises:
        RuntimeError: a file is missing or damaged; names it.
    """
    for name in sorted(files)[share::shares]:
        check_file(path / name, files[name])


def check_file(file: Path, entry: FileEntry, *, tell: Callable[[int], object] = lambda size: None) -> None:
    """Compares length and checksum of a file with its entry. tell: called with the bytes of each part that was read.

    Raises:
        RuntimeError: the file is missing or damaged; names it.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**20))
    try:
        with open(file, "rb") as opened:
            check_size(file, os.fstat(opened.fileno()).st_size, entry)
            while size := opened.readinto(buffer):
                digest.update(buffer[:size])
                tell(size)
    except OSError as error:
        raise RuntimeError(
            f"{file} cannot be read ({error.strerror}): it is damaged, use another checkpoint"
        ) from error
    if digest.hexdigest() != entry.sha256:
        raise RuntimeError(f"{file} does not match its checksum in the manifest: it is damaged, use another checkpoint")


def check_size(file: Path, size: int, entry: FileEntry) -> None:
    """RuntimeError if the file's length is not that of its entry."""
    if size != entry.bytes:
        raise RuntimeError(
            f"{file} must have {entry.bytes} bytes, but has {size}: it is damaged, use another checkpoint"
        )


def read_parts(path: Path, manifest: Manifest, parts: Sequence[Part]) -> None:
    """Fills `parts` in place from files mapped into memory: only those with wanted elements are opened, only these elements read.

    Raises:
        RuntimeError: a piece is not what the manifest says; names file and key.
    """
    wanted: dict[str, list[tuple[Part, Piece]]] = defaultdict(list)
    for part in parts:
        for piece in manifest.tensors[part.name].pieces:
            if any(common(part.span, piece.span(part.shape), part.shape)):
                wanted[piece.file].append((part, piece))
    for name, copies in wanted.items():  # file by file: who reads everything keeps one file open, not a thousand
        with mapped(path / name, remedy="use another checkpoint") as file:
            for part, piece in copies:
                _copy(file.get_slice(piece.key), part, piece, dtype=manifest.tensors[part.name].dtype)


@contextlib.contextmanager
def mapped(file: Path, *, remedy: str) -> Iterator[Any]:
    """A safetensors file mapped into memory.

    Raises:
        RuntimeError: it cannot be read; names it and the remedy.
    """
    try:
        try:
            opened = safe_open(file, framework="pt")
        except RuntimeError as error:  # of torch, which maps the file: in its own words, with the path in them
            raise OSError(str(error)) from error
        with opened as readable:
            yield readable
    except (OSError, SafetensorError) as error:
        raise RuntimeError(f"{file} cannot be read ({error}): {remedy}") from error


def _copy(stored: Any, part: Part, piece: Piece, *, dtype: DType) -> None:
    found = (stored.get_dtype(), stored.get_shape())
    if found != (dtype, [piece.length]):
        raise RuntimeError(
            f"{piece.key} in {piece.file} must have dtype {dtype} and shape {[piece.length]}, "
            f"but has {found[0]} and {found[1]}: the writer is at fault"
        )
    # a slice of `stored` is a view of the mapped file: some columns of some rows are copied without a whole row in memory
    for to, source in common(part.span, piece.span(part.shape), part.shape):
        to.of(part.values).copy_(source.of(stored))
