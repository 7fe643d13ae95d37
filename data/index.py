"""The index of a folder of shards: what is in it, what tokenised it, and whether it is still what was written.

index.json holds, per shard, its name, bytes, checksum, documents and tokens (data/shards.py has the sidecars with one
record per document), the tokenizer's identity, and a checksum of itself. Opening a folder checks what costs one `stat`
per shard; each document has a crc32 that is compared whenever it is read, so training never uses a damaged one; the
checksums of whole shards are compared by `verify_shards` alone (`python -m data.index FOLDER --verify`), because every
process hashing every shard would read the set many times over before the first step. Used by data/loader.py,
data/prepare.py and train/.
"""

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.adopt import adopt_shards
from data.cache import ShardCache
from data.files import exclusive, sha256_of, write_whole
from data.shards import FIELDS, SHARD_SUFFIX, SIDECAR_DTYPE, SIDECAR_SUFFIX, ShardInfo, rebuild_hint
from data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

INDEX_FILE = "index.json"
FORMAT = 1
PREPARE_COMMAND = "python -m data.prepare --source PATH --out DIR --tokenizer bpe --vocab-size N"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIndex:
    """A folder of shards, opened. Small: the per-document sidecars are read when a shard is."""

    folder: Path
    tokenizer_id: str
    vocab_size: int
    end_token: int
    document_field: str  # the tar members that are documents: npy (token ids), txt or text
    shards: tuple[ShardInfo, ...]
    fingerprint: str  # equal for equal documents, tokens and order: a checkpoint keeps it
    token_bytes_V: np.ndarray = field(repr=False, compare=False)  # text bytes of each id, int64; the end token has 0
    damaged: dict[str, str] = field(
        default_factory=dict
    )  # path and problem of each shard that a tolerant opening let pass
    cache: ShardCache | None = None  # where the tars are kept, if they are fetched; `folder` then has all but the tars

    @property
    def num_tokens(self) -> int:
        """Tokens of one epoch, end tokens included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        """Documents of one epoch."""
        return sum(shard.documents for shard in self.shards)

    def place_of(self, name: str) -> str:
        """Where the shard `name` lies, in the words of `damaged` and of messages."""
        return str(self.folder / name) if self.cache is None else f"{self.cache.place} {name}"


def open_index(folder: str | Path, *, tolerant: bool = False, cache: ShardCache | None = None) -> ShardIndex:
    """Opens a folder of shards. A plain webdataset of others gets its index first (any number of processes may come).

    tolerant: shards that are missing or have another size are listed in `damaged` instead. cache: of a folder without tars, which
    data/split.py fetched. Raises ValueError if the folder is not one, and RuntimeError, naming the file, if what lies in it is not what the
    index records.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder of shards at {folder}: write it with {PREPARE_COMMAND}, or change data.shards or "
            "data.heldout"
        )
    try:
        return _open(folder, tolerant=tolerant, cache=cache)
    except OSError as error:
        raise RuntimeError(
            f"the folder of shards {folder} cannot be read ({error}): restore it, or correct its permissions"
        ) from error


def _open(folder: Path, *, tolerant: bool, cache: ShardCache | None) -> ShardIndex:
    if not (folder / INDEX_FILE).is_file():
        _adopt(folder)
    content = _read_content(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    if tokenizer.tokenizer_id != content["tokenizer_id"]:
        raise RuntimeError(
            f"{folder / TOKENIZER_FILE} must be the tokenizer of its shards, but it is {tokenizer.tokenizer_id} and "
            f"the index says {content['tokenizer_id']}: restore it, or {rebuild_hint(folder)}"
        )
    shards = shards_of(content)
    problems = {} if cache else _problems_of(folder, shards)
    if problems and not tolerant:
        raise RuntimeError(next(iter(problems.values())))
    _check_no_more(folder, shards)
    return ShardIndex(
        folder=folder,
        tokenizer_id=tokenizer.tokenizer_id,
        vocab_size=tokenizer.vocab_size,
        end_token=tokenizer.end_token,
        document_field=content["field"],
        shards=shards,
        fingerprint=_fingerprint(content),
        token_bytes_V=tokenizer.token_bytes_V,
        damaged=problems,
        cache=cache,
    )


def write_index(folder: Path, *, shards: Sequence[ShardInfo], field: str, tokenizer: Tokenizer) -> None:
    """Writes index.json: from then on the folder is a set of shards."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "field": field,
        "tokenizer_id": tokenizer.tokenizer_id,
        "shards": [asdict(shard) for shard in shards],
    }
    content["checksum"] = _checksum(content)
    write_whole(folder / INDEX_FILE, (json.dumps(content, indent=1) + "\n").encode())


def check_tokenizer(index: ShardIndex, other: "ShardIndex | str") -> None:
    """Raises ValueError unless `other`, shards or the tokenizer id of a checkpoint, has the tokenizer of `index`."""
    name, other_id = (
        ("the checkpoint", other) if isinstance(other, str) else (f"the shards in {other.folder}", other.tokenizer_id)
    )
    if other_id != index.tokenizer_id:
        raise ValueError(
            f"the shards in {index.folder} and {name} must have the same tokenizer, but theirs are "
            f"{index.tokenizer_id} and {other_id}: prepare both from the same tokenizer.json (--tokenizer PATH)"
        )


def verify_shards(index: ShardIndex) -> None:
    """Reads every shard and compares its checksum (about 1 GB/s). Raises RuntimeError that names all damaged ones."""
    damaged = [shard.name for shard in index.shards if sha256_of(index.folder / shard.name) != shard.sha256]
    if damaged:
        raise RuntimeError(
            f"{len(damaged)} of {len(index.shards)} shards in {index.folder} have not the checksum that the index "
            f"records ({', '.join(damaged)}): restore them, or {rebuild_hint(index.folder)}"
        )


def _adopt(folder: Path) -> None:
    num_shards = len(list(folder.glob(f"*{SHARD_SUFFIX}")))
    if not num_shards:
        raise ValueError(
            f"the folder {folder} has neither {INDEX_FILE} nor tars: write the shards with {PREPARE_COMMAND}"
        )
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    try:
        with exclusive(folder / f".{INDEX_FILE}.lock"):
            if not (folder / INDEX_FILE).is_file():  # else another process wrote it while this one waited
                logger.warning("first use of %s: reading its %d tars once to write their index", folder, num_shards)
                found = adopt_shards(folder, tokenizer=tokenizer)
                write_index(folder, shards=found.shards, field=found.field, tokenizer=tokenizer)
    except OSError as error:  # what cannot be read is told by data/adopt.py
        raise RuntimeError(
            f"the index of {folder} cannot be written ({error}): make the folder writable for its first use"
        ) from error


def _read_content(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_FILE
    try:
        return parse_index(path.read_bytes())
    except ValueError as error:
        raise RuntimeError(f"the index {path} {error}: restore it, or {rebuild_hint(folder)}") from error


def parse_index(written: bytes) -> dict[str, Any]:
    """What an index.json says. Raises ValueError, whose words follow the file's name, if it is not what `write_index` wrote."""
    try:
        content = json.loads(written)
        checksum = content.pop("checksum")
        if checksum != _checksum(content):
            raise ValueError("was altered since it was written (its checksum differs)")
        if content["format"] != FORMAT or content["field"] not in FIELDS:
            raise ValueError(f"must have format {FORMAT}, but it has format {content['format']}")
        shards_of(content)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"cannot be read ({error!r})") from error
    return content


