"""The decoder: embedding, layers of mixer and feed-forward, final norm, logits. Written for one process.

Owns the order of a block and the residual stream. Does not own the loss (loss.py) nor how the layers reach other ranks
(parallel/parallelize.py rewires them afterwards). Shape letters: B rows, S positions, D model width, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.cache import Cache
from model.config import ModelConfig
from model.context import BatchContext, dropout
from model.layer import LayerNorm, LayerOutput, Linear
from model.parameters import DeclaringModule, normal
from model.router import RouterReport, entropy_loss
from model.section import Place

T = TypeVar("T")


class ModelOutput(NamedTuple):
    """logits_BSV; the sum of the layers' auxiliary losses (0-dim; 0 without any); router reports by layer and router.

    layer_inputs: by depth of each layer with memory, the residual stream (B, S, D) that it was given, without gradient. updates: by
    name of a state of the model, what is to be added to it after a training micro-step.
    """

    logits_BSV: Tensor
    auxiliary_loss: Tensor
    reports: dict[str, RouterReport]
    layer_inputs: dict[int, Tensor]
    updates: dict[str, Tensor]


class Block(DeclaringModule):
    """x += drop(mixer(norm(x))); x += drop(feedforward(norm(x))). Memory goes before x into the mixer's norm.

    With `norm: peri` (MoEUT, arXiv 2405.16039) the layers are handed x itself too: only Q, K and the routers read norm(x).
    """

    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.peri = config.norm == "peri"
        self.mixer_norm = LayerNorm(config.d_model)
        self.mixer = config.mixer_sections()[place.depth].build(place)
        self.feedforward_norm = LayerNorm(config.d_model)
        self.feedforward = config.feedforward_sections()[place.depth].build(place)

    def forward(
        self, x_BSD: Tensor, context: BatchContext, cache: Cache | None = None, carry_TX: Tensor | None = None
    ) -> LayerOutput:
        source_BMD = x_BSD
        if context.memory_BMD is not None:
            source_BMD = torch.cat([context.memory_BMD, x_BSD], dim=1)
        raw = {"raw_BMD": source_BMD} if self.peri else {}
        mixed = self.mixer(self.mixer_norm(source_BMD), context, cache, **raw)
        x_BSD = x_BSD + self._drop(mixed.y_BSD, context, site="mixer")
        raw = {"raw_BSD": x_BSD} if self.peri else {}
        fed = self.feedforward(self.feedforward_norm(x_BSD), context, carry_TX, **raw)
        x_BSD = x_BSD + self._drop(fed.y_BSD, context, site="feedforward")
        return LayerOutput(
            x_BSD,
            auxiliary_losses=mixed.auxiliary_losses + fed.auxiliary_losses,
            spreads=_together(mixed.spreads, fed.spreads),
            reports=_together(mixed.reports, fed.reports),
            updates=_together(mixed.updates, fed.updates),
            carry_TX=carry_TX if fed.carry_TX is None else fed.carry_TX,
        )

    def _drop(self, y_BSD: Tensor, context: BatchContext, *, site: str) -> Tensor:
        return dropout(y_BSD, context, probability=self.dropout if self.training else 0.0, site=site)


class Transformer(DeclaringModule):
    """A causal language model on the meta device; `model.parameters.materialize` allocates and draws it.

    Input and output embeddings are untied; the output layer has a bias (as in arXiv 2312.07987). With `distinct_layers` G the layers
    0..G-1 are used again and again until the depth is reached, A B A B (MoEUT, arXiv 2405.16039). `backend` is how grouped_matmul
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
        self.layers = nn.ModuleList(Block(config, place) for place in config.places(backend=backend))
        self.final_norm = LayerNorm(config.d_model)
        self.output = Linear(config.d_model, vocab_size, draw=draw, bias=True)

    def forward(self, tokens_BS: Tensor, context: BatchContext, caches: Sequence[Cache] | None = None) -> ModelOutput:
        """caches: one for each layer, where the tokens come after others (model/decode.py)."""
        x_BSD = self._drop(self.embedding(tokens_BS), context, site="embedding")
        layer_inputs: dict[int, Tensor] = {}
        outputs: list[LayerOutput] = []
        carry_TX = None
        for depth in range(self.config.num_layers):
            here = replace(context, depth=depth)
            if depth in self.with_memory:
                layer_inputs[depth] = x_BSD.detach()
            block = self.layers[depth % len(self.layers)]
            if self.config.recompute and self.training:
                result = checkpoint(block, x_BSD, here, None, carry_TX, use_reentrant=False, preserve_rng_state=False)
            else:
                result = block(x_BSD, here, None if caches is None else caches[depth], carry_TX)
            outputs.append(result)
            x_BSD, carry_TX = result.y_BSD, result.carry_TX
        x_BSD = self._drop(self.final_norm(x_BSD), context, site="final")
        return ModelOutput(
            self.output(x_BSD),
            auxiliary_loss=self._auxiliary_loss(outputs),
            reports={f"layers.{d}.{name}": part for d, out in enumerate(outputs) for name, part in out.reports.items()},
            layer_inputs=layer_inputs,
            updates=self._updates(outputs),
        )

    @property
    def balances(self) -> bool:
        """A router wants to be told the loads of each optimizer step."""
        return bool(self._balanced())

    def balance(self, reports: Mapping[str, RouterReport]) -> None:
        """Tells each such layer its loads of an optimizer step: `reports` of all micro-steps and ranks, by layer and router."""
        for path, layer in self._balanced().items():
            first, part = path
            of_layer: dict[str, RouterReport] = {}
            for depth in range(first, self.config.num_layers, len(self.layers)):
                prefix = f"layers.{depth}.{part}."
                for name in (name for name in reports if name.startswith(prefix)):
                    router = name.removeprefix(prefix)
                    of_layer[router] = of_layer[router].plus(reports[name]) if router in of_layer else reports[name]
            layer.balance(of_layer)

    def _balanced(self) -> dict[tuple[int, str], Any]:
        return {
            (number, part): getattr(block, part)
            for number, block in enumerate(self.layers)
            for part in ("mixer", "feedforward")
            if getattr(getattr(block, part), "balances", False)
        }

    def _auxiliary_loss(self, outputs: Sequence[LayerOutput]) -> Tensor:
        """Sum of the layers' losses, and of one entropy loss for each router of each distinct layer."""
        losses = [loss for output in outputs for loss in output.auxiliary_losses]
        for first in range(len(self.layers)):
            repeats = outputs[first :: len(self.layers)]
            losses += [entropy_loss([output.spreads[name] for output in repeats]) for name in repeats[0].spreads]
        return sum(losses, start=outputs[0].y_BSD.new_zeros(()))

    def _updates(self, outputs: Sequence[LayerOutput]) -> dict[str, Tensor]:
        """By state of a distinct layer, the mean over its repeats: each moves a running figure by a share, which a sum would exceed."""
        found: dict[str, list[Tensor]] = {}
        for depth, output in enumerate(outputs):
            for name, update in output.updates.items():
                found.setdefault(f"layers.{depth % len(self.layers)}.{name}", []).append(update)
        return {path: torch.stack(updates).mean(0) for path, updates in found.items()}

    def _drop(self, x_BSD: Tensor, context: BatchContext, *, site: str) -> Tensor:
        return dropout(x_BSD, context, probability=self.config.dropout if self.training else 0.0, site=site)


def _together(of_mixer: Mapping[str, T], of_feedforward: Mapping[str, T]) -> dict[str, T]:
    """The parts of a block by path in it."""
    named = {f"mixer.{name}": part for name, part in of_mixer.items()}
    return named | {f"feedforward.{name}": part for name, part in of_feedforward.items()}


class Embedding(DeclaringModule):
    """Rows of a (V, D) table drawn with standard deviation 1 / sqrt(D)."""

    weight: Tensor

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.declare("weight", (vocab_size, d_model), normal(1 / math.sqrt(d_model)))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return nn.functional.embedding(tokens_BS, self.weight)
