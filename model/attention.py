"""Dense multi-head attention, the twin of SwitchHead. Owns the four projections; the rest is attend.py's.

Shape letters: B rows, S positions, M positions of memory and row, H heads, G heads of K and V, C head width, D model width.
"""

import math

from torch import Tensor

from model.attend import Attend, merge_heads, split_heads
from model.attention_config import AttentionConfig
from model.cache import KeyValueCache
from model.context import BatchContext
from model.dispatch import Ready
from model.layer import LayerOutput, Linear
from model.parameters import DeclaringModule, truncated_normal
from model.section import Place


class Attention(DeclaringModule):
    """Causal multi-head attention without biases: the baselines of arXiv 2312.07987, with rotary or Transformer-XL positions.

    With num_kv_heads G below H, query heads share heads of K and V (grouped queries, arXiv 2305.13245; G = 1: arXiv 1911.02150).
    """

    def __init__(self, config: AttentionConfig, place: Place) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads()
        d_model, inner_dim = place.d_model, config.num_heads * config.head_dim
        draw_in = truncated_normal(math.sqrt(2 / place.num_layers / d_model))
        draw_out = truncated_normal(math.sqrt(2 / place.num_layers / inner_dim))
        self.query = Linear(d_model, inner_dim, draw=draw_in)
        self.key = Linear(d_model, self.num_kv_heads * config.head_dim, draw=draw_in)
        self.value = Linear(d_model, self.num_kv_heads * config.head_dim, draw=draw_in)
        self.output = Linear(inner_dim, d_model, draw=draw_out)
        self.attend = Attend(config, place, draw=draw_in, learned=True)

    def new_cache(self, *, block_length: int) -> KeyValueCache:
        return self.attend.new_cache(block_length=block_length)

    def forward(
        self,
        x_BMD: Tensor,
        context: BatchContext,
        cache: KeyValueCache | None = None,
        raw_BMD: Tensor | None = None,
    ) -> LayerOutput:
        """x (B, M, D): memory, then the row; y (B, S, D) of the row. V reads raw instead where it is given."""
        x_BSD = x_BMD[:, context.num_memory :]
        q_BHSC = split_heads(self.query(x_BSD), self.num_heads)
        k_BGMC = split_heads(self.key(x_BMD), self.num_kv_heads)
        v_BGMC = split_heads(self.value(x_BMD if raw_BMD is None else raw_BMD), self.num_kv_heads)
        mixed_BHSC = self.attend(q_BHSC, k_BGMC, Ready(v_BGMC), context, cache)
        return LayerOutput(self.output(merge_heads(mixed_BHSC)))
