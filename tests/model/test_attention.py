"""The dense mixer against attention written out by hand, and the primitive that it shares with SwitchHead."""

import pytest
import torch

from model.attention import attend
from tests.model import by_hand
from tests.model.build import attention, attention_weights, context, gradients_agree, normal

DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
def test_the_forward_equals_attention_written_out_head_by_head(documents):
    layer, x = attention(), normal(2, 6, 6)
    y = layer(x, context(2, documents_BS=documents)).y_BSD
    for row in range(2):
        visible = by_hand.causal(6)
        if documents is not None:
            visible &= documents[row][:, None] == documents[row]
        expected = by_hand.attention(x[row], **attention_weights(layer), visible_SS=visible)
        torch.testing.assert_close(y[row], expected, rtol=0, atol=1e-13)


def test_scaling_q_and_k_each_by_the_fourth_root_equals_one_over_the_square_root_once():
    q, k, v = (normal(1, 1, 5, 7, seed=seed) for seed in range(3))
    scores = (q * 7**-0.25)[0, 0] @ (k * 7**-0.25)[0, 0].T
    weights = scores.masked_fill(~by_hand.causal(5), -torch.inf).softmax(-1)
    torch.testing.assert_close(attend(q, k, v, context(1))[0, 0], weights @ v[0, 0], rtol=0, atol=1e-13)


def test_gradients_of_input_and_weights_equal_finite_differences():
    layer = attention(d_model=4, head_dim=4)
    assert gradients_agree(layer, normal(1, 3, 4), context(1))


def test_the_layer_has_no_auxiliary_loss_and_no_reports():
    result = attention()(normal(1, 3, 6), context(1))
    assert result.auxiliary_losses == ()
    assert result.reports == {}
