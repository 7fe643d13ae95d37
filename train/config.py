"""A run's whole config: composes every folder's section, and checks what one section cannot know about another.

Owns the sections of train/ itself, the checks across sections, those that need the number of processes, and the rules
of what a resumed run may change. The text of files and of errors is made in config_file.py and config_errors.py.
Called by launcher/main.py (load) and train/run.py (world, resume, the copy in the run folder).
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from data.config import DataConfig, check_layout
from model.config import ModelConfig
from model.section import Section
from parallel.config import (
    ParallelConfig,
    ProcessInfo,
    check_nodes,
    resolve_ep_size,
    resolve_node_size,
    resolve_table_columns,
)
from train.checkpoint_config import CheckpointConfig
from train.config_errors import sections, validate
from train.config_file import Tree, read_tree, yaml_text
from train.differences import Difference, differences
from train.match import solve_match
from train.watch_config import WatchConfig

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class RunConfig(Section):
    """The job: where it writes, how long it is, what it computes in."""

    dir: str = Field(min_length=1, description="run folder, relative to the folder the command is typed in")
    steps: Count = Field(description="optimizer steps in all; also the length of the schedule")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=1, description="of the weights, the order of the data, dropout"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the matmuls; the weights are float32 in both"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda where torch sees a GPU, else cpu"
    )
    log_every_steps: Count = Field(default=10, description="steps between two lines of metrics")
    init_from: str | None = Field(
        None, min_length=1, description="run folder, checkpoint or export whose weights a new run begins with"
    )
    upcycle: bool = Field(False, description="init_from is a dense model: its layers become this one's experts")
    upcycle_router_std: NotNegative | None = Field(None, description="of the new routers' first logits; null: 0.001")

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if (self.upcycle and self.init_from is None) or (not self.upcycle and self.upcycle_router_std is not None):
            raise ValueError(
                f"upcycle needs init_from, and upcycle_router_std needs upcycle, but init_from is {self.init_from}, upcycle is "
                f"{self.upcycle} and upcycle_router_std is {self.upcycle_router_std}: set what is missing, or remove the rest"
            )
        return self


class OptimConfig(Section):
    """The optimizer, its schedule, and how many micro-steps make a step."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: NotNegative = Field(description="peak learning rate")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), description="adamw only")
    eps: Annotated[float, Field(gt=0.0)] = Field(default=1.0e-8, description="adamw only")
    weight_decay: NotNegative = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="steps in which the rate rises linearly to lr"
    )
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="after the warmup; cosine ends at the last step"
    )
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.0, description="where cosine ends, as a part of lr"
    )
    clip_grad_norm: NotNegative = Field(
        default=0.25, description="largest global gradient norm; 0.0 turns clipping off"
    )
    accumulation_steps: Count = Field(
        1, description="micro-steps of a step; each has global_batch_size / accumulation_steps rows"
    )

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        unused = sorted({"betas", "eps"} & self.model_fields_set)
        # a resolved config writes the defaults out: those ask for nothing
        unused = [name for name in unused if getattr(self, name) != type(self).model_fields[name].default]
        if self.optimizer == "sgd" and unused:
            raise ValueError(
                f"{unused[0]} belongs to adamw, but optimizer is sgd and {unused[0]} is {getattr(self, unused[0])}: "
                f"remove {unused[0]} or set optimizer to adamw"
            )
        return self

    @model_validator(mode="after")
    def _schedule_has_an_end(self) -> Self:
        if self.schedule == "constant" and self.min_lr_ratio:
            raise ValueError(
                f"min_lr_ratio is where a cosine ends, but schedule is constant and min_lr_ratio is {self.min_lr_ratio}: "
                "set min_lr_ratio to 0.0 or schedule to cosine"
            )
        return self


class EvalConfig(Section):
    """When the held-out loss is measured, and on how much."""

    every_steps: Count = 100
    max_tokens: Count = Field(default=65536, description="targets scored, from the start of the held-out split")
    memory_blocks: Count | None = Field(
        default=None, description="rows of memory of every mixer that has memory; null: as many as in training"
    )


