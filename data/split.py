"""What the `data` section names, opened: the sources of the training rows, and the held-out shards. Fetches what opening needs.

Of a remote set the index, the tokenizer and every sidecar come first (16 bytes a document); the tars come when they are read
(data/cache.py). They lie in a folder of data.cache that is named by address and index, so a set that changes gets another folder and a
run that still uses the old one keeps it. Adopting (data/adopt.py) needs a local folder: a remote one must have its index. Called by
train/.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.cache import GB, ShardCache
from data.config import DataConfig, is_remote
from data.damage import check_limit
from data.files import exclusive, sha256_of, write_whole
from data.index import INDEX_FILE, ShardIndex, check_tokenizer, open_index, parse_index, shards_of
from data.remote import fetch_content
from data.shards import SHARD_SUFFIX, SIDECAR_SUFFIX, ShardInfo
from data.tokenizer import TOKENIZER_FILE, Tokenizer

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # no folder, and nothing that a shell takes for its own
LOOKED_AT = 3  # shards, evenly over the set: one disk or server of several may be missing
FETCHERS = 8  # sidecars at once: they are small, so waiting is most of their time


@dataclass(frozen=True)
class Source:
    """An opened source. name: empty for the one that data.shards names by its path alone."""

    name: str
    weight: float
    index: ShardIndex


@dataclass(frozen=True)
class TrainSplit:
    """All sources of the training rows, of one tokenizer."""

    sources: tuple[Source, ...]

    @property
    def tokenizer_id(self) -> str:
        return self.sources[0].index.tokenizer_id

    @property
    def vocab_size(self) -> int:
        return self.sources[0].index.vocab_size

    @property
    def end_token(self) -> int:
        return self.sources[0].index.end_token

    @property
    def token_bytes_V(self) -> np.ndarray:
        """Text bytes of each id, int64."""
        return self.sources[0].index.token_bytes_V

    @property
    def folder(self) -> Path:
        """Where the first source's tokenizer.json lies."""
        return self.sources[0].index.folder

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal rows: of a path the shards' own, of a list also the names and weights."""
        if not self.sources[0].name:
            return self.sources[0].index.fingerprint
        parts = [[source.name, source.weight, source.index.fingerprint] for source in self.sources]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def damaged(self) -> Mapping[str, str]:
        """Path and problem of each shard that was let pass when it was opened."""
        return {path: problem for source in self.sources for path, problem in source.index.damaged.items()}

    def names_of(self, damaged: Mapping[str, str]) -> list[list[str]]:
        """Source, shard and problem of what `damaged` has by place (path -> problem): a checkpoint's words, for shards may move."""
        if not damaged:
            return []  # at every save: a walk over 100,000 shards takes 0.7 s
        places = [
            (source, shard.name, source.index.place_of(shard.name))
            for source in self.sources
            for shard in source.index.shards
        ]
        return [[source.name, name, damaged[place]] for source, name, place in places if place in damaged]

    def places_of(self, named: Sequence[Sequence[str]]) -> dict[str, str]:
        """Place and problem of what `names_of` gave, where these shards are now."""
        indexes = {source.name: source.index for source in self.sources}
        return {indexes[source].place_of(name): problem for source, name, problem in named}


def one_source(index: ShardIndex) -> TrainSplit:
    """The split whose one source is `index`."""
    return TrainSplit((Source("", 1.0, index),))


def open_train(config: DataConfig) -> TrainSplit:
    """Opens every source of `data.shards`.

    Raises ValueError where they are no shards or their tokenizers differ, RuntimeError for damage beyond
    `data.max_skipped_shards` and for what cannot be fetched.
    """
    tolerant = config.max_skipped_shards > 0
    split = TrainSplit(
        tuple(
            Source(source.name, source.weight, _open(source.shards, config, tolerant=tolerant))
            for source in config.sources
        )
    )
    for source in split.sources[1:]:
        check_tokenizer(split.sources[0].index, source.index)
    check_limit(split.damaged, limit=config.max_skipped_shards)
    return split


def open_heldout(config: DataConfig) -> ShardIndex:
    """Opens `data.heldout`; damage there is always an error, because the loss of other targets cannot be compared."""
    return _open(config.heldout, config, tolerant=False)


