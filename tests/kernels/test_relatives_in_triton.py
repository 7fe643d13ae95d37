"""PEER, PKM, Memory+, shift mixing and top-k attention by the Triton kernels, in the interpreter, against the same layers in torch."""

from typing import Any

import pytest
import torch

from model.attention_config import AttentionConfig
from model.context import BatchContext
from model.hsm.config import HSMConfig
from model.parameters import materialize
from model.product_key_config import PEERConfig, PKMConfig
from model.section import LayerSection, Place

LAYERS: dict[str, LayerSection] = {
    "peer": PEERConfig(num_experts=25, num_heads=2, top_k=3, key_dim=4, query_norm="none"),
    "peer with relu": PEERConfig(
        num_experts=16, num_heads=2, top_k=2, key_dim=4, query_norm="layer", activation="relu"
    ),
    "pkm": PKMConfig(num_keys=5, num_heads=2, top_k=3, key_dim=4),
    "memory+": PKMConfig(num_keys=4, num_heads=2, top_k=2, key_dim=4, gated=True, initialisation="memory_layers"),
    "hsm": HSMConfig(variant="multihead", num_heads=2, head_shifts="own", boundary="clamp"),
    "top-k attention": AttentionConfig(num_heads=2, head_dim=4, positions="rope", attend_top_k=3),
}
PARTS = {"peer": 2, "peer with relu": 2, "pkm": 2, "memory+": 2, "hsm": 1, "top-k attention": 1}  # with a backend


def forward_and_backward(kind: str, backend: str) -> dict[str, torch.Tensor]:
    layer: Any = LAYERS[kind].build(Place(10, 2, 0, ("hsm" if kind == "hsm" else "attention",) * 2, "reference", 0.0))
    materialize(layer, seed=3)
    parts = [part for part in layer.modules() if isinstance(getattr(part, "backend", None), str)]
    assert len(parts) == PARTS[kind]
    for part in parts:
        part.backend = backend
    x = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = layer.train()(x, BatchContext(torch.arange(2), None, 1, 0)).y_BSD
    y.square().sum().backward()
    found = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **found}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_by_the_kernels_equals_the_layer_in_torch(interpreted, kind: str):
    expected, found = forward_and_backward(kind, "torch"), interpreted(forward_and_backward, kind, "triton")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.any(), name
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_hands_its_backend_on(kind: str):
    with pytest.raises(ValueError, match=r"backend of .* must be one of triton, torch, reference, got 'another'"):
        forward_and_backward(kind, "another")
