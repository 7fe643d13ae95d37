"""The `model` section of a run's config: which layers, how many, how wide.

Owns the fields and the checks inside this section. What clashes with another section is checked by train/config.py. Read by
everything in model/; `parallel/` gets values from it, never the section itself.
"""

from itertools import cycle
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Size = Annotated[int, Field(ge=1)]
Mixer = Literal["switchhead", "attention"]
FeedForward = Literal["sigma_moe", "dense_mlp"]


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RoutedSection(Section):
    """What every layer with a router has."""

    num_experts: Size = Field(description="experts of the layer; of SwitchHead: per head, of V and of O each")
    top_k: Size = Field(description="active experts per token; of SwitchHead: per token and head")
    expert_dropout: Probability = Field(0.0, description="chance that an expert is left out of the ranking")

    @model_validator(mode="after")
    def _check_top_k(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k must be at most num_experts, but top_k is {self.top_k} and num_experts is {self.num_experts}: "
                "lower top_k or add experts"
            )
        return self


class SwitchHeadConfig(RoutedSection):
    """SwitchHead attention: V and O projections are experts, per head (arXiv 2312.07987)."""

    num_heads: Size
    head_dim: Size
    positions: Literal["rope"] = "rope"


class SigmaMoEConfig(RoutedSection):
    """sigma-MoE feed-forward: sigmoid gates, ReLU experts (arXiv 2310.10837)."""

    expert_dim: Size = Field(description="hidden width of one expert")
    router: Literal["sigmoid"] = "sigmoid"
    entropy_weight: Annotated[float, Field(ge=0.0)] = Field(1.0e-4, description="gamma of the entropy regulariser")


class AttentionConfig(Section):
    """Dense multi-head attention, the twin of SwitchHead."""

    num_heads: Size
    head_dim: Size
    positions: Literal["rope"] = "rope"


class DenseMLPConfig(Section):
    """Two linear layers with biases and a ReLU between, the twin of sigma-MoE."""

    hidden_dim: Size


class ModelConfig(Section):
    """A decoder: `num_layers` layers, each a mixer and a feed-forward; the two patterns repeat over the depth."""

    vocab_size: Size | None = Field(None, description="null: the shards'; a number: must equal theirs")
    d_model: Size
    num_layers: Size
    mixers: Annotated[tuple[Mixer, ...], Field(min_length=1)]
    feedforwards: Annotated[tuple[FeedForward, ...], Field(min_length=1)]
    switchhead: SwitchHeadConfig | None = None
    sigma_moe: SigmaMoEConfig | None = None
    attention: AttentionConfig | None = None
    dense_mlp: DenseMLPConfig | None = None
    dropout: Probability = Field(0.0, description="residual, embedding, final-state and dense hidden dropout")
    recompute: bool = Field(False, description="recompute each layer's activations in the backward pass")
    expert_backend: Literal["auto", "torch", "loop", "reference"] = Field(
        "auto", description="how grouped_matmul computes"
    )

    @model_validator(mode="after")
    def _sections_match_the_patterns(self) -> Self:
        used = {*self.mixers, *self.feedforwards}
        for name in ("switchhead", "sigma_moe", "attention", "dense_mlp"):
            pattern = "mixers" if name in Mixer.__args__ else "feedforwards"
            if name in used and getattr(self, name) is None:
                raise ValueError(f"{pattern} names {name}, but the section model.{name} is missing: add it")
            if name not in used and getattr(self, name) is not None:
                raise ValueError(
                    f"the section model.{name} is given, but {pattern} is {list(getattr(self, pattern))}: "
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

    def layers(self) -> list[tuple[Mixer, FeedForward]]:
        """Kinds of (mixer, feed-forward) of each layer, patterns repeated over the depth."""
        mixers, feedforwards = cycle(self.mixers), cycle(self.feedforwards)
        return [(next(mixers), next(feedforwards)) for _ in range(self.num_layers)]

    def smallest_bank(self) -> int | None:
        """Number of expert groups G of the smallest expert bank; None for a model without experts."""
        banks = []
        if self.switchhead:
            banks.append(self.switchhead.num_heads * self.switchhead.num_experts)
        if self.sigma_moe:
            banks.append(self.sigma_moe.num_experts)
        return min(banks, default=None)

    def expert_widths(self) -> set[int]:
        """Every width that grouped_matmul meets, as rows or columns; empty for a model without experts."""
        widths = set()
        if self.switchhead:
            widths |= {self.d_model, self.switchhead.head_dim}
        if self.sigma_moe:
            widths |= {self.d_model, self.sigma_moe.expert_dim}
        return widths
