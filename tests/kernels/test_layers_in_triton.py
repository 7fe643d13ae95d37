"""Whole layers whose experts compute by the Triton kernels, in the interpreter, against the same layers by the reference."""

from typing import Any

import pytest
import torch

from model.attention_config import SwitchHeadConfig
from model.context import BatchContext
from model.feedforward_config import SigmaMoEConfig
from model.parameters import materialize
from model.section import LayerSection, Place

LAYERS: dict[str, LayerSection] = {
    "switchhead": SwitchHeadConfig.model_validate(
        {"num_heads": 2, "head_dim": 6, "num_experts": 3, "top_k": 2, "experts": ("q", "k", "v", "o")}
    ),
    "sigma_moe": SigmaMoEConfig.model_validate({"num_experts": 4, "expert_dim": 12, "top_k": 2}),
    "sigma_moe, hidden kept": SigmaMoEConfig.model_validate(
        {"num_experts": 4, "expert_dim": 12, "top_k": 2, "keep_hidden": True}
    ),
    "sigma_moe with hidden dropout": SigmaMoEConfig.model_validate(
        {"num_experts": 4, "expert_dim": 12, "top_k": 2, "num_shared_experts": 1, "hidden_dropout": 0.4}
    ),
}


def forward_and_backward(kind: str, backend: str) -> dict[str, torch.Tensor]:
    layer: Any = LAYERS[kind].build(Place(10, 2, 0, ("switchhead",) * 2, backend, 0.0))
    materialize(layer, seed=3)
    x = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = layer.train()(x, BatchContext(torch.arange(2), None, 1, 0)).y_BSD
    y.square().sum().backward()
    found = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **found}


@pytest.mark.parametrize(("kind", "backend"), [*((kind, "triton") for kind in LAYERS), ("switchhead", "triton_dense")])
def test_a_layer_by_the_kernels_equals_the_layer_by_the_reference(interpreted, kind: str, backend: str):
    expected, found = forward_and_backward(kind, "reference"), interpreted(forward_and_backward, kind, backend)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.any(), name
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


def test_without_a_gpu_the_kernels_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match="triton") as caught:
        forward_and_backward("sigma_moe", "triton")
    assert "\n" not in str(caught.value)
