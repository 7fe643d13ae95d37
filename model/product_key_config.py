"""The `model.pkm` and `model.peer` sections: feed-forwards that look their values up by product keys.

Owns the fields and the checks inside one section. Does not own the layers (pkm.py, peer.py). Read by those and, through
model/config.py, by everything that reads a config. Imports no torch.
"""

import math
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from model.section import BankShape, FeedForwardSection, Place, Size

if TYPE_CHECKING:
    from torch import nn

    from model.cost import Cost

KeyDim = Annotated[int, Field(ge=2, multiple_of=2)]
QueryNorm = Literal["batch", "layer", "none"]


class PKMConfig(FeedForwardSection):
    """Product-key memory (arXiv 1907.05242), as a feed-forward (arXiv 2310.10837) or gated as Memory+ (arXiv 2412.09764)."""

    num_keys: Size = Field(description="sub-keys of each half; there are num_keys^2 values of width d_model")
    num_heads: Size = 4
    top_k: Size | None = Field(
        description="values per token and head; null: all of them, the heads' scores summed before the softmax or ReLU, as the code of "
        "arXiv 2310.10837 does wherever num_keys is at most its knn"
    )
    key_dim: KeyDim | None = Field(
        default=None, description="width of a head's query, both halves; null: no projection, the query is the input"
    )
    shared_keys: bool = Field(default=False, description="one set of sub-keys for all heads")
    query_norm: QueryNorm = "none"
    scores: Literal["softmax", "relu"] = "softmax"
    initialisation: Literal["standard", "dense_equivalent", "lample", "memory_layers"] = Field(
        default="standard",
        description="standard and dense_equivalent: of arXiv 2310.10837; lample: arXiv 1907.05242; memory_layers: arXiv 2412.09764",
    )
    gated: bool = Field(default=False, description="Memory+: W2 (y * silu(W1 x)) instead of y")
    shared_values: bool = Field(
        default=False, description="one table for all layers; keys and queries stay each layer's own"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k is not None and self.top_k > self.num_keys**2:
            raise ValueError(
                f"top_k must be at most the number of values num_keys^2, but top_k is {self.top_k} and num_keys is {self.num_keys}: "
                "lower top_k or add keys"
            )
        if self.key_dim is None and self.shared_keys and self.num_heads > 1:
            raise ValueError(
                f"heads must differ by their query or by their keys, but key_dim is null, shared_keys is true and num_heads is "
                f"{self.num_heads}: set key_dim, shared_keys to false or num_heads to 1"
            )
        if self.top_k is None and self.shared_values:
            raise ValueError(
                "shared_values is about a table that is looked up, but top_k is null, which takes all values: set top_k or "
                "shared_values to false"
            )
        return self

    def build(self, place: Place) -> "nn.Module":
        if self.key_dim is None and place.d_model % 2:
            raise ValueError(
                f"a query must have two halves, but pkm.key_dim is null and d_model is {place.d_model}: set an even key_dim or d_model"
            )
        from model.pkm import PKM, DensePKM

        return (DensePKM if self.top_k is None else PKM)(self, place)

    def sharing(self) -> str | None:
        return "shared_values" if self.shared_values else None

    def cost(self, place: Place, *, length: int) -> "Cost":
        from model.product_key_cost import pkm_cost

        return pkm_cost(self, d_model=place.d_model, length=length)

    def banks(self, place: Place) -> list[BankShape]:
        if self.top_k is None:
            return []
        return [_table("table", self, label="pkm", d_model=place.d_model, neurons=False)]

    def notes(self) -> list[str]:
        return _notes("pkm", self.scores, self.top_k)


class PEERConfig(FeedForwardSection):
    """Experts of one neuron, looked up by product keys (arXiv 2407.04153)."""

    num_experts: Size = Field(description="a square, n^2 experts for n sub-keys of each half")
    num_heads: Size
    top_k: Size = Field(description="experts per token and head")
    key_dim: KeyDim = Field(description="width of a head's query, both halves")
    shared_keys: bool = Field(default=True, description="one set of sub-keys for all heads, as in the paper")
    query_norm: QueryNorm = "batch"
    scores: Literal["softmax", "sigmoid", "relu"] = "softmax"
    activation: Literal["gelu", "relu"] = "gelu"
    shared_experts: bool = Field(
        default=False, description="one pool for all layers; keys and queries stay each layer's own"
    )

    @property
    def num_keys(self) -> int:
        """Sub-keys of each half."""
        return math.isqrt(self.num_experts)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_keys**2 != self.num_experts:
            raise ValueError(
                f"num_experts must be a square, so that product keys can name each expert, but is {self.num_experts}: "
                f"write {self.num_keys**2} or {(self.num_keys + 1) ** 2}"
            )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k must be at most num_experts, but top_k is {self.top_k} and num_experts is {self.num_experts}: "
                "lower top_k or add experts"
            )
        return self

    def build(self, place: Place) -> "nn.Module":
        from model.peer import PEER

        return PEER(self, place)

    def sharing(self) -> str | None:
        return "shared_experts" if self.shared_experts else None

    def cost(self, place: Place, *, length: int) -> "Cost":
        from model.product_key_cost import peer_cost

        return peer_cost(self, d_model=place.d_model, length=length)

    def banks(self, place: Place) -> list[BankShape]:
        return [_table("experts", self, label="peer", d_model=place.d_model, neurons=True)]

    def notes(self) -> list[str]:
        return _notes("peer", self.scores, self.top_k)


def _table(name: str, config: PKMConfig | PEERConfig, *, label: str, d_model: int, neurons: bool) -> BankShape:
    """Values, for which no rows travel, or neurons: a row u and a row v for each, and x travels to u."""
    assert config.top_k is not None
    return BankShape(
        name=name,
        label=label,
        num_groups=config.num_keys**2,
        num_heads=config.num_heads,
        top_k=config.top_k,
        shares_groups=True,
        row_dim=d_model if neurons else 0,
        output_dim=d_model,
        rows_per_token=1,
        outputs_per_token=1,
        same_rows=True,
        group_numel=2 * d_model if neurons else d_model,
        is_table=True,
        replies=neurons,
        token_factor=1,
        hashed=False,
    )


def _notes(name: str, scores: str, top_k: int | None) -> list[str]:
    if scores != "softmax" or top_k != 1:
        return []
    return [f"model.{name}: the softmax over one pick is always 1, so queries and keys keep their first values"]
