"""What a folder of shards was made from: prepare.json, and whether the same command would make the same again.

Owns the arguments that determine shards, and that file. Used by data/prepare.py.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.sources import STDLIB, SourceFile, describe_source
from data.tokenizer import TOKENIZER_FILE, load_tokenizer

RECORD_FILE = "prepare.json"


@dataclass(frozen=True)
class Arguments:
    """What determines the shards."""

    sources: tuple[str, ...]
    out: str
    tokenizer: str  # bytes, bpe, or the path of a tokenizer.json
    vocab_size: int | None
    shard_tokens: int | None
    seed: int
    text_field: str
    document_bytes: int


def is_finished(out: Path, arguments: Arguments) -> bool:
    """Whether `out` holds what `arguments` would write. Raises ValueError if it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / RECORD_FILE).is_file():
        raise ValueError(
            f"--out must be a new folder, but {out} holds something else: choose another --out or remove it"
        )
    there, wanted = _read_record(out), _record(arguments)
    differences = [
        f"{name} is {there.get(name)!r} there and {value!r} here"
        for name, value in wanted.items()
        if value != there.get(name)
    ]
    if differences:
        raise ValueError(
            f"{out} holds shards made with other arguments ({'; '.join(differences)}): choose another --out, or remove "
            "the folder"
        )
    _check_same_tokenizer(out, arguments)
    return True


def check_same_files(out: Path, files: Sequence[SourceFile]) -> None:
    """Raises ValueError if a file was changed, added or removed. Shards from before files were recorded are taken as they are."""
    there, now = _read_record(out).get("files"), _files(files)
    if there is not None and there != now:
        raise ValueError(
            f"{out} holds shards of other texts: the files of --source changed since (their record was {there} and is {now}): choose "
            "another --out, or remove the folder"
        )


def record_of(arguments: Arguments, files: Sequence[SourceFile]) -> dict[str, Any]:
    """What is kept with the shards, and compared when the same folder is asked for again."""
    return _record(arguments) | {"files": _files(files)}


def _check_same_tokenizer(out: Path, arguments: Arguments) -> None:
    """Raises ValueError if the file of --tokenizer changed: its path is in the record, what it says is beside the shards."""
    path = Path(arguments.tokenizer)
    if arguments.tokenizer in ("bytes", "bpe") or not path.exists():
        return
    there, now = (load_tokenizer(file).tokenizer_id for file in (out / "train" / TOKENIZER_FILE, path))
    if there != now:
        raise ValueError(
            f"{out} holds shards of another tokenizer: the file of --tokenizer, {path}, changed since (they were made with {there} and it "
            f"is {now}): restore the file, choose another --out, or remove the folder"
        )


def _record(arguments: Arguments) -> dict[str, Any]:
    tokenizer = arguments.tokenizer
    return {
        "--source": [describe_source(source) for source in arguments.sources],
        "--tokenizer": tokenizer if tokenizer in ("bytes", "bpe") else str(Path(tokenizer).resolve()),
        "--vocab-size": arguments.vocab_size,
        "--shard-tokens": arguments.shard_tokens,
        "--seed": arguments.seed,
        "--text-field": arguments.text_field,
        "--document-bytes": arguments.document_bytes,
    }


def _read_record(out: Path) -> dict[str, Any]:
    try:
        there = json.loads((out / RECORD_FILE).read_bytes())
        if not isinstance(there, dict):
            raise ValueError(f"it holds {there!r}")
    except ValueError as error:
        raise RuntimeError(
            f"{out / RECORD_FILE} must say how the shards were made, but it cannot be read ({error}): restore it, choose another --out, "
            "or remove the folder"
        ) from error
    return there


def _files(files: Sequence[SourceFile]) -> dict[str, Any]:
    """What tells whether the files of the sources are still the same, without reading them. Those of the library have no times: its
    version is in the record, and each installation has its own."""
    lines = [
        f"{file.name} {file.bytes} {0 if file.source == STDLIB else file.path.stat().st_mtime_ns}"
        for file in files
        if file.bytes
    ]
    content = "\n".join(lines).encode("utf-8", "surrogateescape")
    return {
        "number": len(lines),
        "bytes": sum(file.bytes for file in files),
        "sha256 of names, sizes and times": hashlib.sha256(content).hexdigest(),
    }
