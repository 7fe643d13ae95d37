"""The plain feed-forward: two linear layers with biases and a ReLU between, the twin of sigma-MoE.

Shape letters: B rows, S positions, D model width.
"""

import math

from torch import Tensor

from model.config import DenseMLPConfig
from model.context import BatchContext, dropout
from model.layer import LayerOutput, Linear
from model.parameters import DeclaringModule, truncated_normal


class DenseMLP(DeclaringModule):
    """y = W2 dropout(relu(W1 x + b1)) + b2, as in the dense baselines of arXiv 2310.10837."""

    def __init__(
        self, config: DenseMLPConfig, *, d_model: int, num_layers: int, depth: int, dropout_probability: float
    ) -> None:
        super().__init__()
        self.depth = depth
        self.dropout_probability = dropout_probability
        hidden_dim = config.hidden_dim
        self.up = Linear(d_model, hidden_dim, draw=truncated_normal(math.sqrt(2 / num_layers / d_model)), bias=True)
        self.down = Linear(
            hidden_dim, d_model, draw=truncated_normal(math.sqrt(2 / num_layers / hidden_dim)), bias=True
        )

    def forward(self, x_BSD: Tensor, context: BatchContext) -> LayerOutput:
        hidden_BSF = self.up(x_BSD).relu()
        if self.training:
            hidden_BSF = dropout(
                hidden_BSF, context, probability=self.dropout_probability, site="mlp_hidden", depth=self.depth
            )
        return LayerOutput(self.down(hidden_BSF), (), {})
