"""Softmax attention from queries, keys and values to what each query has read: positions, memory, cache, mask, dropout.

What dense attention (attention.py) and SwitchHead (switchhead.py) share. Owns the choice between torch's fused attention and the one in
chunks of queries (top_k_attention.py). Does not own the projections before and after, nor any routing. Shape letters: B rows, S
queries, M keys (the last S are the queries' own positions), H heads, G heads of K and V, C head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention_config import DEFAULT_CHUNK, AttendSection
from model.cache import KeyValueCache
from model.context import BatchContext
from model.dispatch import Pending
from model.mask import KeyMask
from model.parameters import DeclaringModule, Initializer
from model.relative import RelativeCache, RelativePositions, shift
from model.rope import rotate
from model.section import Place
from model.top_k_attention import AttentionDropout, top_k_attend


class Attend(DeclaringModule):
    """softmax(scores) v, with scores q k^T / sqrt(C) by content and, for `positions: xl`, by distance (relative.py).

    draw and learned: of Transformer-XL's positions, see RelativePositions. backend: of kernels/top_k_attention, where that computes.
    """

    def __init__(self, config: AttendSection, place: Place, *, draw: Initializer, learned: bool) -> None:
        super().__init__()
        self.config = config
        self.backend = "torch"
        self.relative: RelativePositions | None = None
        if config.positions == "xl":
            self.relative = RelativePositions(
                d_model=place.d_model,
                num_heads=config.num_heads,
                head_dim=config.head_dim,
                draw=draw,
                learned=learned,
            )

    def selects(self) -> bool:
        """Whether the attention in chunks (top_k_attention.py) computes in training, and not torch's fused one."""
        config = self.config
        return config.attend_top_k is not None or config.attend_chunk is not None or config.attention_dropout > 0

    def new_cache(self, *, block_length: int) -> KeyValueCache:
        """An empty cache; keys are held turned to their positions (rope) or plain."""
        kind = KeyValueCache if self.relative is None else RelativeCache
        return kind(block_length=block_length, memory_blocks=self.config.memory_blocks)

    def forward(
        self,
        q_BHSC: Tensor,
        k_BGMC: Tensor,
        values: Pending[Tensor],
        context: BatchContext,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """(B, H, S, C). k and v: of memory, then the row; with a cache, of the S new positions. H / G query heads share one of G.

        values: v (B, G, M, C), waited for when queries and keys are turned to their positions.
        """
        if width := self.config.rotary_width():
            first = 0 if cache is None else cache.length
            q_BHSC = rotate(q_BHSC, width=width, first=first + k_BGMC.shape[2] - q_BHSC.shape[2])
            k_BGMC = rotate(k_BGMC, width=width, first=first)
        v_BGMC = values.wait()
        if cache is not None:
            k_BGMC, v_BGMC = cache.extend(k_BGMC, v_BGMC)
        num_queries, num_keys = q_BHSC.shape[2], k_BGMC.shape[2]
        filled_B = None if context.memory is None else context.memory.filled_B
        mask = KeyMask(num_queries, num_keys, q_BHSC.device, context.document_ids_BS, filled_B)
        scale, by_distance = 1 / math.sqrt(self.config.head_dim), None
        if self.relative is not None:
            q_BHSC, q_position_BHSC = self.relative.queries(q_BHSC)
            scale, by_distance = 1.0, (q_position_BHSC, self.relative.table(num_keys, cache))

        drops = self.training and self.config.attention_dropout > 0
        if drops or self.config.attend_top_k is not None or self.config.attend_chunk is not None:
            return top_k_attend(
                q_BHSC,
                k_BGMC,
                v_BGMC,
                mask=mask,
                top_k=self.config.attend_top_k,
                chunk=self.config.attend_chunk or DEFAULT_CHUNK,
                scale=scale,
                relative=by_distance,
                drop=AttentionDropout(context, self.config.attention_dropout) if drops else None,
                backend=self.backend,
            )
        bias = _bias(mask, by_distance)
        shared = q_BHSC.shape[1] != k_BGMC.shape[1]
        return F.scaled_dot_product_attention(
            q_BHSC, k_BGMC, v_BGMC, attn_mask=bias, is_causal=bias is None, scale=scale, enable_gqa=shared
        )


def _bias(mask: KeyMask, by_distance: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """What torch's attention adds to the scores, or bool where it may look; None: plain causal."""
    if by_distance is None:
        return None if mask.is_causal else mask.rows(0, mask.num_queries)
    q_position_BHSC, r_HMC = by_distance
    scores_BHSM = shift(q_position_BHSC @ r_HMC.mT)
    return scores_BHSM.masked_fill(~mask.rows(0, mask.num_queries), -torch.inf)


def split_heads(x_BSX: Tensor, num_heads: int) -> Tensor:
    """(B, S, H*C) -> (B, H, S, C)."""
    return x_BSX.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x_BHSC: Tensor) -> Tensor:
    """(B, H, S, C) -> (B, S, H*C)."""
    return x_BHSC.transpose(1, 2).flatten(2)