def shards_of(content: dict[str, Any]) -> tuple[ShardInfo, ...]:
    """The shards that the content of an index lists. Raises ValueError or TypeError if they are none."""
    shards = tuple(ShardInfo(**shard) for shard in content["shards"])
    seen = set()
    for shard in shards:
        texts, counts = (shard.name, shard.sha256, shard.sidecar_sha256), (shard.bytes, shard.documents, shard.tokens)
        if not all(type(text) is str for text in texts) or not all(type(n) is int and n >= 0 for n in counts):
            raise ValueError(f"must list names, checksums and counts, but it has {asdict(shard)}")
        if shard.name in seen:
            raise ValueError(f"must list each shard once, but it lists {shard.name} twice")
        seen.add(shard.name)
    return shards


def _problems_of(folder: Path, shards: Sequence[ShardInfo]) -> dict[str, str]:
    """Sentences, by path, about tars and sidecars that are missing or have not the recorded size."""
    found = {str(folder / shard.name): _problem_of(folder, shard) for shard in shards}
    return {path: problem for path, problem in found.items() if problem is not None}


def _problem_of(folder: Path, shard: ShardInfo) -> str | None:
    path = folder / shard.name
    if not path.is_file():
        return f"the shard {path} is missing: restore it, or {rebuild_hint(folder)}"
    size = path.stat().st_size
    if size != shard.bytes:
        problem = "truncated" if size < shard.bytes else "not the one of the index"
        return (
            f"the shard {path} is {problem}: it has {size} bytes and the index says {shard.bytes}; restore it, or "
            f"{rebuild_hint(folder)}"
        )
    sidecar = path.with_suffix(SIDECAR_SUFFIX)
    expected = shard.documents * SIDECAR_DTYPE.itemsize
    if not sidecar.is_file() or sidecar.stat().st_size != expected:
        return (
            f"the sidecar {sidecar} must have {expected} bytes for {shard.documents} documents, but it is "
            f"{f'{sidecar.stat().st_size} bytes long' if sidecar.is_file() else 'missing'}: restore it, or "
            f"{rebuild_hint(folder)}"
        )
    return None


def _check_no_more(folder: Path, shards: Sequence[ShardInfo]) -> None:
    unknown = sorted({path.name for path in folder.glob(f"*{SHARD_SUFFIX}")} - {shard.name for shard in shards})
    if unknown:
        raise RuntimeError(
            f"the index of {folder} has {len(shards)} shards, but {len(unknown)} more tars lie there ({unknown[0]}, "
            f"...): remove them, or remove {INDEX_FILE} so that the index is written anew"
        )


def _fingerprint(content: dict[str, Any]) -> str:
    """Hash of all that determines the rows: tokenizer, kind of document, and the shards' contents in their order."""
    shards = [[shard["sha256"], shard["documents"], shard["tokens"]] for shard in content["shards"]]
    return _checksum([content["format"], content["field"], content["tokenizer_id"], shards])


def _checksum(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m data.index FOLDER [--verify]`: prints what the folder holds; 1 if it is damaged."""
    parser = argparse.ArgumentParser(
        prog="python -m data.index",
        description="Open a folder of shards, write the index of a plain webdataset, verify checksums.",
    )
    parser.add_argument("folder", type=Path, help="folder of shards, such as runs/shards/train")
    parser.add_argument("--verify", action="store_true", help="read every shard and compare its checksum")
    options = parser.parse_args(arguments)
    try:
        index = open_index(options.folder)
        if options.verify:
            verify_shards(index)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    checked = "every checksum verified" if options.verify else "sizes checked"
    print(
        f"{index.folder}: {len(index.shards)} shards, {index.num_documents} documents, {index.num_tokens} tokens of "
        f"{index.tokenizer_id}; {checked}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
