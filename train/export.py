"""An export: a trained model in one folder that other programs read, without optimizer and without pieces.

Owns the files of an export (docs/checkpoint_format.md is their contract): writing them from a checkpoint, and reading and checking
config.json. What a model is read from, an export or a run's checkpoint, is train/source.py's. Called by that and by
train/checkpoint_tool.py. One process.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from data.tokenizer import TOKENIZER_FILE, Tokenizer
from train.checkpoint_folder import PARTIAL, discard
from train.config import Config
from train.manifest import Count, FileEntry, FileName, Record
from train.storage import DTYPE_NAMES, sync_folder, write_file

FORMAT = "switchyard-export"
VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # the hub's own limit for a file of weights


class ExportConfig(Record):
    """config.json. model: the model section of the run. trained_with: the other sections, for evaluation and generation."""

    format: Literal["switchyard-export"]
    version: Literal[1]
    step: Count
    vocab_size: Annotated[int, Field(ge=1)]
    tokenizer_id: str
    dtype: Literal["float32", "bfloat16"]
    model: dict[str, Any]
    trained_with: dict[str, Any]
    files: dict[FileName, FileEntry]


class Exported(Protocol):
    """What is exported: train/source.py's CheckpointSource. shapes: of every weight and state; read: one of them, whole, in float32."""

    @property
    def step(self) -> int: ...
    @property
    def config(self) -> Config: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    @property
    def states(self) -> frozenset[str]: ...
    def read(self, name: str) -> Tensor: ...


def is_router(name: str) -> bool:
    """Routers compute in float32 in every mode, so their weights stay float32 in every export."""
    return any(part.endswith("router") for part in name.split("."))


def write_export(
    out: Path, model: Exported, *, dtype: Literal["float32", "bfloat16"], shard_bytes: int = SHARD_BYTES
) -> ExportConfig:
    """Writes the folder `out`, which must not exist, aside and under its name only when it is on disk. One tensor at a time is in memory.

    Raises:
        ValueError: `out` is there already.
        RuntimeError: it cannot be written.
    """
    if out.exists():
        raise ValueError(f"OUT must be a new folder, but {out} is there already: remove it or choose another")
    partial = out.with_name(out.name + PARTIAL)
    discard(partial)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise RuntimeError(
            f"{partial} cannot be made ({error.strerror}): choose a folder that this user may write"
        ) from error
    try:
        files = _write_weights(partial, model, dtype=getattr(torch, dtype), shard_bytes=shard_bytes)
        sections = model.config.model_dump(mode="json")
        config = ExportConfig(
            format=FORMAT,
            version=VERSION,
            step=model.step,
            vocab_size=model.tokenizer.vocab_size,
            tokenizer_id=model.tokenizer.tokenizer_id,
            dtype=dtype,
            model=sections.pop("model"),
            trained_with=sections,
            files=files,
        )
        _write(partial / TOKENIZER_FILE, model.tokenizer.to_bytes())
        _write(partial / CONFIG_FILE, json.dumps(config.model_dump(), indent=1).encode() + b"\n")
        partial.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise RuntimeError(f"{out} cannot be written ({error.strerror}): choose another folder") from error
    finally:
        discard(partial)
    return config


def read_export(folder: Path) -> ExportConfig:
    """config.json of an export.

    Raises:
        RuntimeError: it cannot be read, is of another version, or breaks the format.
    """
    file = folder / CONFIG_FILE
    try:
        fields = json.loads(file.read_bytes())
    except OSError as error:
        raise RuntimeError(f"{file} cannot be read ({error.strerror}): export the model again") from error
    except ValueError as error:
        raise RuntimeError(f"{file} is not JSON ({error}): export the model again") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise RuntimeError(f"{file} must say format {FORMAT!r}, but does not: it is no export of Switchyard")
    if fields.get("version") != VERSION:
        raise RuntimeError(
            f"{file} has version {fields.get('version')!r} and this program reads version {VERSION}: use the Switchyard that wrote it"
        )
    try:
        return ExportConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RuntimeError(f"{file} breaks the format at {where} ({first['msg']}): export the model again") from error


def is_export(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


@dataclass(frozen=True)
class _Planned:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _write_weights(folder: Path, model: Exported, *, dtype: torch.dtype, shard_bytes: int) -> dict[str, FileEntry]:
    planned = []
    for name, shape in sorted(model.shapes.items()):
        # states are running figures to which small steps are added: bfloat16 would swallow them
        wide = name in model.states or is_router(name)
        planned.append(_Planned(name, shape, torch.float32 if wide else dtype))
    shards = _shards(planned, shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [WEIGHTS_FILE]
    files = {name: _write_shard(folder / name, shard, model) for name, shard in zip(names, shards, strict=True)}
    if len(shards) > 1:
        place = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(tensor.size for tensor in planned)}, "weight_map": place}
        _write(folder / INDEX_FILE, json.dumps(index, indent=1).encode() + b"\n")
    return files


def _shards(planned: Sequence[_Planned], limit: int) -> list[list[_Planned]]:
    """In order of names, as many to a file as fit; a tensor beyond the limit has a file of its own."""
    shards: list[list[_Planned]] = [[]]
    for tensor in planned:
        if shards[-1] and sum(one.size for one in shards[-1]) + tensor.size > limit:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def _write_shard(path: Path, shard: Sequence[_Planned], model: Exported) -> FileEntry:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it the hub's own loader refuses the file
    offset = 0
    # wide elements first, so that every tensor starts at a multiple of its element size
    shard = sorted(shard, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    for tensor in shard:
        dtype, end = DTYPE_NAMES[tensor.dtype], offset + tensor.size
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)

    def chunks() -> Iterator[bytes | memoryview]:
        yield len(head).to_bytes(8, "little") + head
        for tensor in shard:
            values = model.read(tensor.name).to(tensor.dtype).contiguous()
            yield values.view(-1).view(torch.uint8).numpy().data if values.numel() else b""

    return write_file(path, chunks(), size=8 + len(head) + offset)


def _write(path: Path, data: bytes) -> None:
    write_file(path, [data], size=len(data))
