"""The `parallel` section of a run's config, and what one process knows about its place among the others.

Owns the section's fields and the rules that need the number of processes (ep_size, node_size, table_columns). What `exchange: auto`
means for a bank is worked out by parallel/volume.py. Builds no group and imports nothing but pydantic, so that one process trains with
the rest of parallel/ missing. Read by launcher/environment.py (makes the ProcessInfo), train/config.py (composes the section) and
everything in parallel/.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Size = Annotated[int, Field(ge=1)]

# Words in the keys by which users of other programs ask for what is not offered here: tensor_parallel_size, tp, ...
_NOT_OFFERED = {"tensor", "sequence", "pipeline", "context", "tp", "sp", "pp", "cp"}


class ParallelConfig(BaseModel):
    """How the processes share the experts (ep_size) and the optimizer's state (zero_stage)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ep_size: Size | Literal["auto"] = Field(
        default="auto", description="processes that share one set of experts; divides all processes"
    )
    zero_stage: int = Field(default=1, description="DeepSpeed ZeRO stage: 0, 1 or 2")
    exchange: Literal["auto", "tokens", "weights"] = Field(
        default="auto",
        description="what travels to the other ranks of the expert group; auto: for each bank what is fewer bytes",
    )
    chunks: Size = Field(
        default=1, description="parts into which an exchange is cut so that one part travels while another is computed"
    )
    table_columns: Size | Literal["auto"] = Field(
        default="auto",
        description="ranks of the expert group among which the width of a product-key table is split; divides ep_size and d_model; "
        "auto: what is fewest bytes; a number above 1 keeps tables from travelling as weights",
    )
    node_size: Size | Literal["auto"] = Field(
        default="auto", description="processes with fast links between them; auto: those of one machine"
    )
    placement_every_steps: Size | None = Field(
        default=None,
        description="steps between moves of experts to other ranks by measured load, where their tokens travel; null: they stay",
    )
    watchdog_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = Field(
        default=300.0, description="seconds without progress after which a hang is named and the job ended"
    )
    meeting_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | Literal["auto"] = Field(
        default="auto",
        description="seconds that a process waits at the start for the others to come; auto: 120, on several machines 600",
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_parallelism(cls, section: Any) -> Any:
        for key in section if isinstance(section, dict) else ():
            if _NOT_OFFERED & set(str(key).split("_")):
                raise ValueError(
                    f"tensor, sequence and pipeline parallelism are not offered, but {key} is {section[key]}: remove {key} and "
                    "use ep_size to split the experts and zero_stage to split the optimizer's state"
                )
        return section

    @field_validator("zero_stage")
    @classmethod
    def _check_zero_stage(cls, stage: int) -> int:
        if stage == 3:
            raise ValueError(
                "must be 0, 1 or 2, but it is 3: DeepSpeed's stage 3 averages different experts together; use 2"
            )
        if stage not in (0, 1, 2):
            raise ValueError(f"must be 0, 1 or 2, but it is {stage}: use 1, which splits the optimizer's state")
        return stage

    @model_validator(mode="after")
    def _columns_go_with_tokens(self) -> Self:
        if self.exchange == "weights" and self.table_columns not in (1, "auto"):
            raise ValueError(
                f"a table whose weights travel is not split by columns, but exchange is weights and table_columns is {self.table_columns}: "
                "set table_columns to auto or exchange to tokens"
            )
        return self


class ProcessInfo(BaseModel):
    """Where this process stands among all processes of the job, whoever started them.

    `launcher` names what started it ("torchrun", "deepspeed", "python", ...). `master_port` 0 (one process only) means
    any free port. The rest may be unknown: `node` is this machine's name; under SLURM `job` and `step` are its ids, `restarts` says how
    often the job was requeued, `nodes` are the step's machines in the order of their ranks and `tasks_of_nodes` the processes on each, and
    `gpus` is what was promised on this one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: Annotated[int, Field(ge=0)]
    world_size: Size
    local_rank: Annotated[int, Field(ge=0)]
    local_world_size: Size
    master_addr: str
    master_port: Annotated[int, Field(ge=0, le=65535)]
    launcher: str
    node: str = ""
    job: str = ""
    step: str = ""
    restarts: Annotated[int, Field(ge=0)] = 0
    nodes: tuple[str, ...] = ()
    tasks_of_nodes: tuple[Size, ...] = ()
    gpus: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        for small, large, rule in (
            ("rank", "world_size", "below"),
            ("local_rank", "local_world_size", "below"),
            ("local_world_size", "world_size", "at most"),
        ):
            low, high = getattr(self, small), getattr(self, large)
            if low > high or (rule == "below" and low == high):
                raise ValueError(
                    f"{small} must be {rule} {large}, but {small} is {low} and {large} is {high}: check what set them"
                )
        return self


def resolve_node_size(setting: int | Literal["auto"], *, processes: int, processes_per_node: int) -> int:
    """Number of processes with fast links between them. ValueError where a number does not divide all processes."""
    if setting == "auto":
        return processes_per_node
    if processes % setting:
        raise ValueError(
            f"parallel.node_size must divide the number of processes, but node_size is {setting} and there are {processes} "
            f"processes: use {_listed(_divisors(processes))} or auto"
        )
    return setting


def resolve_meeting_s(setting: float | Literal["auto"], info: ProcessInfo) -> float:
    """Seconds within which all processes must have come. On several machines the imports from a shared disk may differ by minutes."""
    if setting == "auto":
        return 120.0 if info.local_world_size == info.world_size else 600.0
    return setting


def resolve_ep_size(
    setting: int | Literal["auto"], *, processes: int, processes_per_node: int, smallest_bank: int | None
) -> int:
    """Number of processes that share one set of experts.

    `auto` is the largest divisor of `processes_per_node` (the all-to-all stays inside a node) that also divides
    `processes` and is at most `smallest_bank`, the number of expert groups of the smallest bank. A number may exceed
    the bank, because banks are padded. `smallest_bank` None means a model without experts: 1.

    Raises:
        ValueError: a number does not divide `processes`, or there are no experts to split.
    """
    if setting == "auto":
        most = 1 if smallest_bank is None else smallest_bank
        return max(size for size in _divisors(processes_per_node) if processes % size == 0 and size <= most)
    if smallest_bank is None and setting > 1:
        raise ValueError(
            f"parallel.ep_size splits experts, but ep_size is {setting} and model.mixers and model.feedforwards name no layer "
            "with experts: set parallel.ep_size to 1 or auto"
        )
    if processes % setting:
        raise ValueError(
            f"parallel.ep_size must divide the number of processes, but ep_size is {setting} and there are {processes} "
            f"processes: use {_listed(_divisors(processes))} or auto, or start another number of processes"
        )
    return setting


def check_nodes(*, ep_size: int, node_size: int) -> None:
    """ValueError where an expert group that is larger than a node is not made of whole nodes, which its exchange in two hops needs."""
    if ep_size > node_size and ep_size % node_size:
        raise ValueError(
            f"parallel.node_size must divide an ep_size that is larger, but node_size is {node_size} and ep_size is {ep_size}: "
            f"set parallel.ep_size to a multiple of {node_size} or to auto, or parallel.node_size to a divisor of {ep_size}"
        )


def resolve_table_columns(
    setting: int | Literal["auto"], *, ep_size: int, d_model: int, has_tables: bool
) -> int | Literal["auto"]:
    """The setting, checked: parallel/volume.py makes a number of `auto`, for each table.

    Raises:
        ValueError: a number does not divide `ep_size` or `d_model`, or is above 1 and no layer has a table.
    """
    if setting == "auto":
        return setting
    if setting > 1 and not has_tables:
        raise ValueError(
            f"parallel.table_columns splits product-key tables, but table_columns is {setting} and model.feedforwards names no layer "
            "with one: set parallel.table_columns to auto"
        )
    common = [size for size in _divisors(ep_size) if d_model % size == 0]
    for name, value in (("ep_size", ep_size), ("model.d_model", d_model)):
        if value % setting:
            raise ValueError(
                f"parallel.table_columns must divide ep_size and d_model, but table_columns is {setting} and {name} is {value}: "
                f"use {_listed(common)} or auto"
            )
    return setting


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(str(number) for number in numbers)
