"""Scaled dot-product attention over one row of tokens, and the dense multi-head mixer built on it.

`attend` is shared with switchhead.py. Owns no routing. Shape letters: B rows, S positions, H heads, C head width, D model width.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from model.config import AttentionConfig
from model.context import BatchContext
from model.layer import LayerOutput, Linear
from model.parameters import DeclaringModule, truncated_normal
from model.rope import rotate


def attend(q_BHSC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, context: BatchContext) -> Tensor:
    """softmax(q k^T / sqrt(C)) v under the context's mask (plain causal without one): (B, H, S, C)."""
    mask = context.attention_mask_B1SS
    return F.scaled_dot_product_attention(q_BHSC, k_BHSC, v_BHSC, attn_mask=mask, is_causal=mask is None)


def split_heads(x_BSX: Tensor, num_heads: int) -> Tensor:
    """(B, S, H*C) -> (B, H, S, C)."""
    return x_BSX.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class Attention(DeclaringModule):
    """Dense causal multi-head attention with rotary positions and no biases: the twin of SwitchHead at E = 1 without routers."""

    def __init__(self, config: AttentionConfig, *, d_model: int, num_layers: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        inner_dim = config.num_heads * config.head_dim
        draw_in = truncated_normal(math.sqrt(2 / num_layers / d_model))
        draw_out = truncated_normal(math.sqrt(2 / num_layers / inner_dim))
        self.query = Linear(d_model, inner_dim, draw=draw_in)
        self.key = Linear(d_model, inner_dim, draw=draw_in)
        self.value = Linear(d_model, inner_dim, draw=draw_in)
        self.output = Linear(inner_dim, d_model, draw=draw_out)

    def forward(self, x_BSD: Tensor, context: BatchContext) -> LayerOutput:
        q_BHSC = rotate(split_heads(self.query(x_BSD), self.num_heads))
        k_BHSC = rotate(split_heads(self.key(x_BSD), self.num_heads))
        v_BHSC = split_heads(self.value(x_BSD), self.num_heads)
        mixed_BHSC = attend(q_BHSC, k_BHSC, v_BHSC, context)
        return LayerOutput(self.output(mixed_BHSC.transpose(1, 2).flatten(2)), (), {})
