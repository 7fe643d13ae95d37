"""The `model.sigma_moe` and `model.dense_mlp` sections: every feed-forward's settings.

Owns the fields and the checks inside one section. Does not own the layers (sigma_moe.py, dense_mlp.py). Read by those and, through
model/config.py, by everything that reads a config. Imports no torch.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from model.section import BankShape, FeedForwardSection, Place, Probability, RoutedSection, Size

if TYPE_CHECKING:
    from torch import nn

    from model.cost import Cost


Weight = Annotated[float, Field(ge=0.0)]
SHARES_OF_THE_CHOSEN = ("softmax_after", "noisy", "recurrent")  # routers whose K gates sum to 1


class LossWeights(NamedTuple):
    """Of the entropy regulariser and of the load loss of a router."""

    entropy: float
    load: float


NO_LOSS, ENTROPY_ALONE = LossWeights(0.0, 0.0), LossWeights(1.0e-4, 0.0)
# What null means, as published with the router; the others are sigma-MoE's own ablation and keep its regulariser.
WEIGHTS_OF = {"switch": LossWeights(0.0, 0.01), "recurrent": LossWeights(0.0, 1.0e-3), "average_keys": NO_LOSS}


class SigmaMoEConfig(RoutedSection, FeedForwardSection):
    """sigma-MoE feed-forward: gated ReLU experts (arXiv 2310.10837), with its own router or one of its rivals' (model/selection.py)."""

    reads_raw: ClassVar[bool] = True

    expert_dim: Size = Field(description="hidden width of one expert")
    num_shared_experts: Annotated[int, Field(ge=0)] = Field(
        default=0, description="further experts of the same width that every token visits, with gate 1"
    )
    router: Literal[
        "sigmoid", "softmax", "softmax_after", "switch", "sinkhorn", "noisy", "average_keys", "recurrent"
    ] = Field(
        default="sigmoid",
        description="sigmoid: sigma-MoE; softmax, switch: over all experts; softmax_after: over the chosen ones; sinkhorn: S-BASE; "
        "noisy: top-k of noisy scores; average_keys: Avg-K, no weights of its own; recurrent: RMoE, a GRU over the depth",
    )
    router_dim: Size | None = Field(default=None, description="recurrent only: width of the GRU; null: 256")
    entropy_weight: Weight | None = Field(
        default=None,
        description="gamma of the entropy regulariser; null: 1e-4, but 0 for switch, average_keys, recurrent and balance bias",
    )
    entropy_over: Literal["batch", "sequence"] | None = Field(
        default=None, description="what the regulariser's mean is taken over; sequence: as in MoEUT; null: batch"
    )
    load_weight: Weight | None = Field(
        default=None, description="of Switch's load loss; null: 0.01 for switch, 0.001 for recurrent, else 0"
    )
    load_reading: Literal["paper", "code"] | None = Field(
        default=None,
        description="paper: the weight at balance; code: num_experts^2 less (arXiv 2310.10837); null: paper",
    )
    balance: Literal["none", "bias"] = Field(
        default="none", description="bias: one for each expert in the ranking, moved after each step, without a loss"
    )
    bias_update_speed: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="how far a bias moves in a step, in units of the logits; null: 0.001"
    )
    hidden_dropout: Probability = Field(default=0.0, description="of the experts' hidden activations")
    keep_hidden: bool = Field(
        default=False,
        description="triton: keep the hidden activations for the backward pass instead of computing them again; other backends always do",
    )
    initialisation: Literal["dense_equivalent", "standard"] = Field(
        default="dense_equivalent", description="fan-in of W2: all experts, as one dense layer; standard: one expert"
    )
    init_scale: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0, description="of the initial variances; 0.1 in Switch"
    )

    @model_validator(mode="after")
    def _check_settings_have_an_effect(self) -> Self:
        weights = self.loss_weights()
        for name, value, needed, holds in (
            ("router_dim", self.router_dim, "router recurrent", self.router == "recurrent"),
            ("entropy_over", self.entropy_over, "an entropy_weight above 0", weights.entropy > 0),
            ("load_reading", self.load_reading, "a load_weight above 0", weights.load > 0),
            ("bias_update_speed", self.bias_update_speed, "balance bias", self.balance == "bias"),
        ):
            if value is not None and not holds:
                raise ValueError(
                    f"{name} needs {needed}, but {name} is {value}, router {self.router}, entropy_weight {weights.entropy}, load_weight "
                    f"{weights.load} and balance {self.balance}: set {name} to null, or set what it needs"
                )
        for name, value in zip(("entropy_weight", "load_weight"), weights, strict=True):
            if value > 0 and self.num_experts == 1:
                raise ValueError(
                    f"one expert has nothing to balance, but {name} is {value} and num_experts is 1: set {name} to 0 or add experts"
                )
        return self

    @model_validator(mode="after")
    def _check_router_can_learn(self) -> Self:
        if self.router in SHARES_OF_THE_CHOSEN and self.top_k == 1:
            raise ValueError(
                f"router {self.router} needs a top_k of at least 2, but router is {self.router} and top_k is 1, a gate of always 1 from "
                "which no router learns: raise top_k or set router to softmax or sigmoid"
            )
        return self

    @model_validator(mode="after")
    def _check_balance(self) -> Self:
        if self.balance == "none":
            return self
        for name, value in zip(("entropy_weight", "load_weight"), self.loss_weights(), strict=True):
            if value > 0:
                raise ValueError(
                    f"a bias balances without a loss, which would fight it, but balance is {self.balance} and {name} is {value}: "
                    f"set {name} to 0 or balance to none"
                )
        if self.router == "sinkhorn":
            raise ValueError(
                "sinkhorn balances the ranking itself and would undo a bias, but router is sinkhorn and balance is bias: "
                "set balance to none or router to sigmoid"
            )
        if self.top_k == self.num_experts:
            raise ValueError(
                f"with every expert chosen there is nothing to balance, but top_k and num_experts are both {self.top_k} and balance is "
                "bias: lower top_k or set balance to none"
            )
        return self

    def loss_weights(self) -> LossWeights:
        """The weights in use, nulls resolved."""
        default = WEIGHTS_OF.get(self.router, ENTROPY_ALONE)
        if self.balance == "bias" or self.num_experts == 1:
            default = NO_LOSS
        return LossWeights(
            default.entropy if self.entropy_weight is None else self.entropy_weight,
            default.load if self.load_weight is None else self.load_weight,
        )

    def notes(self) -> list[str]:
        weights = self.loss_weights()
        if weights == ENTROPY_ALONE:
            return []
        resolved = {"entropy_weight": weights.entropy, "load_weight": weights.load}
        nulls = [f"{name} is {value}" for name, value in resolved.items() if getattr(self, name) is None]
        with_what = f"router {self.router}, balance {self.balance} and num_experts {self.num_experts}"
        return [f"{' and '.join(nulls)}: what null means with {with_what}"] if nulls else []

    def build(self, place: Place) -> "nn.Module":
        from model.sigma_moe import SigmaMoE

        return SigmaMoE(self, place)

    def cost(self, place: Place, *, length: int) -> "Cost":
        from model.feedforward_cost import sigma_moe_cost

        return sigma_moe_cost(self, d_model=place.d_model, length=length)

    def banks(self, place: Place) -> list[BankShape]:
        bank = BankShape(
            name="experts",
            label="mlp",
            num_groups=self.num_experts,
            num_heads=1,
            top_k=self.top_k,
            shares_groups=False,
            row_dim=place.d_model,
            output_dim=place.d_model,
            rows_per_token=1,
            outputs_per_token=1,
            same_rows=True,
            group_numel=2 * place.d_model * self.expert_dim,
            is_table=False,
            replies=False,
            token_factor=1,
            hashed=self.hidden_dropout > 0,
        )
        return [bank]

    def expert_widths(self, d_model: int) -> set[int]:
        return {d_model, self.expert_dim}