def look_at(place: str, *, tolerant: bool = False) -> str:
    """Whether the shards of `place` can be read here, without reading them: the index, and of a folder the first bytes of some shards.

    Returns what is equal for equal shards. Of a remote set only the index is fetched, and nothing is kept. tolerant: as for `open_index`.
    Raises ValueError or RuntimeError as opening it would.
    """
    if is_remote(place):
        content = fetch_content(place, INDEX_FILE, accept=_check_index)
        _safe_shards(place, parse_index(content))
        return hashlib.sha256(content).hexdigest()
    index = open_index(place, tolerant=tolerant)
    whole = [shard for shard in index.shards if str(index.folder / shard.name) not in index.damaged]
    for shard in whole[:: max(1, len(whole) // LOOKED_AT)]:
        path = index.folder / shard.name
        try:
            with path.open("rb") as file:
                file.read(1)
        except OSError as error:
            raise RuntimeError(
                f"the shard {path} must be readable, but it is not ({error.strerror or error}): let this user read it"
            ) from error
    return index.fingerprint


def _open(place: str, config: DataConfig, *, tolerant: bool) -> ShardIndex:
    if not is_remote(place):
        return open_index(place, tolerant=tolerant)
    assert config.cache is not None, "data/config.py lets no remote place pass without a cache"
    root = Path(config.cache)
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder, shards = _fetch_all_but_tars(place, root)
    except OSError as error:
        raise RuntimeError(
            f"data.cache must be a folder that can be written, but {root} cannot ({error.strerror or error}): choose another"
        ) from error
    limit = int(config.cache_gb * GB)
    largest = max(shards, key=lambda shard: shard.bytes)
    if largest.bytes > limit:
        raise ValueError(
            f"data.cache_gb must hold each shard, but it is {config.cache_gb} and {largest.name} of {place} has "
            f"{largest.bytes / GB} GB: raise data.cache_gb"
        )
    return open_index(folder, cache=ShardCache(root, limit, place))


def _fetch_all_but_tars(place: str, root: Path) -> tuple[Path, tuple[ShardInfo, ...]]:
    """The folder in the cache that has all but the tars, and the shards. Whatever process comes first fetches, others wait."""
    content = fetch_content(place, INDEX_FILE, accept=_check_index)
    index = parse_index(content)
    shards = _safe_shards(place, index)
    name = "-".join(hashlib.sha256(part).hexdigest()[:16] for part in (place.encode(), content))
    folder = root / f"index-{name}"
    folder.mkdir(exist_ok=True)
    with exclusive(root / f".{folder.name}.lock"):
        _fetch_tokenizer(place, folder, index["tokenizer_id"])
        with ThreadPoolExecutor(FETCHERS) as pool:
            list(pool.map(lambda shard: _fetch_sidecar(place, folder, shard), shards))
        if not (folder / INDEX_FILE).is_file() or (folder / INDEX_FILE).read_bytes() != content:
            write_whole(folder / INDEX_FILE, content)  # last: the folder is whole
    return folder, shards


def _check_index(content: bytes) -> None:
    try:
        parse_index(content)
    except ValueError as error:
        raise ValueError(f"it {error}") from error


def _fetch_tokenizer(place: str, folder: Path, tokenizer_id: str) -> None:
    """The index has no checksum of the file, but the id is one of what it says."""

    def check(content: bytes) -> None:
        found = Tokenizer(content.decode(), name="it").tokenizer_id
        if found != tokenizer_id:
            raise ValueError(f"it is {found} and the index says {tokenizer_id}")

    path = folder / TOKENIZER_FILE
    with suppress(FileNotFoundError, ValueError):
        check(path.read_bytes())
        return
    write_whole(path, fetch_content(place, TOKENIZER_FILE, accept=check))


def _fetch_sidecar(place: str, folder: Path, shard: ShardInfo) -> None:
    path = (folder / shard.name).with_suffix(SIDECAR_SUFFIX)
    if path.is_file() and sha256_of(path) == shard.sidecar_sha256:
        return
    write_whole(path, fetch_content(place, path.name, sha256=shard.sidecar_sha256))


def _safe_shards(place: str, index: dict[str, Any]) -> tuple[ShardInfo, ...]:
    """The shards that an index lists, with names that are safe as files here and in a command."""
    shards = shards_of(index)
    unsafe = [s.name for s in shards if not (PLAIN_NAME.fullmatch(s.name) and s.name.endswith(SHARD_SUFFIX))]
    if unsafe or not shards:
        raise RuntimeError(
            f"{INDEX_FILE} of {place} must list tars whose names have letters, digits, _ . and - only, but it lists "
            f"{f'the shard {unsafe[0]!r}' if shards else 'no shards'}: rename them and write the index anew"
        )
    return shards
