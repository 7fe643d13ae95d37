"""The `model` section of a run's config: which layers, how many, how wide.

Owns the fields and the checks inside this section. What clashes with another section is checked by train/config.py. Read by
everything in model/; `parallel/` gets values from it, never the section itself.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from itertools import cycle, islice
from typing import TYPE_CHECKING, Annotated, Literal, Self, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from model.attention_config import AttentionConfig, SwitchHeadConfig
from model.feedforward_config import DenseMLPConfig, SigmaMoEConfig
from model.hsm.config import HSMConfig
from model.product_key_config import PEERConfig, PKMConfig
from model.section import (
    BankShape,
    FeedForwardSection,
    LayerSection,
    MixerSection,
    Place,
    Probability,
    Section,
    Size,
)

if TYPE_CHECKING:
    pass

Pattern = Annotated[tuple[str, ...], Field(min_length=1)]


class MatchConfig(Section):
    """Asks for a number of parameters and names the size that is solved for; gone once the config is loaded (train/match.py)."""

    params: Annotated[float, Field(ge=1.0, le=1.0e13)] | None = Field(
        default=None, description="parameters of the whole model, embeddings included, as 4.7e+7"
    )
    params_of: str | None = Field(
        default=None, description="config file of another model: as many parameters as it has"
    )
    by: str = Field(
        description="what is solved for: feedforward_dim, experts, expert_dim, d_model, or any size as sigma_moe.num_experts"
    )

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.params is None) == (self.params_of is None):
            raise ValueError(
                f"match needs params or params_of, one of the two, but params is {self.params} and params_of is {self.params_of}: "
                "give one and leave out the other"
            )
        return self


@dataclass(frozen=True)
class UsedBank:
    """A bank of a model. path: of its module ("layers.3.mixer.value_experts"); a table that layers share has the first one's.

    uses: the path of the layer ("layers.3.mixer") once for each use in a forward pass, in the order of depth.
    """

    path: str
    shape: BankShape
    uses: tuple[str, ...]


class ModelConfig(Section):
    """A decoder: `num_layers` layers, each a mixer and a feed-forward; the two patterns repeat over the depth.

    A field whose type is a MixerSection or a FeedForwardSection is a kind of layer: its name may stand in `mixers` or `feedforwards`.
    """

    vocab_size: Size | None = Field(None, description="null: the shards'; a number: must equal theirs")
    d_model: Size
    num_layers: Size
    mixers: Pattern = Field(description="kinds of mixers, repeated over the depth; each names its section")
    feedforwards: Pattern = Field(description="kinds of feed-forwards, the same way")
    switchhead: SwitchHeadConfig | None = None
    attention: AttentionConfig | None = None
    hsm: HSMConfig | None = None
    sigma_moe: SigmaMoEConfig | None = None
    dense_mlp: DenseMLPConfig | None = None
    pkm: PKMConfig | None = None
    peer: PEERConfig | None = None
    norm: Literal["pre", "peri"] = Field(
        default="pre",
        description="pre: mixer and feed-forward read the normalised input; peri: only Q, K and routers do (MoEUT)",
    )
    distinct_layers: Size | None = Field(
        default=None, description="layers with weights of their own, used again over the depth, A B A B; null: all"
    )
    match: MatchConfig | None = Field(
        default=None, description="solves one size for a number of parameters; null in what it is solved to"
    )
    dropout: Probability = Field(0.0, description="residual, embedding, final-state and dense hidden dropout")
    recompute: bool = Field(False, description="recompute each layer's activations in the backward pass")
    expert_backend: Literal["auto", "torch", "loop", "reference", "triton", "triton_dense"] = Field(
        "auto",
        description="how experts compute; auto: the fastest, measured before the first step; triton_dense: SwitchHead's by all of a head",
    )

    kernel_backend: Literal["auto", "torch", "triton"] = Field(
        "auto",
        description="how tables (peer, pkm), the choice of their rows, top-k attention and hsm compute; auto: as for expert_backend",
    )

    @field_validator("mixers", "feedforwards")
    @classmethod
    def _kinds_exist(cls, pattern: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        kinds = cls.kinds(MixerSection if info.field_name == "mixers" else FeedForwardSection)
        for name in pattern:
            if name not in kinds:
                near = get_close_matches(name, kinds, n=1) or [f"one of {', '.join(kinds)}"]
                raise ValueError(f"must name kinds of layers, but it names {name}: write {near[0]}")
        return pattern

    @model_validator(mode="after")
    def _sections_match_the_patterns(self) -> Self:
        for pattern, kind in (("mixers", MixerSection), ("feedforwards", FeedForwardSection)):
            used = getattr(self, pattern)
            for name in self.kinds(kind):
                if name in used and getattr(self, name) is None:
                    raise ValueError(f"{pattern} names {name}, but the section model.{name} is missing: add it")
                if name not in used and getattr(self, name) is not None:
                    raise ValueError(
                        f"the section model.{name} is given, but {pattern} is {list(used)}: "
                        f"remove the section (--set model.{name}=null) or name {name} in model.{pattern}"
                    )
        return self

    @model_validator(mode="after")
    def _patterns_fit_the_depth(self) -> Self:
        for name in ("mixers", "feedforwards"):
            pattern = getattr(self, name)
            if len(pattern) > self.num_layers:
                raise ValueError(
                    f"{name} must not be longer than the depth, but it has {len(pattern)} entries and num_layers is {self.num_layers}: "
                    f"shorten {name} or raise num_layers"
                )
        return self

    @model_validator(mode="after")
    def _a_shared_table_has_several_layers(self) -> Self:
        kinds = list(islice(cycle(self.feedforwards), self.distinct_layers or self.num_layers))
        for name in kinds:
            setting = getattr(self, name).sharing()
            if setting and kinds.count(name) == 1:
                raise ValueError(
                    f"{setting} is one table for several layers, but model.{name}.{setting} is true and there is 1 layer of {name}: "
                    f"set {setting} to false"
                )
        return self

    @model_validator(mode="after")
    def _the_norm_fits(self) -> Self:
        for name in (*self.mixers, *self.feedforwards):
            if self.norm == "peri" and not getattr(self, name).reads_raw:
                raise ValueError(
                    f"peri normalises only what Q, K and routers read, but norm is peri and {name} has none of these or no such form: "
                    "set norm to pre, or use attention or switchhead with sigma_moe"
                )
        return self

    @model_validator(mode="after")
    def _distinct_layers_fit(self) -> Self:
        if self.distinct_layers is None:
            return self
        if self.num_layers % self.distinct_layers:
            raise ValueError(
                f"distinct_layers must divide num_layers, but distinct_layers is {self.distinct_layers} and num_layers is "
                f"{self.num_layers}: change one of them"
            )
        for name in ("mixers", "feedforwards"):
            if self.distinct_layers % len(getattr(self, name)):
                raise ValueError(
                    f"a layer that is used again must be of one kind: the entries of {name} must divide distinct_layers, but {name} has "
                    f"{len(getattr(self, name))} and distinct_layers is {self.distinct_layers}: change one of them"
                )
        if "hsm" in self.mixers:
            raise ValueError(
                f"hsm shifts by another distance at each depth, but distinct_layers is {self.distinct_layers} and mixers names hsm: "
                "set distinct_layers to null or choose another mixer"
            )
        return self

    @classmethod
    def kinds(cls, kind: type[LayerSection]) -> list[str]:
        """Names of the fields whose section is of this kind."""
        return [
            name
            for name, field in cls.model_fields.items()
            if any(isinstance(part, type) and issubclass(part, kind) for part in get_args(field.annotation))
        ]

    def mixer_sections(self) -> list[MixerSection]:
        """The section of every layer's mixer, the pattern repeated over the depth."""
        return [getattr(self, name) for name in self.mixer_kinds()]

    def feedforward_sections(self) -> list[FeedForwardSection]:
        """The section of every layer's feed-forward, the pattern repeated over the depth."""
        return [getattr(self, name) for name in islice(cycle(self.feedforwards), self.num_layers)]

    def sections(self) -> list[LayerSection]:
        """Every section in use, once."""
        return [getattr(self, name) for name in dict.fromkeys((*self.mixers, *self.feedforwards))]

    def mixer_kinds(self) -> tuple[str, ...]:
        """The kind of every layer's mixer."""
        return tuple(islice(cycle(self.mixers), self.num_layers))

    def places(self, *, backend: str) -> list[Place]:
        """What each distinct layer is built with."""
        sizes, shared = (self.d_model, self.num_layers), {}
        distinct = range(self.distinct_layers or self.num_layers)
        return [Place(*sizes, depth, self.mixer_kinds(), backend, self.dropout, shared) for depth in distinct]

    def notes(self) -> list[str]:
        """Sentences for the log: what defaults were turned into."""
        return [note for section in self.sections() for note in section.notes()]

    def banks(self) -> list[UsedBank]:
        """Every expert bank once, in the order of its first use."""
        shapes: dict[str, BankShape] = {}
        uses: dict[str, list[str]] = {}
        owners: dict[str, str] = {}  # by setting, the first layer of those that share its table
        places = self.places(backend=self.expert_backend)
        mixers, feedforwards = self.mixer_sections(), self.feedforward_sections()
        for depth in range(self.num_layers):
            place = places[depth % len(places)]
            for part, section in (("mixer", mixers[depth]), ("feedforward", feedforwards[depth])):
                layer = f"layers.{place.depth}.{part}"
                sharing = section.sharing() if isinstance(section, FeedForwardSection) else None
                owner = owners.setdefault(sharing, layer) if sharing else layer
                for shape in section.banks(place):
                    path = f"{owner}.{shape.name}"
                    shapes[path] = shape
                    uses.setdefault(path, []).append(layer)
        return [UsedBank(path, shape, tuple(uses[path])) for path, shape in shapes.items()]

    def smallest_bank(self) -> int | None:
        """Number of expert groups G of the smallest expert bank; None for a model without experts."""
        return min((bank.shape.num_groups for bank in self.banks()), default=None)

    def expert_widths(self) -> set[int]:
        """Every width that grouped_matmul meets, as rows or columns; empty for a model without experts."""
        return {width for section in self.sections() for width in section.expert_widths(self.d_model)}

    def memory_blocks(self) -> dict[int, int]:
        """By depth of each layer whose mixer has memory: rows of it."""
        blocks = {depth: section.num_memory_blocks() for depth, section in enumerate(self.mixer_sections())}
        return {depth: number for depth, number in blocks.items() if number}