class Config(Section):
    """Everything a run is started with. Other programs read and write these names: none is renamed."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    watch: WatchConfig = WatchConfig()

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.optim.warmup_steps >= self.run.steps:
            raise ValueError(
                f"optim.warmup_steps must be below run.steps, but warmup_steps is {self.optim.warmup_steps} and steps is "
                f"{self.run.steps}: lower optim.warmup_steps or raise run.steps"
            )
        if self.model.match is not None:
            raise ValueError(
                "model.match is solved while a config file is loaded, but it is still there in one that was not loaded: give the sizes"
            )
        self.watch.check_length(steps=self.run.steps, checkpoint_every=self.checkpoint.every_steps)
        self._lengths_and_memory_fit()
        # With one process only the division into micro-steps is checked; check_world asks again with their number.
        check_layout(self.data, accumulation_steps=self.optim.accumulation_steps, num_ranks=1)
        return self

    def _lengths_and_memory_fit(self) -> None:
        mixers, memory = self.model.mixer_kinds(), self.model.memory_blocks()
        for name in dict.fromkeys(mixers):
            getattr(self.model, name).check_length(self.data.sequence_length, mixers)
        if self.eval.memory_blocks is not None and not memory:
            raise ValueError(
                f"eval.memory_blocks is for mixers with memory, but it is {self.eval.memory_blocks} and no mixer of "
                f"{list(self.model.mixers)} has memory_blocks: set eval.memory_blocks to null, or give a mixer memory_blocks"
            )
        if memory and self.data.document_mask is True:
            raise ValueError(
                f"memory crosses the ends of documents, but data.document_mask is true and memory_blocks of the mixers is "
                f"{max(memory.values())}: set data.document_mask to auto or false, or memory_blocks to 0"
            )
        if memory and len(self.data.sources) > 1:
            raise ValueError(
                f"memory goes on where the row before it ended, so a mixer with memory needs one source, but memory_blocks of the "
                f"mixers is {max(memory.values())} and data.shards lists {len(self.data.sources)}: keep one source, or set "
                "memory_blocks to 0"
            )
        rows = self.data.global_batch_size // self.optim.accumulation_steps
        if memory and self.data.streams % rows:
            raise ValueError(
                "with memory a micro-step must not meet a stream twice: its rows must divide data.streams, but "
                f"data.global_batch_size / optim.accumulation_steps is {rows} and streams is {self.data.streams}: set data.streams to "
                f"a multiple of {rows}"
            )

    @property
    def mask_documents(self) -> bool:
        """What data.document_mask means for this model: auto is true unless a mixer has memory."""
        return self.data.document_mask is True or (self.data.document_mask == "auto" and not self.model.memory_blocks())


@dataclass(frozen=True)
class Layout:
    """What `auto` in the parallel section means in this world: processes per expert group, and per node."""

    ep_size: int
    node_size: int


def load_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, say: Callable[[str], None] = lambda sentence: None
) -> Config:
    """The config in a YAML file with `a.b=c` overrides over it; what `model.match` asks for is solved, and `say` told how well.

    ValueError, one sentence, for anything wrong in them.
    """
    tree = read_tree(path, overrides=overrides, sections=sections(Config))
    solved = solve_match(tree, load=_load_unmatched)
    if solved.sentence is not None:
        say(solved.sentence)
    return validate(Config, solved.tree)


def _load_unmatched(path: str) -> Config:
    """A config that another one is matched to: it may ask for a number of parameters, but not for those of a third."""
    return validate(Config, solve_match(read_tree(path, overrides=(), sections=sections(Config)), load=None).tree)


def check_world(config: Config, info: ProcessInfo) -> Layout:
    """Everything that depends on the number of processes. ValueError where it does not fit the config."""
    check_layout(config.data, accumulation_steps=config.optim.accumulation_steps, num_ranks=info.world_size)
    processes, local = info.world_size, info.local_world_size
    if config.parallel.node_size == "auto" and len(set(info.tasks_of_nodes)) > 1:
        raise ValueError(
            f"parallel.node_size must be a number where nodes differ in theirs of processes, but it is auto and they have "
            f"{', '.join(map(str, info.tasks_of_nodes))}: start as many on each (--ntasks-per-node), or set parallel.node_size to a number "
            "that divides them all"
        )
    node_size = resolve_node_size(config.parallel.node_size, processes=processes, processes_per_node=local)
    ep_size = resolve_ep_size(
        config.parallel.ep_size,
        processes=processes,
        processes_per_node=node_size,
        smallest_bank=config.model.smallest_bank(),
    )
    check_nodes(ep_size=ep_size, node_size=node_size)
    has_tables = any(bank.shape.is_table for bank in config.model.banks())
    columns, d_model = config.parallel.table_columns, config.model.d_model
    resolve_table_columns(columns, ep_size=ep_size, d_model=d_model, has_tables=has_tables)
    return Layout(ep_size=ep_size, node_size=node_size)


def to_yaml(config: Config) -> str:
    """YAML of every value, defaults included; `load_config` of it gives an equal config."""
    return yaml_text(config.model_dump(mode="json"))


# What a resumed run may change. The first part says where the work is done and what is written beside it: the rows, the
# mathematics and the schedule stay. Left out on purpose: run.dtype and optim.accumulation_steps change the arithmetic,
# data.streams and the names and weights of data.shards the meaning of the saved position, eval.max_tokens what heldout_loss in
# metrics.jsonl is. A place of shards may change (`_is_place`): train/resume.py compares their fingerprints.
_MAY_CHANGE = (
    "parallel.",
    "run.dir",  # the folder was moved
    "run.device",
    "run.log_every_steps",
    "data.num_workers",
    "data.max_skipped_shards",  # a shard breaks when it will
    "data.cache",  # with cache_gb: another node has another disk
    "data.allow_pipe",
    "model.recompute",  # another layout may need the memory; dropout masks do not depend on the order of computing
    "model.expert_backend",  # another machine may lack the kernel
    "model.kernel_backend",
    "model.sigma_moe.keep_hidden",  # memory for time
    "checkpoint.",
    "eval.every_steps",
    "watch.",  # what is done at a bad step; good steps stay as they are
)


def _is_place(change: Difference) -> bool:
    """Where shards lie, of one that was there before: data.shards, data.shards.NAME.shards or data.heldout."""
    is_of_a_source = change.key.startswith("data.shards.") and change.key.endswith(".shards")
    is_place = is_of_a_source or change.key in ("data.shards", "data.heldout")
    return is_place and isinstance(change.old, str) and isinstance(change.new, str)


def read_saved(values: dict[str, Any]) -> Config:
    """The config that a run was saved with. A field that is newer than the run has its default."""
    return validate(Config, Tree(values=values, file="the config saved with the run", overrides={}))


def check_resume(saved_values: dict[str, Any], config: Config) -> list[str]:
    """Sentences for the log about what a resumed run changes; `saved_values` is the tree that the run was saved with.

    Raises:
        ValueError: one sentence that names every key that may not change, with both values.
    """
    saved = read_saved(saved_values)
    changes = differences(saved.model_dump(mode="json"), config.model_dump(mode="json"))
    longer = config.run.steps > saved.run.steps
    allowed = [c.key.startswith(_MAY_CHANGE) or _is_place(c) or (c.key == "run.steps" and longer) for c in changes]
    refused = [change for change, may in zip(changes, allowed, strict=True) if not may]
    if refused:
        grow = "; run.steps may only grow" if any(change.key == "run.steps" for change in refused) else ""
        raise ValueError(
            f"{config.run.dir} holds a run with another config: {'; '.join(map(str, refused))}{grow}: "
            f"give the old value{'s' if len(refused) > 1 else ''} to resume it, or another run.dir to start a new run"
        )
    return [f"{change}{' (the schedule is recomputed)' if change.key == 'run.steps' else ''}" for change in changes]
