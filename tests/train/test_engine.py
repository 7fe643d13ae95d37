"""PlainEngine's update by itself, on one weight matrix."""

from typing import Any, cast

import pytest
import torch

from train.engine import PlainEngine


def engine(*, clip_grad_norm: float, accumulation_steps: int = 1) -> PlainEngine:
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=7.0)
    return PlainEngine(
        cast(Any, model),
        optimizer,
        clip_grad_norm=clip_grad_norm,
        accumulation_steps=accumulation_steps,
        dtype=torch.float32,
    )


def always(norm: float) -> bool:
    return True


def weight(engine: PlainEngine) -> torch.Tensor:
    return cast(Any, engine.model).weight


def loss(engine: PlainEngine) -> torch.Tensor:
    """Its gradient is (3, 4), of norm 5."""
    return (weight(engine) * torch.tensor([[3.0, 4.0]])).sum()


def test_each_update_is_made_with_the_rate_it_is_given():
    plain = engine(clip_grad_norm=0.0)
    for rate in (0.0, 0.5, 0.125):
        before = weight(plain).detach().clone()
        plain.backward(loss(plain), last=True)
        assert plain.step(rate, accept=always) == 5.0
        assert (before - weight(plain)).tolist() == [[3.0 * rate, 4.0 * rate]]


def test_micro_steps_are_averaged_and_the_norm_is_that_before_clipping():
    plain = engine(clip_grad_norm=0.5, accumulation_steps=2)
    plain.backward(loss(plain), last=False)
    plain.backward(3 * loss(plain), last=True)
    assert plain.step(1.0, accept=always) == pytest.approx(10.0)
    assert weight(plain).flatten().tolist() == pytest.approx([-0.3, -0.4], rel=1e-5)
