"""Incremental decoding: logits of the next tokens from what every mixer kept of the ones before.

Owns the caches of all layers and the pieces in which tokens are handed on. What a cache holds is the mixer's business (model/cache.py,
model/hsm/). Called by train/generate.py. Shape letters: B rows, S new tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from model.cache import Cache
from model.context import BatchContext
from model.transformer import Transformer


class Decoder:
    """Reads B rows of tokens, S >= 1 new ones at a time; the logits equal those of `Transformer.forward` over all of them.

    block_length: data.sequence_length of the training. Without memory every earlier token stays visible, also beyond that length. A
    model with memory sees what its rows of that length saw: where a row ends, its mixers without memory begin anew.
    """

    def __init__(self, model: Transformer, *, block_length: int) -> None:
        self.model = model.eval()
        self.block_length = block_length
        self.length = 0
        self.caches = [self._new_cache(depth) for depth in range(model.config.num_layers)]

    @property
    def num_floats(self) -> int:
        """Floats that all layers hold for each row."""
        return sum(cache.num_floats for cache in self.caches)

    @torch.no_grad()
    def extend(self, tokens_BS: Tensor) -> Tensor:
        """Logits (B, S, V) after each of the new tokens."""
        context = BatchContext(tokens_BS.new_zeros(tokens_BS.shape[0]), document_ids_BS=None, seed=0, step=0)
        logits = []
        while tokens_BS.shape[1]:
            size = self.block_length - self.length % self.block_length  # memory moves on only where a block ends
            piece_BS, tokens_BS = tokens_BS[:, :size], tokens_BS[:, size:]
            if self.model.with_memory and size == self.block_length:
                for depth in set(range(len(self.caches))) - self.model.with_memory:
                    self.caches[depth] = self._new_cache(depth)
            logits.append(self.model(piece_BS, context, self.caches).logits_BSV)
            self.length += piece_BS.shape[1]
        return torch.cat(logits, dim=1)

    def _new_cache(self, depth: int) -> Cache:
        block: Any = self.model.layers[depth % len(self.model.layers)]
        return block.mixer.new_cache(block_length=self.block_length)
