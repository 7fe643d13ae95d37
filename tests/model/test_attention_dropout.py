"""Attention in chunks of queries inside the two attentions: where it is used, and the dropout of probabilities that it brings.

What the function itself computes is in test_top_k_attention.py and test_top_k_backward.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import model.attend
from model.top_k_attention import top_k_attend
from tests.model.build import attention, context, gradients_agree, normal, switchhead

KINDS = {"attention": attention, "switchhead": switchhead}
each_kind = pytest.mark.parametrize("kind", KINDS)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@each_kind
@pytest.mark.parametrize(
    ("settings", "training", "asked"),
    [
        ({}, True, None),
        ({"attention_dropout": 0.5}, False, None),
        ({"attention_dropout": 0.5}, True, (None, 1024, True)),
        ({"attend_top_k": 3}, False, (3, 1024, False)),
        ({"attend_top_k": 3, "attend_chunk": 2, "attention_dropout": 0.5}, True, (3, 2, True)),
        ({"attend_chunk": 4, "attention_dropout": 0.5}, False, (None, 4, False)),
    ],
)
def test_attention_works_in_chunks_where_a_setting_needs_it_and_nowhere_else(
    kind: str, settings: dict[str, Any], training: bool, asked: Any, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def watched(*args: Any, **options: Any) -> Tensor:
        calls.append((options["top_k"], options["chunk"], options["drop"] is not None))
        return top_k_attend(*args, **options)

    monkeypatch.setattr(model.attend, "top_k_attend", watched)
    KINDS[kind](**settings).train(training)(normal(1, 5, 6), context(1))
    assert calls == ([] if asked is None else [asked])


def dropping(kind: str, **settings: Any) -> Any:
    return KINDS[kind](attention_dropout=0.5, **settings).train()


@each_kind
@pytest.mark.parametrize("positions", ["rope", "xl"])
def test_attention_dropout_acts_in_training_only_and_by_step_depth_and_row(kind: str, positions: str):
    layer, x = dropping(kind, positions=positions), normal(4, 5, 6)
    y = layer(x, context(4)).y_BSD
    same(layer(x, context(4)).y_BSD, y)
    order = [2, 0, 3, 1]
    same(layer(x[order], context(order)).y_BSD, y[order])
    for other in (
        layer(x, context(4, step=1)),
        layer(x, context([4, 5, 6, 7])),
        layer(x, context(4, depth=1)),
        KINDS[kind](positions=positions)(x, context(4)),
    ):
        assert not torch.allclose(other.y_BSD, y)
    same(layer.eval()(x, context(4)).y_BSD, KINDS[kind](positions=positions)(x, context(4)).y_BSD)


@each_kind
def test_attention_dropout_is_the_same_whatever_the_chunks(kind: str):
    x = normal(2, 7, 6)
    ys = [dropping(kind, attend_chunk=chunk)(x, context(2)).y_BSD for chunk in (None, 1, 3, 7)]
    for y in ys[1:]:
        same(y, ys[0])


def test_attention_dropout_takes_probabilities_out_and_scales_the_rest():
    """One key for the first query: its probability of 1 becomes 0 or 1 / (1 - p), each half of the time."""
    layer, x = dropping("attention", num_heads=1, head_dim=6, d_model=6), normal(400, 1, 6)
    with torch.no_grad():
        for weight in (layer.value.weight, layer.output.weight):
            weight.copy_(torch.eye(6))
    factors = (layer(x, context(400)).y_BSD / x)[:, 0]
    torch.testing.assert_close(factors, factors[:, :1].round().expand_as(factors))
    assert set(factors[:, 0].round().tolist()) == {0.0, 2.0}
    assert abs(factors[:, 0].mean().item() - 1) < 5 / 400**0.5


@each_kind
def test_gradients_with_attention_dropout_equal_finite_differences(kind: str):
    settings: dict[str, Any] = {"top_k": 3} if kind == "switchhead" else {}
    layer = dropping(kind, head_dim=4, d_model=4, attend_chunk=2, **settings)
    assert gradients_agree(layer, normal(1, 3, 4), context(1), fast=True)
