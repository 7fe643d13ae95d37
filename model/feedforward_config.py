"""The `model.sigma_moe` and `model.dense_mlp` sections: every feed-forward's settings.

Owns the fields and the checks inside one section. Does not own the layers (sigma_moe.py, dense_mlp.py). Read by those and, through
model/config.py, by everything that reads a config. Imports no torch.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from model.section import FeedForwardSection, Place, RoutedSection, Size

if TYPE_CHECKING:
    from torch import nn


class SigmaMoEConfig(RoutedSection, FeedForwardSection):
    """sigma-MoE feed-forward: sigmoid gates, ReLU experts (arXiv 2310.10837)."""

    reads_raw: ClassVar[bool] = True

    expert_dim: Size = Field(description="hidden width of one expert")
    router: Literal["sigmoid"] = "sigmoid"
    entropy_weight: Annotated[float, Field(ge=0.0)] = Field(1.0e-4, description="gamma of the entropy regulariser")

    def build(self, place: Place) -> "nn.Module":
        from model.sigma_moe import SigmaMoE

        return SigmaMoE(self, place)

    def banks(self) -> list[int]:
        return [self.num_experts]

    def expert_widths(self, d_model: int) -> set[int]:
        return {d_model, self.expert_dim}


class DenseMLPConfig(FeedForwardSection):
    """Two linear layers with biases and a ReLU between, the twin of sigma-MoE."""

    hidden_dim: Size

    def build(self, place: Place) -> "nn.Module":
        from model.dense_mlp import DenseMLP

        return DenseMLP(self, place)
