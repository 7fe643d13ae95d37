"""The `model.attention` and `model.switchhead` sections: what every softmax attention has, and what each of the two adds.

Owns the fields and the checks inside one section. Does not own the attention itself (attend.py, attention.py, switchhead.py). Read by
those and, through model/config.py, by everything that reads a config. Imports no torch.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from model.section import BankShape, MixerSection, Place, Probability, RoutedSection, Size

if TYPE_CHECKING:
    from torch import nn

    from model.cost import Cost

DEFAULT_CHUNK = 1024  # the knee of memory against time in arXiv 2106.06899's benchmark of chunk sizes

# The four projections by their letter in `experts`; those that read every key come first, then those of the queries.
PROJECTIONS = {"v": "value", "k": "key", "o": "output", "q": "query"}
SOURCE_SIDE, DESTINATION_SIDE = ("value", "key"), ("output", "query")


class AttendSection(MixerSection):
    """What every softmax attention has: heads, positions, memory, and how queries meet keys (model/attend.py)."""

    reads_raw: ClassVar[bool] = True

    num_heads: Size
    head_dim: Size
    positions: Literal["rope", "xl", "none"] = Field(
        default="rope", description="rope: rotary; xl: relative as in Transformer-XL; none: the causal mask alone"
    )
    rotary_dim: int | None = Field(
        default=None, description="rope only: rotated channels of a head; null: half of them, rounded down to even"
    )
    memory_blocks: Annotated[int, Field(ge=0)] = Field(
        default=0, description="rows before the current one whose states are keys too (Transformer-XL memory)"
    )
    attend_top_k: int | None = Field(
        default=None, description="keys that a query keeps, its best ones (arXiv 2106.06899); null: all"
    )
    attend_chunk: int | None = Field(
        default=None,
        description=f"most queries worked on at once; null: {DEFAULT_CHUNK} with attend_top_k or attention_dropout, else all",
    )
    attention_dropout: Probability = Field(
        default=0.0, description="of the attention probabilities; works in chunks of queries, slower than without"
    )

    @field_validator("attend_top_k", "attend_chunk")
    @classmethod
    def _counts_are_positive(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError(f"must be at least 1, but it is {value}: raise it, or write null to turn it off")
        return value

    @model_validator(mode="after")
    def _check_rotary_dim(self) -> Self:
        if self.positions != "rope":
            if self.rotary_dim is not None:
                raise ValueError(
                    f"rotary_dim is for rope, but positions is {self.positions} and rotary_dim is {self.rotary_dim}: "
                    "set rotary_dim to null or positions to rope"
                )
        elif self.rotary_dim is None:
            if self.head_dim < 4:
                raise ValueError(
                    f"half of head_dim must leave at least 2 channels to rotate, but head_dim is {self.head_dim} and rotary_dim is null: "
                    "raise head_dim to 4, give an even rotary_dim, or set positions to none"
                )
        elif self.rotary_dim < 2 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(
                f"rotary_dim must be even and between 2 and head_dim, but rotary_dim is {self.rotary_dim} and head_dim is {self.head_dim}: "
                "write null for half of head_dim, or an even number that fits"
            )
        return self

    def rotary_width(self) -> int:
        """Channels of a head that are rotated; 0 without rotary positions."""
        if self.positions != "rope":
            return 0
        return self.head_dim // 2 // 2 * 2 if self.rotary_dim is None else self.rotary_dim

    def kv_heads(self) -> int:
        """Heads of K and V."""
        return self.num_heads

    def num_memory_blocks(self) -> int:
        return self.memory_blocks

    def check_length(self, length: int, mixers: tuple[str, ...]) -> None:
        num_keys = length * (1 + self.memory_blocks)
        if self.attend_top_k is not None and self.attend_top_k > num_keys:
            raise ValueError(
                f"attend_top_k must be at most the keys of a row, but attend_top_k is {self.attend_top_k} and a row of {length} tokens "
                f"with memory_blocks {self.memory_blocks} has {num_keys}: lower attend_top_k, or write null to keep all keys"
            )

    def notes(self) -> list[str]:
        half = self.head_dim // 2
        if self.positions != "rope" or self.rotary_dim is not None or half % 2 == 0:
            return []
        width = self.rotary_width()
        return [f"rotary_dim is {width}: half of head_dim {self.head_dim} is {half}, rounded down to even"]


class AttentionConfig(AttendSection):
    """Dense multi-head attention, the twin of SwitchHead."""

    num_kv_heads: Size | None = Field(
        default=None, description="heads of K and V, each for num_heads / num_kv_heads query heads; null: num_heads"
    )

    @model_validator(mode="after")
    def _check_num_kv_heads(self) -> Self:
        if self.num_heads % self.kv_heads():
            raise ValueError(
                f"num_kv_heads must divide num_heads, but num_kv_heads is {self.num_kv_heads} and num_heads is {self.num_heads}: "
                "set num_kv_heads to a divisor, or to null for one per query head"
            )
        return self

    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def build(self, place: Place) -> "nn.Module":
        from model.attention import Attention

        return Attention(self, place)

    def cost(self, place: Place, *, length: int) -> "Cost":
        from model.attention_cost import attention_cost

        return attention_cost(self, d_model=place.d_model, length=length)


class SwitchHeadConfig(RoutedSection, AttendSection):
    """SwitchHead attention: V and O projections, or others, are experts, per head (arXiv 2312.07987)."""

    experts: Annotated[tuple[Literal["q", "k", "v", "o"], ...], Field(min_length=1)] = Field(
        default=("v", "o"), description="the projections that are experts; the others are dense"
    )
    routers: Literal["side", "separate", "shared"] = Field(
        default="side",
        description="side: one for K and V, which read the keys' tokens, one for Q and O; separate: one for each; shared: one for all",
    )
    gates: Literal["sigmoid", "softmax"] = Field(
        default="sigmoid", description="softmax: over the logits of the chosen experts, as in MoA"
    )
    single_expert: Literal["gate_both", "gate_output"] | None = Field(
        default=None,
        description="num_experts 1 only; gate_both: V and O have a gate each; gate_output: what a head has read has one; null: gate_both",
    )
    entropy_weight: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="of the entropy regulariser, one term for each router"
    )
    entropy_per_head: bool = Field(
        default=False, description="the regulariser looks at each head by itself (MoEUT), not at the mean over heads"
    )

    @model_validator(mode="after")
    def _check_experts(self) -> Self:
        if len(set(self.experts)) < len(self.experts):
            raise ValueError(f"experts must name a projection once, but it is {list(self.experts)}: leave out the copy")
        if self.gates == "softmax" and self.top_k == 1:
            raise ValueError(
                f"gates softmax needs a top_k of at least 2, but gates is {self.gates} and top_k is {self.top_k}, a gate of always 1 from "
                "which no router learns: raise top_k or set gates to sigmoid"
            )
        if self.entropy_per_head and self.entropy_weight == 0:
            raise ValueError(
                f"entropy_per_head is about the regulariser, but it is {self.entropy_per_head} and entropy_weight is "
                f"{self.entropy_weight}: set entropy_weight above 0 or entropy_per_head to false"
            )
        if self.entropy_weight > 0 and self.num_experts == 1:
            raise ValueError(
                f"the entropy of one expert is always 0, but entropy_weight is {self.entropy_weight} and num_experts is 1: "
                "set entropy_weight to 0 or add experts"
            )
        return self

    @model_validator(mode="after")
    def _check_single_expert(self) -> Self:
        if self.single_expert is not None and self.num_experts > 1:
            raise ValueError(
                f"single_expert is for num_experts 1, but single_expert is {self.single_expert} and num_experts is {self.num_experts}: "
                "set single_expert to null or num_experts to 1"
            )
        if self.single_expert == "gate_output":
            without_effect = {"experts": {"v", "o"}, "routers": "side", "expert_dropout": 0.0}
            for name, only in without_effect.items():
                value = getattr(self, name)
                if (set(value) if name == "experts" else value) != only:
                    raise ValueError(
                        f"{name} has no meaning for an attention without experts, but {name} is {value} and single_expert is gate_output: "
                        f"remove {name} or set single_expert to gate_both"
                    )
        return self

    def router_of(self) -> dict[str, str]:
        """By expert projection (value, key, output, query) the name of its router: that of the first projection that shares it."""
        experts = [name for letter, name in PROJECTIONS.items() if letter in self.experts]
        if self.routers == "separate":
            return {name: name for name in experts}
        shared = [(*SOURCE_SIDE, *DESTINATION_SIDE)] if self.routers == "shared" else [SOURCE_SIDE, DESTINATION_SIDE]
        groups = [[name for name in experts if name in group] for group in shared]
        return {name: group[0] for group in groups for name in group}

    def build(self, place: Place) -> "nn.Module":
        from model.switchhead import GatedAttention, SwitchHead

        return GatedAttention(self, place) if self.single_expert == "gate_output" else SwitchHead(self, place)

    def banks(self, place: Place) -> list[BankShape]:
        if self.single_expert == "gate_output":
            return []
        return [self._bank(name, d_model=place.d_model) for name in PROJECTIONS.values() if name in self.router_of()]

    def _bank(self, name: str, *, d_model: int) -> BankShape:
        """V, K and Q read the token and write (token, head); O the reverse."""
        tokens, heads = (d_model, 1), (self.head_dim, self.num_heads)
        source, destination = (heads, tokens) if name == "output" else (tokens, heads)
        return BankShape(
            name=f"{name}_experts",
            label=name,
            num_groups=self.num_heads * self.num_experts,
            num_heads=self.num_heads,
            top_k=self.top_k,
            shares_groups=False,
            row_dim=source[0],
            output_dim=destination[0],
            rows_per_token=source[1],
            outputs_per_token=destination[1],
            same_rows=False,
            group_numel=d_model * self.head_dim,
            is_table=False,
            replies=False,
            token_factor=1 + self.memory_blocks if name in SOURCE_SIDE else 1,
            hashed=False,
        )

    def expert_widths(self, d_model: int) -> set[int]:
        return set() if self.single_expert == "gate_output" else {d_model, self.head_dim}

    def cost(self, place: Place, *, length: int) -> "Cost":
        from model.attention_cost import gated_attention_cost, switchhead_cost

        of_kind = gated_attention_cost if self.single_expert == "gate_output" else switchhead_cost
        return of_kind(self, d_model=place.d_model, length=length)
