"""The dense mixer against attention written out by hand: grouped heads, and what is its own. What it shares: test_attend.py."""

import pytest
import torch

from tests.model import by_hand
from tests.model.build import attention, attention_weights, context, decoded, gradients_agree, losses_of, normal


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("positions", ["rope", "xl", "none"])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_query_heads_share_heads_of_k_and_v(num_kv_heads: int, positions: str, chunk: int | None):
    layer = attention(num_heads=4, head_dim=6, num_kv_heads=num_kv_heads, positions=positions, attend_chunk=chunk)
    x = normal(2, 5, 6)
    y = layer(x, context(2)).y_BSD
    for row in range(2):
        expected = by_hand.attention(x[row], **attention_weights(layer), visible_SS=by_hand.causal(5))
        torch.testing.assert_close(y[row], expected, rtol=0, atol=1e-13)


def test_a_shared_head_of_k_and_v_has_its_parameters_and_its_cache_once():
    layer = attention(num_heads=4, head_dim=6, num_kv_heads=2)
    assert layer.key.weight.shape == layer.value.weight.shape == (12, 6)
    cache = layer.new_cache(block_length=8)
    with torch.no_grad():
        layer(normal(3, 5, 6), context(3), cache)
    assert cache.num_floats == 5 * 2 * 2 * 6


def test_grouped_heads_decode_token_by_token():
    layer, x = attention(num_heads=4, head_dim=6, num_kv_heads=2), normal(2, 7, 6)
    torch.testing.assert_close(decoded(layer, x, [1] * 7), layer(x, context(2)).y_BSD, rtol=0, atol=1e-13)


def test_gradients_of_grouped_heads_equal_finite_differences():
    layer = attention(d_model=4, head_dim=4, num_heads=2, num_kv_heads=1, positions="xl")
    assert gradients_agree(layer, normal(1, 3, 4), context(1))


def test_the_layer_has_no_auxiliary_loss_and_no_reports():
    result = attention()(normal(1, 3, 6), context(1))
    assert losses_of(result) == ()
    assert result.reports == {}


@pytest.mark.parametrize("head_dim", [41, 82])
def test_the_published_heads_of_41_and_82_channels_run(head_dim: int):
    """20 and 40 channels are rotated: half of 82 is odd, and rounded down."""
    layer, x = attention(d_model=12, num_heads=2, head_dim=head_dim), normal(1, 3, 12)
    expected = by_hand.attention(x[0], **attention_weights(layer), visible_SS=by_hand.causal(3))
    torch.testing.assert_close(layer(x, context(1)).y_BSD[0], expected, rtol=0, atol=1e-13)
