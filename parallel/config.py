"""The `parallel` section of a run's config, and what one process knows about its place among the others.

Owns the section's fields and the two rules that need the number of processes (`ep_size: auto`, `node_size: auto`).
Builds no group and imports nothing but pydantic, so that one process trains with the rest of parallel/ missing. Read
by launcher/environment.py (makes the ProcessInfo), train/config.py (composes the section) and everything in parallel/.
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
        default="auto", description="what travels to the other ranks; auto means tokens"
    )
    node_size: Size | Literal["auto"] = Field(
        default="auto", description="processes with fast links between them; auto: those of one machine"
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

    @field_validator("exchange")
    @classmethod
    def _check_exchange(cls, exchange: str) -> str:
        if exchange == "weights":
            raise ValueError("must be auto or tokens, but it is weights, which this version does not send: use auto")
        return exchange


class ProcessInfo(BaseModel):
    """Where this process stands among all processes of the job, whoever started them.

    `launcher` names what started it ("torchrun", "deepspeed", "python", ...). `master_port` 0 (one process only) means
    any free port.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: Annotated[int, Field(ge=0)]
    world_size: Size
    local_rank: Annotated[int, Field(ge=0)]
    local_world_size: Size
    master_addr: str
    master_port: Annotated[int, Field(ge=0, le=65535)]
    launcher: str

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


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(str(number) for number in numbers)