class DenseMLPConfig(FeedForwardSection):
    """The dense feed-forward, twin of sigma-MoE: W2 act(W1 x), or W2 (silu(Wg x) * W1 x) for swiglu."""

    hidden_dim: Size
    activation: Literal["relu", "gelu", "swiglu"] = "relu"
    bias: bool | None = Field(
        default=None, description="of every linear layer; null: true, as in the papers' baselines, but false for swiglu"
    )
    top_k: Size | None = Field(
        default=None, description="relu only: hidden activations that a token keeps, its largest ones; null: all"
    )

    @model_validator(mode="after")
    def _check_top_k(self) -> Self:
        if self.top_k is None:
            return self
        if self.activation != "relu":
            raise ValueError(
                f"top_k ranks the activations of a relu (arXiv 2310.10837), but activation is {self.activation} and top_k is {self.top_k}: "
                "set top_k to null or activation to relu"
            )
        if self.top_k > self.hidden_dim:
            raise ValueError(
                f"top_k must be at most hidden_dim, but top_k is {self.top_k} and hidden_dim is {self.hidden_dim}: lower top_k, or write "
                "null to keep all"
            )
        return self

    def has_bias(self) -> bool:
        """Whether the linear layers have biases, null resolved."""
        return self.activation != "swiglu" if self.bias is None else self.bias

    def build(self, place: Place) -> "nn.Module":
        from model.dense_mlp import DenseMLP

        return DenseMLP(self, place)

    def cost(self, place: Place, *, length: int) -> "Cost":
        from model.feedforward_cost import dense_mlp_cost

        return dense_mlp_cost(self, d_model=place.d_model, length=length)
