"""What dense attention and SwitchHead share, on both: positions, memory, documents, kept keys, decoding.

Against the two layers written out by hand, and the invariants of the SwitchHead specification, section 13, that concern attention.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.context import Memory
from tests.model import by_hand
from tests.model.build import (
    attention,
    attention_weights,
    context,
    decoded,
    gradients_agree,
    losses_of,
    model_config,
    normal,
    remembering,
    row_by_row,
    switchhead,
    switchhead_weights,
    transformer,
)
from tests.model.watch import Recorded, assert_float32_throughout

DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
FORMS: dict[str, dict[str, Any]] = {
    "rope": {},
    "rope of all channels": {"rotary_dim": 10},
    "xl": {"positions": "xl"},
    "none": {"positions": "none"},
    "chunks": {"attend_chunk": 4},
    "rope top-k": {"attend_top_k": 3, "attend_chunk": 2},
    "xl top-k": {"positions": "xl", "attend_top_k": 3},
}
KINDS = {"attention": attention, "switchhead": switchhead}
each_form = pytest.mark.parametrize("form", FORMS)
each_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind: str, form: str, **settings: Any) -> Any:
    return KINDS[kind](**(FORMS[form] | settings))


def written_out(layer: Any, x_BMD: Tensor, visible: list[Tensor]) -> Tensor:
    """visible: (S, M) for each row."""
    top_k, rows = layer.attend.config.attend_top_k, []
    for x_MD, visible_SS in zip(x_BMD, visible, strict=True):
        if hasattr(layer, "router_of"):
            weights, own = switchhead_weights(layer), layer.config
            experts = {"top_k": own.top_k, "gates": own.gates, "attend_top_k": top_k}
            rows.append(by_hand.switchhead(x_MD, **weights, **experts, visible_SS=visible_SS))
        else:
            rows.append(by_hand.attention(x_MD, **attention_weights(layer), top_k=top_k, visible_SS=visible_SS))
    return torch.stack(rows)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@each_kind
@each_form
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
def test_the_forward_equals_the_specification_written_out(kind: str, form: str, documents: Tensor | None):
    layer, x = build(kind, form), normal(2, 6, 6)
    visible = [by_hand.causal(6) for _ in range(2)]
    if documents is not None:
        visible = [causal & (row[:, None] == row) for causal, row in zip(visible, documents, strict=True)]
    same(layer(x, context(2, documents_BS=documents)).y_BSD, written_out(layer, x, visible))


@each_kind
@each_form
def test_memory_is_seen_as_far_as_it_is_filled(kind: str, form: str):
    """Rows with nothing, a part and all of a memory of 4 before 3 positions of their own."""
    layer, x, filled = build(kind, form), normal(3, 7, 6), [0, 3, 4]
    visible = [by_hand.causal(3, earlier=4) & (torch.arange(7) >= 4 - number) for number in filled]
    same(layer(x, remembering(3, 4, filled=filled)).y_BSD, written_out(layer, x, visible))


@each_kind
@each_form
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_empty_memory_has_no_effect(kind: str, form: str, training: bool):
    """Also not on the masks of expert and attention dropout."""
    settings: dict[str, Any] = {"attention_dropout": 0.4} | ({"expert_dropout": 0.4} if kind == "switchhead" else {})
    layer, x = build(kind, form, **settings).train(training), normal(2, 9, 6)
    result, alone = layer(x, remembering(2, 4, filled=0)), layer(x[:, 4:], context(2))
    same(result.y_BSD, alone.y_BSD)
    for name, report in alone.reports.items():
        assert torch.equal(result.reports[name].count_G, report.count_G)


@each_kind
@each_form
def test_changed_memory_changes_the_output_and_what_is_not_filled_does_not(kind: str, form: str):
    layer, x = build(kind, form), normal(2, 7, 6)
    y = layer(x, remembering(2, 4, filled=2)).y_BSD
    for position, counts in [(0, False), (1, False), (2, True), (3, True)]:
        changed = x.clone()
        changed[:, position] = 3 * normal(6, seed=position)
        differs = (layer(changed, remembering(2, 4, filled=2)).y_BSD - y).abs().amax((1, 2)) > 1e-9
        assert differs.tolist() == [counts] * 2 or "top-k" in form
        assert counts or not differs.any()


@each_kind
@each_form
@pytest.mark.parametrize("num_memory", [0, 4])
def test_a_later_token_changes_no_earlier_output(kind: str, form: str, num_memory: int):
    layer, x = build(kind, form), normal(2, num_memory + 6, 6)
    facts = remembering(2, num_memory) if num_memory else context(2)
    y = layer(x, facts).y_BSD
    for position in range(6):
        changed = x.clone()
        changed[:, num_memory + position] = 3 * normal(6, seed=position)
        moved = layer(changed, facts).y_BSD
        assert torch.equal(moved[:, :position], y[:, :position])
        assert not torch.allclose(moved[:, position], y[:, position])


@each_kind
@pytest.mark.parametrize("form", ["rope", "xl", "rope top-k"])
def test_weights_learn_through_memory(kind: str, form: str):
    """Whoever reads the keys' side sends gradient back through the memory's positions."""
    layer, x = build(kind, form, **({"num_kv_heads": 1} if kind == "attention" else {})), normal(2, 7, 6)
    readers = [layer.key, layer.value if kind == "attention" else layer.value_router]
    recorded = [Recorded(reader) for reader in readers]
    layer(x, remembering(2, 4)).y_BSD.square().sum().backward()
    for outputs in recorded:
        gradient = outputs.last_gradient.reshape(2, 7, -1)
        assert (gradient[:, :4].abs().sum((0, 2)) > 0).all()
    queries = Recorded(layer.query)
    layer(x, remembering(2, 4))
    assert queries.last.shape[1] == 3


@each_kind
@pytest.mark.parametrize("positions", ["rope", "xl"])
def test_no_gradient_reaches_the_row_that_is_remembered(kind: str, positions: str):
    """Two rows of one stream with different tokens: the loss of the second must not reach the embeddings of the first."""
    sizes = {"num_heads": 2, "head_dim": 4, "positions": positions, "memory_blocks": 1}
    sizes |= {"num_experts": 3, "top_k": 2} if kind == "switchhead" else {}
    sections = {"switchhead": None, "attention": None, "sigma_moe": None} | {kind: sizes}
    net = transformer(model_config(mixers=[kind], feedforwards=["dense_mlp"], **sections)).train()
    first, second = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[4, 5, 6, 7]])
    states = net(first, context(1)).layer_inputs
    remembered = replace(context([1]), memory=Memory(states, torch.tensor([4])))
    logits, alone = net(second, remembered).logits_BSV, net(second, context([1])).logits_BSV
    assert not torch.allclose(logits, alone)
    logits.sum().backward()
    assert net.embedding.weight.grad[4:8].any()
    assert not net.embedding.weight.grad[:4].any()


@each_kind
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_memory", [0, 2])
def test_gradients_equal_finite_differences(kind: str, form: str, num_memory: int):
    """Of input, memory included, and every weight. The selections of experts and keys must stand while it differs."""
    settings: dict[str, Any] = {"head_dim": 4, "d_model": 4} | ({"top_k": 3} if kind == "switchhead" else {})
    settings |= {name: 2 for name in ("attend_top_k", "rotary_dim") if name in FORMS[form]}
    layer, x = build(kind, form, **settings), normal(1, num_memory + 3, 4)
    assert gradients_agree(layer, x, remembering(1, num_memory, filled=1) if num_memory else context(1), fast=True)


PIECES = [[1] * 11, [11], [4, 7], [7, 1, 1, 2], [1, 3, 2, 5]]


@each_kind
@each_form
@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_decoding_in_pieces_equals_the_parallel_forward(kind: str, form: str, pieces: list[int]):
    layer, x = build(kind, form), normal(2, 11, 6)
    same(decoded(layer, x, pieces), layer(x, context(2)).y_BSD)


@each_kind
@pytest.mark.parametrize("form", ["rope", "xl", "none", "xl top-k"])
@pytest.mark.parametrize("memory_blocks", [1, 2])
@pytest.mark.parametrize("pieces", [[1] * 14, [4, 4, 4, 2], [3, 1, 2, 2, 4, 1, 1]], ids=str)
def test_decoding_with_memory_equals_training_row_by_row(kind: str, form: str, memory_blocks: int, pieces: list[int]):
    layer, x = build(kind, form, memory_blocks=memory_blocks), normal(2, 14, 6)
    expected = row_by_row(layer, x, block_length=4, memory_blocks=memory_blocks)
    same(decoded(layer, x, pieces, block_length=4), expected)


def test_a_cache_holds_keys_and_values_of_what_it_can_still_see():
    layer, x = attention(memory_blocks=1), normal(2, 14, 6)
    cache = layer.new_cache(block_length=4)
    held = []
    with torch.no_grad():
        for piece in x.split(2, dim=1):
            layer(piece, context(2), cache)
            held.append(cache.num_floats)
    assert held == [2 * 2 * 10 * keys for keys in (2, 4, 6, 8, 6, 8, 6)]


@each_kind
@each_form
def test_a_rank_without_rows_takes_part_and_gives_none(kind: str, form: str):
    settings: dict[str, Any] = {"expert_dropout": 0.5, "entropy_weight": 0.5} if kind == "switchhead" else {}
    layer = build(kind, form, attention_dropout=0.2, **settings).train()
    for length, facts in ((5, context([])), (9, remembering(0, 4))):
        layer.zero_grad()
        result = layer(torch.zeros(0, length, 6, dtype=torch.float64, requires_grad=True), facts)
        (result.y_BSD.sum() + sum(losses_of(result))).backward()
        assert result.y_BSD.shape == (0, 5, 6)
        assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@each_kind
@each_form
def test_bfloat16_autocast_is_the_float32_layer_up_to_rounding(kind: str, form: str):
    layer = build(kind, form, dtype=torch.float32, **({"top_k": 3} if kind == "switchhead" else {}))
    x = normal(2, 9, 6, dtype=torch.float32)
    wide = layer(x, remembering(2, 3)).y_BSD
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = layer(x, remembering(2, 3)).y_BSD
    narrow.float().sum().backward()
    assert narrow.dtype == torch.bfloat16
    # a rounding may choose another of two nearly equal keys, so kept keys are only looked at for being finite
    tolerance = float("inf") if "top-k" in form else 0.03 * wide.abs().max().item()
    torch.testing.assert_close(narrow.float(), wide, rtol=0, atol=tolerance)
    assert_float32_throughout(layer)
