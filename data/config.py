"""The `data` section of a run's config: which shards, and how their tokens become rows.

Owns the fields, their constraints, and the checks that relate rows to processes. Reads no file: data/split.py opens
the shards, train/config.py looks at the other sections. Used by data/ and train/config.py.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

BLOCK_ROWS = 1024  # of a stream, in which the sources have their counts: see data/mixture.py
HTTP = ("http://", "https://")
PIPE = "pipe:"
SOURCE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
Place = Annotated[str, Field(min_length=1)]


class SourceConfig(BaseModel):
    """One of several sources."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(min_length=1, description="its name in metrics and messages")
    shards: str = Field(min_length=1, description="folder of its shards, or a URL as for data.shards")
    weight: float = Field(gt=0.0, description="its part of the rows, relative to the other weights")

    @model_validator(mode="after")
    def _name_is_plain(self) -> Self:
        if not SOURCE_NAME.fullmatch(self.name):
            raise ValueError(
                f"the name of a source must be of letters, digits, _ . and -, because metrics and files have it, but it is "
                f"'{self.name}': choose another name"
            )
        return self


class DataConfig(BaseModel):
    """Where the tokens come from and how they are cut into rows."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    shards: Place | Annotated[tuple[SourceConfig, ...], Field(min_length=1)] = Field(
        description="folder of the training shards, as `python -m data.prepare` writes it, or http(s)://..., or "
        "pipe:COMMAND with {}; or a list of sources, each {name, shards, weight}",
    )
    heldout: str = Field(
        min_length=1, description="folder (or URL) of the held-out shards, made with the same tokenizer"
    )
    sequence_length: int = Field(ge=1, description="tokens of a row that are fed to the model (each has a target)")
    global_batch_size: int = Field(ge=1, description="rows of one optimizer step, over all processes and micro-steps")
    streams: int = Field(
        ge=1,
        description="contiguous pieces that the shards are cut into: row p + streams continues row p; "
        "the processes must divide it",
    )
    document_mask: Literal["auto", True, False] = Field(
        default="auto", description="keep attention inside documents; auto: unless a mixer has memory"
    )
    num_workers: int = Field(
        default=0, ge=0, description="reader processes per training process; 0 reads in the training process"
    )
    max_skipped_shards: int = Field(
        default=0,
        ge=0,
        description="damaged or missing training shards to pass over, their targets ignored; one more is an error",
    )
    cache: str | None = Field(
        default=None, min_length=1, description="folder on this node for fetched shards; remote shards need it"
    )
    cache_gb: float = Field(
        default=100.0,
        gt=0.0,
        description="most that data.cache holds, in GB (1e9 bytes); the shards not used for longest go",
    )
    allow_pipe: bool = Field(default=False, description="whether pipe: may run commands")

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """What data.shards lists; a path is one source without a name that others would see."""
        if isinstance(self.shards, str):
            return (SourceConfig.model_construct(name="", shards=self.shards, weight=1.0),)
        return self.shards

    @model_validator(mode="after")
    def _sources_fit(self) -> Self:
        sources = self.sources
        names = [source.name for source in sources]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"each source of data.shards must have a name of its own, but two are {twice}: rename one")
        _check_weights(sources)
        return self

    @model_validator(mode="after")
    def _places_fit(self) -> Self:
        named = {
            f"data.shards ({source.name})" if source.name else "data.shards": source.shards for source in self.sources
        }
        named["data.heldout"] = self.heldout
        for key, place in named.items():
            _check_place(key, place, cache=self.cache, allow_pipe=self.allow_pipe)
        if self.cache is not None and not any(is_remote(place) for place in named.values()):
            raise ValueError(
                f"data.cache is for remote shards, but it is {self.cache} and all shards are folders: remove data.cache"
            )
        return self


def is_remote(place: str) -> bool:
    """Whether shards are fetched from there; everything else is a folder."""
    return place.startswith((*HTTP, PIPE))


def _check_weights(sources: Sequence[SourceConfig]) -> None:
    exact = [Fraction(repr(source.weight)) for source in sources]
    for source, weight in zip(sources, exact, strict=True):
        if weight * BLOCK_ROWS < sum(exact):
            raise ValueError(
                f"each weight of data.shards must be at least 1/{BLOCK_ROWS} of their sum, but that of {source.name} is "
                f"{source.weight} and the sum is {sum(other.weight for other in sources)}: "
                "raise it, or prepare the source together with another one"
            )


def _check_place(key: str, place: str, *, cache: str | None, allow_pipe: bool) -> None:
    if not is_remote(place):
        if re.match(r"[A-Za-z][A-Za-z0-9+]*://", place):
            raise ValueError(
                f"{key} must be a folder, http(s)://... or pipe:COMMAND, but it is {place}: name a command that writes the file "
                "to its output, as pipe:COMMAND with {} for the file's name"
            )
        return
    if place.startswith(HTTP) and not _is_address(place):
        raise ValueError(
            f"{key} must be an address as https://host:port/folder, in ASCII without blanks, user or #, but it is {place}: write other "
            "characters as %XX and other host names as xn--..., and put credentials into the environment of a pipe:"
        )
    if place.startswith(PIPE) and not allow_pipe:
        raise ValueError(
            f"{key} runs a command only where data.allow_pipe is true, but it is {place} and data.allow_pipe is false: set "
            "data.allow_pipe to true if you trust the command"
        )
    if place.startswith(PIPE) and "{}" not in place:
        raise ValueError(
            f"{key} must have {{}} where its command takes the name of the file, but it is {place}: add {{}}, as in "
            "pipe:cat /mnt/shards/{}"
        )
    if cache is None:
        raise ValueError(
            f"remote shards are kept in data.cache, but {key} is {place} and data.cache is null: set data.cache to a folder on "
            "this node's own disk"
        )


def _is_address(place: str) -> bool:
    try:
        parts = urlsplit(place)
        wrong = parts.port == 0 or not parts.hostname or "@" in parts.netloc or "#" in place
    except ValueError:  # a port that is no number, half an IPv6 address
        return False
    return not wrong and re.fullmatch(r"[!-~]+", place) is not None


def check_layout(config: DataConfig, *, accumulation_steps: int, num_ranks: int) -> None:
    """Raises ValueError unless the rows of every micro-step, and the streams, can be dealt out evenly to `num_ranks`
    processes.

    Any layout that passes sees the same rows, because each process then owns whole streams.
    """
    if config.global_batch_size % accumulation_steps:
        raise ValueError(
            "optim.accumulation_steps must divide data.global_batch_size, but accumulation_steps is "
            f"{accumulation_steps} and global_batch_size is {config.global_batch_size}: change one of them"
        )
    if config.streams % num_ranks:
        raise ValueError(
            f"the number of processes must divide data.streams, but there are {num_ranks} processes and streams is "
            f"{config.streams}: start a number of processes that divides it, or change data.streams (before the run's "
            "first step)"
        )
    micro_step_rows = config.global_batch_size // accumulation_steps
    if micro_step_rows % num_ranks:
        raise ValueError(
            f"the number of processes must divide a micro-step's rows, but there are {num_ranks} processes and "
            f"data.global_batch_size / optim.accumulation_steps is {config.global_batch_size} / {accumulation_steps} = "
            f"{micro_step_rows} rows: change one of the three"
        )
