"""The `data` section of a run's config: which shards, and how their tokens become rows.

Owns the fields, their constraints, and the two checks that relate rows to processes. Reads no file: data/index.py looks
at the shards, train/config.py at the other sections. Used by data/loader.py and train/config.py.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DataConfig(BaseModel):
    """Where the tokens come from and how they are cut into rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: str = Field(
        min_length=1, description="folder of the training shards, as `python -m data.prepare` writes it"
    )
    heldout: str = Field(min_length=1, description="folder of the held-out shards, made with the same tokenizer")
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
