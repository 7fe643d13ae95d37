"""The decoder as a whole: the order of a block, what a token may see, dropout, recompute and autocast."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import model.context
import model.router
from model.attention import Attention
from model.context import BatchContext, keep_mask
from model.loss import cross_entropy_sum
from model.sigma_moe import SigmaMoE
from model.switchhead import SwitchHead
from model.transformer import ModelOutput
from tests.model import by_hand
from tests.model.build import (
    VOCABULARY,
    attention_weights,
    context,
    model_config,
    set_logits,
    sigma_moe_weights,
    switchall_config,
    switchhead_weights,
    tokens,
    transformer,
)
from tests.model.watch import Recorded, assert_float32_throughout

SWITCHHEAD = {"num_heads": 2, "head_dim": 4, "num_experts": 3, "top_k": 2}
SIGMA_MOE = {"num_experts": 5, "expert_dim": 4, "top_k": 2}
DROPPING = {
    "dropout": 0.3,
    "switchhead": SWITCHHEAD | {"expert_dropout": 0.3},
    "sigma_moe": SIGMA_MOE | {"expert_dropout": 0.3},
}
POSITIONS = [9, 2**35, 1, 4]


def mixed_by_hand(mixer: Any, x_SD: Tensor) -> Tensor:
    visible = by_hand.causal(x_SD.shape[0])
    if isinstance(mixer, SwitchHead):
        return by_hand.switchhead(x_SD, **switchhead_weights(mixer), top_k=mixer.config.top_k, visible_SS=visible)
    assert isinstance(mixer, Attention)
    return by_hand.attention(x_SD, **attention_weights(mixer), visible_SS=visible)


def fed_by_hand(feedforward: Any, x_SD: Tensor) -> Tensor:
    if isinstance(feedforward, SigmaMoE):
        return by_hand.sigma_moe(x_SD, **sigma_moe_weights(feedforward), top_k=feedforward.config.top_k)
    up, up_bias, down, down_bias = (value.detach() for value in feedforward.parameters())
    return (x_SD @ up.T + up_bias).clamp(min=0) @ down.T + down_bias


def normed_by_hand(norm: Any, x_SD: Tensor) -> Tensor:
    return by_hand.layer_norm(x_SD, gain_D=norm.weight.detach(), bias_D=norm.bias.detach())


def test_the_decoder_is_pre_norm_blocks_between_untied_embeddings():
    """Both mixers and both feed-forwards, every gain and bias off its initial value."""
    net, tokens_BS = transformer(model_config()), tokens(2, 6)
    output = net(tokens_BS, context(2))
    logits = []
    for row in tokens_BS:
        x = net.embedding.weight.detach()[row]
        for block in net.layers:
            x = x + mixed_by_hand(block.mixer, normed_by_hand(block.mixer_norm, x))
            x = x + fed_by_hand(block.feedforward, normed_by_hand(block.feedforward_norm, x))
        x = normed_by_hand(net.final_norm, x)
        logits.append(x @ net.output.weight.detach().T + net.output.bias.detach())
    torch.testing.assert_close(output.logits_BSV, torch.stack(logits), rtol=0, atol=1e-12)
    router_logits = Recorded(net.layers[0].feedforward.router)
    net(tokens_BS, context(2))
    entropies = by_hand.negative_entropy(router_logits.last[:, 0])
    assert output.auxiliary_loss.item() == pytest.approx(1e-4 * entropies, rel=1e-12)


def test_the_auxiliary_loss_is_the_sum_over_layers_and_attention_has_none():
    net = transformer(switchall_config(num_layers=3, sigma_moe=SIGMA_MOE | {"entropy_weight": 0.5}))
    for block in net.layers:
        set_logits(block.feedforward.router, 0.0)
    loss = net(tokens(2, 6), context(2)).auxiliary_loss
    assert loss.item() == pytest.approx(-3 * 0.5 * math.log(5), rel=1e-14)


def test_a_model_without_experts_has_an_auxiliary_loss_of_zero_and_no_reports():
    net = transformer(model_config(mixers=["attention"], feedforwards=["dense_mlp"], switchhead=None, sigma_moe=None))
    output = net(tokens(2, 6), context(2))
    assert output.auxiliary_loss.item() == 0.0
    assert output.reports == {}


def test_reports_are_named_by_the_path_of_their_layer():
    assert set(transformer(model_config())(tokens(1, 4), context(1)).reports) == {
        "layers.0.mixer.value",
        "layers.0.mixer.output",
        "layers.0.feedforward.mlp",
    }


@pytest.mark.parametrize("build", [model_config, switchall_config])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
def test_a_token_sees_neither_the_future_nor_another_document(build: Callable[..., Any], masked: bool):
    net, before = transformer(build()), tokens(1, 8)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]])
    facts = context(1, documents_BS=documents if masked else None)
    logits = net(before, facts).logits_BSV
    for position in range(8):
        after = before.clone()
        after[0, position] = (after[0, position] + 1) % VOCABULARY
        difference = (net(after, facts).logits_BSV - logits).abs().amax(dim=(0, 2))
        for other in range(8):
            sees = position <= other and (not masked or bool(documents[0, position] == documents[0, other]))
            assert (difference[other] > 1e-6) == sees
            assert sees or difference[other] < 1e-13


def test_documents_in_one_row_are_evaluated_as_if_no_document_stood_before_them_up_to_rotary_positions():
    """Scores depend on distances only, so a document gives the same logits wherever it begins."""
    net, row = transformer(switchall_config()), tokens(1, 8)
    packed = net(row, context(1, documents_BS=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]))).logits_BSV
    torch.testing.assert_close(packed[:, 3:], net(row[:, 3:], context(1)).logits_BSV, rtol=0, atol=1e-12)


def trained(net: Any, tokens_BS: Tensor, facts: BatchContext) -> Tensor:
    return net.train()(tokens_BS, facts).logits_BSV


def test_evaluation_has_no_dropout_and_does_not_depend_on_the_batch():
    net, plain, rows = transformer(model_config(**DROPPING)), transformer(model_config()), tokens(4, 6)
    together = net(rows, context(4)).logits_BSV
    assert torch.equal(together, plain(rows, context(4, step=3, seed=8)).logits_BSV)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(net(rows[order], context(4)).logits_BSV, together[order], rtol=0, atol=1e-12)
    alone = torch.cat([net(row[None], context(1)).logits_BSV for row in rows])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-12)


def test_in_training_a_row_is_dropped_alike_whatever_rows_it_is_batched_with():
    net, rows, order = transformer(model_config(**DROPPING)), tokens(4, 6), [2, 0, 3, 1]
    together = trained(net, rows, context(POSITIONS))
    shuffled = trained(net, rows[order], context([POSITIONS[i] for i in order]))
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-12)
    alone = torch.cat([trained(net, rows[i : i + 1], context(POSITIONS[i : i + 1])) for i in range(4)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-12)


def test_in_training_equal_rows_are_dropped_differently_by_position_step_and_seed():
    net, row = transformer(model_config(**DROPPING)), tokens(1, 6)
    twice = trained(net, row.expand(2, -1), context(2))
    assert not torch.allclose(twice[0], twice[1])
    for other in (context(2, step=1), context(2, seed=2)):
        assert not torch.allclose(trained(net, row.expand(2, -1), other), twice)


def test_no_two_dropouts_of_a_forward_share_their_mask(monkeypatch: pytest.MonkeyPatch):
    """Seen through the keys: site and depth, with seed and step, are all that tells one mask from another."""
    drawn: list[tuple[str, int, float]] = []

    def recording(facts: BatchContext, length: int, channels: int, *, probability: float, site: str) -> Tensor:
        drawn.append((site, facts.depth, probability))
        return keep_mask(facts, length, channels, probability=probability, site=site)

    monkeypatch.setattr(model.context, "keep_mask", recording)
    monkeypatch.setattr(model.router, "keep_mask", recording)
    net = transformer(
        model_config(
            num_layers=4,
            dropout=0.3,
            switchhead=SWITCHHEAD | {"expert_dropout": 0.1},
            sigma_moe=SIGMA_MOE | {"expert_dropout": 0.2},
        )
    )
    trained(net, tokens(1, 5), context(1))
    keys = [(site, depth) for site, depth, _ in drawn]
    assert len(set(keys)) == len(keys)
    # embedding, final state, two residual branches per layer, the hidden layer of each of two dense MLPs
    assert sum(probability == 0.3 for *_, probability in drawn) == 2 + 2 * 4 + 2
    assert sum(probability == 0.1 for *_, probability in drawn) == 2 * 2  # V and O of two SwitchHead layers
    assert sum(probability == 0.2 for *_, probability in drawn) == 2


def loss_and_gradients(net: Any, facts: BatchContext) -> tuple[ModelOutput, dict[str, Tensor]]:
    net.zero_grad()
    rows = tokens(4, 7)
    output = net.train()(rows[:, :-1], facts)
    (cross_entropy_sum(output.logits_BSV, rows[:, 1:]) + output.auxiliary_loss).backward()
    return output, {name: value.grad.clone() for name, value in net.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
def test_recompute_gives_the_same_loss_and_gradients_bit_for_bit(narrow: bool):
    found = []
    for recompute in (False, True):
        net = transformer(model_config(recompute=recompute, **DROPPING), dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            found.append(loss_and_gradients(net, context(POSITIONS)))
    (plain, plain_gradients), (again, again_gradients) = found
    assert torch.equal(plain.logits_BSV, again.logits_BSV)
    assert torch.equal(plain.auxiliary_loss, again.auxiliary_loss)
    assert plain_gradients.keys() == again_gradients.keys() == {name for name, _ in net.named_parameters()}
    for name, gradient in plain_gradients.items():
        assert torch.equal(gradient, again_gradients[name]), name
    for name, report in plain.reports.items():
        assert all(torch.equal(a, b) for a, b in zip(report, again.reports[name], strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_recompute_keeps_no_activation_of_a_block_between_forward_and_backward(recompute: bool):
    net = transformer(model_config(recompute=recompute, **DROPPING)).train()
    hidden: list[StorageWeakRef] = []
    net.layers[1].feedforward.down.register_forward_pre_hook(
        lambda _module, inputs: hidden.append(StorageWeakRef(inputs[0].untyped_storage()))
    )
    loss = net(tokens(2, 6), context(2)).logits_BSV.sum()
    assert [reference.expired() for reference in hidden] == [recompute]
    loss.backward()
    assert [reference.expired() for reference in hidden] == [True] * (1 + recompute)


def test_evaluation_does_not_recompute():
    net = transformer(model_config(recompute=True))
    calls = Recorded(net.layers[0].mixer_norm)
    net(tokens(2, 6), context(2)).logits_BSV.sum().backward()
    assert len(calls.outputs) == 1


def test_bfloat16_autocast_keeps_routers_statistics_weights_and_gradients_in_float32():
    net, rows = transformer(switchall_config(), dtype=torch.float32), tokens(4, 7)
    first = net.layers[0]
    inputs, logits = Recorded(first.mixer_norm), Recorded(first.mixer.value_router)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = net(rows[:, :-1], context(4))
    assert output.logits_BSV.dtype == torch.bfloat16
    assert output.auxiliary_loss.dtype == torch.float32
    assert inputs.last.dtype == torch.float32
    assert torch.equal(logits.last, first.mixer.value_router(inputs.last.flatten(0, 1)))
    loss = cross_entropy_sum(output.logits_BSV, rows[:, 1:]) + output.auxiliary_loss
    assert loss.isfinite()
    loss.backward()
    assert_float32_throughout(net)
