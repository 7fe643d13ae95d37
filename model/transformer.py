"""The decoder: embedding, layers of mixer and feed-forward, final norm, logits. Written for one process.

Owns the order of a block and the residual stream. Does not own the loss (loss.py) nor how the layers reach other ranks
(parallel/parallelize.py rewires them afterwards). Shape letters: B rows, S positions, D model width, V vocabulary.
"""

import math
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Attention
from model.config import ModelConfig
from model.context import BatchContext, dropout
from model.dense_mlp import DenseMLP
from model.layer import LayerNorm, LayerOutput, Linear
from model.parameters import DeclaringModule, normal
from model.router import RouterReport
from model.sigma_moe import SigmaMoE
from model.switchhead import SwitchHead


class ModelOutput(NamedTuple):
    """logits_BSV; the sum of the layers' auxiliary losses (0-dim; 0 without any); router reports by module path."""

    logits_BSV: Tensor
    auxiliary_loss: Tensor
    reports: dict[str, RouterReport]


class Block(DeclaringModule):
    """x += drop(mixer(norm(x))); x += drop(feedforward(norm(x))): pre-normalised."""

    def __init__(self, config: ModelConfig, *, depth: int, backend: str) -> None:
        super().__init__()
        self.depth = depth
        self.dropout = config.dropout
        self.mixer_norm = LayerNorm(config.d_model)
        self.mixer = _mixer(config, depth=depth, backend=backend)
        self.feedforward_norm = LayerNorm(config.d_model)
        self.feedforward = _feedforward(config, depth=depth, backend=backend)

    def forward(self, x_BSD: Tensor, context: BatchContext) -> LayerOutput:
        mixed = self.mixer(self.mixer_norm(x_BSD), context)
        x_BSD = x_BSD + self._drop(mixed.y_BSD, context, site="mixer")
        fed = self.feedforward(self.feedforward_norm(x_BSD), context)
        x_BSD = x_BSD + self._drop(fed.y_BSD, context, site="feedforward")
        reports = {f"mixer.{name}": report for name, report in mixed.reports.items()}
        reports |= {f"feedforward.{name}": report for name, report in fed.reports.items()}
        return LayerOutput(x_BSD, mixed.auxiliary_losses + fed.auxiliary_losses, reports)

    def _drop(self, y_BSD: Tensor, context: BatchContext, *, site: str) -> Tensor:
        return dropout(y_BSD, context, probability=self.dropout if self.training else 0.0, site=site, depth=self.depth)


class Transformer(DeclaringModule):
    """A causal language model on the meta device; `model.parameters.materialize` allocates and draws it.

    Input and output embeddings are untied; the output layer has a bias (as in arXiv 2312.07987). `backend` is how grouped_matmul
    computes.
    """

    def __init__(self, config: ModelConfig, *, vocab_size: int, backend: str) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.recompute = config.recompute
        self.backend = backend
        # the output layer's scale is our reading: the papers' specifications do not give it
        draw = normal(1 / math.sqrt(config.d_model))
        self.embedding = Embedding(vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, depth=depth, backend=backend) for depth in range(config.num_layers))
        self.final_norm = LayerNorm(config.d_model)
        self.output = Linear(config.d_model, vocab_size, draw=draw, bias=True)

    def forward(self, tokens_BS: Tensor, context: BatchContext) -> ModelOutput:
        x_BSD = self._drop(self.embedding(tokens_BS), context, site="embedding")
        auxiliary_loss = x_BSD.new_zeros(())
        reports = {}
        for depth, block in enumerate(self.layers):
            if self.recompute and self.training:
                result = checkpoint(block, x_BSD, context, use_reentrant=False, preserve_rng_state=False)
            else:
                result = block(x_BSD, context)
            x_BSD = result.y_BSD
            auxiliary_loss = sum(result.auxiliary_losses, start=auxiliary_loss)
            reports |= {f"layers.{depth}.{name}": report for name, report in result.reports.items()}
        x_BSD = self._drop(self.final_norm(x_BSD), context, site="final")
        return ModelOutput(self.output(x_BSD), auxiliary_loss, reports)

    def _drop(self, x_BSD: Tensor, context: BatchContext, *, site: str) -> Tensor:
        return dropout(
            x_BSD, context, probability=self.dropout if self.training else 0.0, site=site, depth=-1
        )  # outside the layers


class Embedding(DeclaringModule):
    """Rows of a (V, D) table drawn with standard deviation 1 / sqrt(D)."""

    weight: Tensor

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.declare("weight", (vocab_size, d_model), normal(1 / math.sqrt(d_model)))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return nn.functional.embedding(tokens_BS, self.weight)


def _mixer(config: ModelConfig, *, depth: int, backend: str) -> nn.Module:
    kind, _ = config.layers()[depth]
    sizes = {"d_model": config.d_model, "num_layers": config.num_layers}
    if kind == "switchhead":
        assert config.switchhead is not None
        return SwitchHead(config.switchhead, depth=depth, backend=backend, **sizes)
    assert config.attention is not None
    return Attention(config.attention, **sizes)


def _feedforward(config: ModelConfig, *, depth: int, backend: str) -> nn.Module:
    _, kind = config.layers()[depth]
    sizes = {"d_model": config.d_model, "num_layers": config.num_layers}
    if kind == "sigma_moe":
        assert config.sigma_moe is not None
        return SigmaMoE(config.sigma_moe, depth=depth, backend=backend, **sizes)
    assert config.dense_mlp is not None
    return DenseMLP(config.dense_mlp, depth=depth, dropout_probability=config.dropout, **sizes)
