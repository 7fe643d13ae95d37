"""What every section of a config is, and what the sections of layers promise, so that a new layer needs no line in a list of kinds.

Owns the base classes; model/config.py has the sections themselves. Imports no torch: `--help` reads the sections too.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from torch import nn

    from model.cost import Cost

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Size = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class BankShape:
    """What must be known of a bank to work out the bytes of its exchange (parallel/volume.py), without building it.

    name: attribute path of the bank in its layer. label: as the layer hands it to the dispatcher. Per token each of `num_heads` heads
    chooses `top_k` of the `num_groups` groups: of all of them (`shares_groups`), or head h of its own, h * G / H and on. row_dim: width
    of the rows that travel to the experts, 0 if none do; output_dim: of those that come back. rows_per_token, outputs_per_token: 1, or
    num_heads for rows of (token, head); same_rows: the two are one space, so that one index serves for both. group_numel: weights of a
    group. is_table: its width may be split over ranks, by columns; replies: a sum over the columns must then come home before the
    gates travel. token_factor: tokens that are routed for each token of the row, 1 + blocks of memory. hashed: 8 bytes more travel
    with each copy.
    """

    name: str
    label: str
    num_groups: int
    num_heads: int
    top_k: int
    shares_groups: bool
    row_dim: int
    output_dim: int
    rows_per_token: int
    outputs_per_token: int
    same_rows: bool
    group_numel: int
    is_table: bool
    replies: bool
    token_factor: int
    hashed: bool


@dataclass(frozen=True)
class Place:
    """Where a layer stands. mixers: the kind of every layer's mixer, in order. backend: how grouped_matmul computes.

    dropout: `model.dropout`, for a layer that has a hidden state of its own to drop. shared: one dict for all layers of a model; what
    several of them use is put there by the first (`place.shared.setdefault(key, module)`) and has the first one's name.
    """

    d_model: int
    num_layers: int
    depth: int
    mixers: tuple[str, ...]
    backend: str
    dropout: float
    shared: dict[str, "nn.Module"] = field(default_factory=dict)


class LayerSection(Section):
    """The section of a kind of layer: it says what the rest of the system must know of the kind, and builds it."""

    reads_raw: ClassVar[bool] = False  # its forward takes the residual stream before the norm too (`model.norm: peri`)

    def build(self, place: Place) -> "nn.Module":
        """The layer at `place`, on the meta device."""
        raise NotImplementedError

    def banks(self, place: Place) -> list[BankShape]:
        """The expert banks of the layer at `place`; empty for a layer without experts."""
        return []

    def expert_widths(self, d_model: int) -> set[int]:
        """Every width that grouped_matmul meets, as rows or columns."""
        return set()

    def notes(self) -> list[str]:
        """Sentences for the log: what a default was turned into."""
        return []

    def cost(self, place: Place, *, length: int) -> "Cost | None":
        """What the layer at `place` costs on a row of `length` tokens (model/cost.py); None where nobody has worked it out."""
        return None


class FeedForwardSection(LayerSection):
    """A kind of feed-forward: it works on each token by itself."""

    def sharing(self) -> str | None:
        """The setting, if it is on, by which all layers of the kind share weights."""
        return None


class MixerSection(LayerSection):
    """A kind of mixer: it moves information between tokens."""

    def num_memory_blocks(self) -> int:
        """Rows before the current one that the mixer may look at (Transformer-XL state memory)."""
        return 0

    def check_length(self, length: int, mixers: tuple[str, ...]) -> None:
        """ValueError where rows of `length` tokens do not fit the kind; `mixers` as in Place."""


class RoutedSection(LayerSection):
    """What every layer with a router has."""

    num_experts: Size = Field(
        description="experts of the layer; of SwitchHead: per head, of each projection that has experts"
    )
    top_k: Size = Field(description="active experts per token; of SwitchHead: per token and head")
    expert_dropout: Probability = Field(0.0, description="chance that an expert is left out of the ranking")

    @model_validator(mode="after")
    def _check_top_k(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k must be at most num_experts, but top_k is {self.top_k} and num_experts is {self.num_experts}: "
                "lower top_k or add experts"
            )
        if self.expert_dropout > 0 and self.top_k == self.num_experts:
            raise ValueError(
                f"expert_dropout leaves experts out of the ranking, but it is {self.expert_dropout} and top_k is num_experts "
                f"({self.top_k}), which chooses all of them: set expert_dropout to 0.0, lower top_k or add experts"
            )
        return self
