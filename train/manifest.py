"""The manifest: what a checkpoint holds, and the rules by which it is whole.

Owns the fields of manifest.json (docs/checkpoint_format.md is the contract) and their reading with every check that needs no tensor
data. Does not own files of tensors (train/storage.py) nor the order in which a checkpoint is written and made visible
(train/checkpoint.py, the caller of both).
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from train.boxes import Span, box_of, check_cover

FORMAT = "switchyard-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_SUM = "manifest.sha256"
STATE = "state"  # the kind of named tensors; parameters have the kinds "master", "exp_avg" and "exp_avg_sq"

Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Plain names only: a manifest can neither reach outside its folder nor name a file of another kind (such as a pickle).
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors$")]
TENSOR_NAME = r"^[a-z][a-z0-9_]*/[A-Za-z0-9_.-]+$"
TensorName = Annotated[str, Field(pattern=TENSOR_NAME)]
Sides = list[Annotated[list[Count], Field(min_length=2, max_length=2)]]  # a box: [first, end) per dimension
DType = Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]


class Record(BaseModel):
    """An object of the manifest: exact types, unknown keys are errors, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(Record):
    """One safetensors file: its length in bytes and the checksum of the whole file."""

    bytes: Count
    sha256: Digest


class Piece(Record):
    """Elements [start, start + length) of the flat box, stored in `file` under `key` as a 1-D tensor.

    `box` is one [first, end) per dimension of the logical tensor; None is the whole tensor.
    """

    file: FileName
    key: str
    start: Count
    length: Annotated[int, Field(ge=1)]
    box: Sides | None = None

    def span(self, shape: Sequence[int]) -> Span:
        return Span(box_of(self.box, shape), self.start, self.start + self.length)


class TensorEntry(Record):
    """One logical tensor: its whole shape, and the pieces that together hold each of its elements once."""

    shape: list[Count]
    dtype: DType
    pieces: list[Piece]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Manifest(Record):
    """manifest.json. `tensors` is keyed by "<kind>/<logical name>", such as "exp_avg/embedding.weight"."""

    format: Literal["switchyard-checkpoint"]
    version: Literal[1]
    step: Count
    position: Count
    config_sha256: Digest
    config: dict[str, Any]
    extra: dict[str, Any]
    tensors: dict[TensorName, TensorEntry]
    files: dict[FileName, FileEntry]

    def encode(self) -> bytes:
        """The bytes of manifest.json. A line to each tensor and file: a person looks for them with grep."""
        lines = []
        for field, value in self.model_dump(exclude_unset=True).items():
            text = json.dumps(value, allow_nan=False)
            if field in ("tensors", "files"):
                rows = (f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
                text = "{\n" + ",\n".join(rows) + "\n }"
            lines.append(f" {json.dumps(field)}: {text}")
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def check_json(value: dict[str, Any], *, name: str) -> None:
    """`value` comes back from JSON equal.

    Raises:
        ValueError: it holds a tuple, a key that is no text, NaN, infinity or an object of another kind.
    """
    advice = "keep text, numbers, lists and dicts with keys of text in it, the rest in named tensors"
    try:
        copy = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"a checkpoint's {name} must be JSON ({error}): {advice}") from error
    if copy != value:
        changed = [key for key in value if key not in copy or copy[key] != value[key]]
        raise ValueError(f"a checkpoint's {name} must come back from JSON as it was, but {changed} would not: {advice}")


def config_digest(config: dict[str, Any]) -> str:
    """SHA-256 of the config as JSON with sorted keys and no spaces."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sum_line(data: bytes, name: str) -> bytes:
    """One line in the format of sha256sum: `sha256sum --check` reads it."""
    return f"{hashlib.sha256(data).hexdigest()}  {name}\n".encode()


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint `path`: checksum, version, fields, names and coverage checked; tensor files are not opened.

    Raises:
        RuntimeError: damaged, incomplete, or of another version; names the file and the first fault.
    """
    file = path / MANIFEST
    data = _read(file)
    if _read(path / MANIFEST_SUM) != sum_line(data, MANIFEST):
        raise RuntimeError(
            f"{file} does not match its checksum in {MANIFEST_SUM}: one of the two is damaged, use another checkpoint"
        )
    manifest = _parse(data, file)
    if config_digest(manifest.config) != manifest.config_sha256:
        raise RuntimeError(
            f"config_sha256 in {file} must be the checksum of its config, but it is not: the writer is at fault"
        )
    for name, entry in manifest.tensors.items():
        _check_pieces(file, manifest, name, entry)
    return manifest


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise RuntimeError(
            f"{file} cannot be read ({error.strerror}): the checkpoint is incomplete, use another one"
        ) from error


def _parse(data: bytes, file: Path) -> Manifest:
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise RuntimeError(f"{file} is not JSON ({error}): use another checkpoint") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise RuntimeError(f"{file} must say format {FORMAT!r}, but does not: it is no checkpoint of Switchyard")
    if fields.get("version") != VERSION:
        raise RuntimeError(
            f"{file} has format version {fields.get('version')!r} and this program reads version {VERSION}: "
            "use the Switchyard that wrote it"
        )
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RuntimeError(f"{file} breaks the format at {where} ({first['msg']}): the writer is at fault") from error


def _check_pieces(file: Path, manifest: Manifest, name: str, entry: TensorEntry) -> None:
    for piece in entry.pieces:
        if piece.file not in manifest.files:
            raise RuntimeError(
                f"{name} in {file} has a piece in {piece.file}, which is not among its files: the writer is at fault"
            )
    spans = [piece.span(entry.shape) for piece in entry.pieces]
    check_cover(f"{name} in {file}", entry.shape, spans, remedy="the writer is at fault, use another checkpoint")
