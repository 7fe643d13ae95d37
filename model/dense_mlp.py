"""The plain feed-forward: two linear layers with biases and a ReLU between, the twin of sigma-MoE.

Shape letters: B rows, S positions, D model width.
"""

import math

from torch import Tensor

from model.context import BatchContext, dropout
from model.feedforward_config import DenseMLPConfig
from model.layer import LayerOutput, Linear
from model.parameters import DeclaringModule, truncated_normal
from model.section import Place


class DenseMLP(DeclaringModule):
    """y = W2 dropout(relu(W1 x + b1)) + b2, as in the dense baselines of arXiv 2310.10837."""

    def __init__(self, config: DenseMLPConfig, place: Place) -> None:
        super().__init__()
        self.dropout = place.dropout
        d_model, hidden_dim = place.d_model, config.hidden_dim
        draw_up = truncated_normal(math.sqrt(2 / place.num_layers / d_model))
        draw_down = truncated_normal(math.sqrt(2 / place.num_layers / hidden_dim))
        self.up = Linear(d_model, hidden_dim, draw=draw_up, bias=True)
        self.down = Linear(hidden_dim, d_model, draw=draw_down, bias=True)

    def forward(self, x_BSD: Tensor, context: BatchContext, carry_TX: Tensor | None = None) -> LayerOutput:
        hidden_BSF = self.up(x_BSD).relu()
        if self.training:
            hidden_BSF = dropout(hidden_BSF, context, probability=self.dropout, site="mlp_hidden")
        return LayerOutput(self.down(hidden_BSF))
