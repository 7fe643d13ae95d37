"""The decoder: embedding, layers of mixer and feed-forward, final norm, logits. Written for one process.

Owns the order of a block and the residual stream. Does not own the loss (loss.py) nor how the layers reach other ranks
(parallel/parallelize.py rewires them afterwards). Shape letters: B rows, S positions, D model width, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.cache import Cache
from model.config import ModelConfig
from model.context import BatchContext, dropout
from model.layer import LayerNorm, LayerOutput, Linear
from model.parameters import DeclaringModule, normal
from model.router import RouterReport
from model.section import Place


class ModelOutput(NamedTuple):
    """logits_BSV; the sum of the layers' auxiliary losses (0-dim; 0 without any); router reports by module path.

    layer_inputs: by depth of each layer with memory, the residual stream (B, S, D) that it was given, without gradient.
    """

    logits_BSV: Tensor
    auxiliary_loss: Tensor
    reports: dict[str, RouterReport]
    layer_inputs: dict[int, Tensor]


class Block(DeclaringModule):
    """x += drop(mixer(norm(x))); x += drop(feedforward(norm(x))): pre-normalised. Memory goes before x into the mixer's norm."""

    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        self.depth = place.depth
        self.dropout = config.dropout
        self.mixer_norm = LayerNorm(config.d_model)
        self.mixer = config.mixer_sections()[place.depth].build(place)
        self.feedforward_norm = LayerNorm(config.d_model)
        self.feedforward = config.feedforward_sections()[place.depth].build(place)

    def forward(self, x_BSD: Tensor, context: BatchContext, cache: Cache | None = None) -> LayerOutput:
        source_BMD = x_BSD
        if context.num_memory(self.depth):
            assert context.memory is not None
            source_BMD = torch.cat([context.memory.states[self.depth], x_BSD], dim=1)
        mixed = self.mixer(self.mixer_norm(source_BMD), context, cache)
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
        self.config = config
        self.backend = backend
        self.with_memory = frozenset(config.memory_blocks())
        # the output layer's scale is our reading: the papers' specifications do not give it
        draw = normal(1 / math.sqrt(config.d_model))
        self.embedding = Embedding(vocab_size, config.d_model)
        places = (config.place(depth, backend=backend) for depth in range(config.num_layers))
        self.layers = nn.ModuleList(Block(config, place) for place in places)
        self.final_norm = LayerNorm(config.d_model)
        self.output = Linear(config.d_model, vocab_size, draw=draw, bias=True)

    def forward(self, tokens_BS: Tensor, context: BatchContext, caches: Sequence[Cache] | None = None) -> ModelOutput:
        """caches: one for each layer, where the tokens come after others (model/decode.py)."""
        x_BSD = self._drop(self.embedding(tokens_BS), context, site="embedding")
        auxiliary_loss = x_BSD.new_zeros(())
        reports, layer_inputs = {}, {}
        for depth, block in enumerate(self.layers):
            if depth in self.with_memory:
                layer_inputs[depth] = x_BSD.detach()
            if self.config.recompute and self.training:
                result = checkpoint(block, x_BSD, context, use_reentrant=False, preserve_rng_state=False)
            else:
                result = block(x_BSD, context, None if caches is None else caches[depth])
            x_BSD = result.y_BSD
            auxiliary_loss = sum(result.auxiliary_losses, start=auxiliary_loss)
            reports |= {f"layers.{depth}.{name}": report for name, report in result.reports.items()}
        x_BSD = self._drop(self.final_norm(x_BSD), context, site="final")
        return ModelOutput(self.output(x_BSD), auxiliary_loss, reports, layer_inputs)

    def _drop(self, x_BSD: Tensor, context: BatchContext, *, site: str) -> Tensor:
        return dropout(
            x_BSD, context, probability=self.config.dropout if self.training else 0.0, site=site, depth=-1
        )  # outside the layers


class Embedding(DeclaringModule):
    """Rows of a (V, D) table drawn with standard deviation 1 / sqrt(D)."""

    weight: Tensor

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.declare("weight", (vocab_size, d_model), normal(1 / math.sqrt(d_model)))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return nn.functional.embedding(tokens_BS, self.weight)
