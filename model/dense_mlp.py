"""The plain feed-forward, the twin of sigma-MoE: two linear layers with an activation between, or three for a gated one.

Called by the Transformer's blocks. Shape letters: B rows, S positions, D model width, F hidden width.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from model.context import BatchContext, dropout
from model.feedforward_config import DenseMLPConfig
from model.layer import LayerOutput, Linear
from model.parameters import DeclaringModule, truncated_normal
from model.section import Place


class DenseMLP(DeclaringModule):
    """y = W2 dropout(h) + b2, with h = relu(W1 x + b1) as in the dense baselines of arXiv 2310.10837, gelu, or silu(Wg x) * W1 x.

    With top_k K only the K largest of what dropout leaves reach W2: the top-K activation of arXiv 2310.10837.
    """

    def __init__(self, config: DenseMLPConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        self.dropout = place.dropout
        d_model, hidden_dim, bias = place.d_model, config.hidden_dim, config.has_bias()
        draw_up = truncated_normal(math.sqrt(2 / place.num_layers / d_model))
        draw_down = truncated_normal(math.sqrt(2 / place.num_layers / hidden_dim))
        if config.activation == "swiglu":
            self.gate = Linear(d_model, hidden_dim, draw=draw_up, bias=bias)
        self.up = Linear(d_model, hidden_dim, draw=draw_up, bias=bias)
        self.down = Linear(hidden_dim, d_model, draw=draw_down, bias=bias)

    def forward(self, x_BSD: Tensor, context: BatchContext, carry_TX: Tensor | None = None) -> LayerOutput:
        """The carry, of another kind of feed-forward, passes through."""
        hidden_BSF = self._activate(x_BSD)
        if self.training:
            hidden_BSF = dropout(hidden_BSF, context, probability=self.dropout, site="mlp_hidden")
        if self.config.top_k is not None:
            hidden_BSF = keep_largest(hidden_BSF, self.config.top_k)
        return LayerOutput(self.down(hidden_BSF), carry_TX=carry_TX)

    def _activate(self, x_BSD: Tensor) -> Tensor:
        if self.config.activation == "swiglu":
            return F.silu(self.gate(x_BSD)) * self.up(x_BSD)
        return F.gelu(self.up(x_BSD)) if self.config.activation == "gelu" else self.up(x_BSD).relu()


def keep_largest(hidden_BSF: Tensor, top_k: int) -> Tensor:
    """Zeroes what is strictly below the K-th largest of a token's activations: ties survive, the threshold has no gradient."""
    threshold_BS1 = hidden_BSF.detach().topk(top_k, dim=-1).values[..., -1:]
    return hidden_BSF.where(hidden_BSF >= threshold_BS1, 0.0)
