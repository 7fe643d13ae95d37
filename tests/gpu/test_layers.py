"""Whole layers on a GPU: by the kernels against the reference, and on a GPU against a CPU."""

from typing import Any

import pytest
import torch

from model.attention_config import AttentionConfig, SwitchHeadConfig
from model.context import BatchContext, Memory
from model.feedforward_config import SigmaMoEConfig
from model.parameters import materialize
from model.section import LayerSection, Place
from tests.gpu.cases import SMOKE, assert_close, normal, on_a_grid

pytestmark = pytest.mark.gpu

HEADS = {"num_heads": 2, "num_experts": 5, "top_k": 2} | (
    {"head_dim": 6, "num_experts": 3} if SMOKE else {"head_dim": 76}
)
EXPERTS = {"num_experts": 16, "expert_dim": 128, "top_k": 4} | ({"num_experts": 4, "expert_dim": 16} if SMOKE else {})
LAYERS: dict[str, LayerSection] = {
    "switchhead": SwitchHeadConfig.model_validate(HEADS),
    "switchhead with memory": SwitchHeadConfig.model_validate(HEADS | {"positions": "xl", "memory_blocks": 1}),
    "switchhead of four experts": SwitchHeadConfig.model_validate(HEADS | {"experts": ("q", "k", "v", "o")}),
    "sigma_moe": SigmaMoEConfig.model_validate(EXPERTS),
    "sigma_moe with hidden dropout": SigmaMoEConfig.model_validate(
        EXPERTS | {"num_shared_experts": 1, "hidden_dropout": 0.4}
    ),
}
DENSE = {
    "attention": AttentionConfig.model_validate({"num_heads": 2, "head_dim": 20}),
    "attention with memory": AttentionConfig.model_validate(
        {"num_heads": 2, "head_dim": 20, "positions": "xl", "memory_blocks": 1}
    ),
}
ROWS, LENGTH, D_MODEL = (2, 4, 12) if SMOKE else (4, 96, 412)


def forward_and_backward(
    section: LayerSection, *, backend: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """By name: the output, the input's gradient, those of the weights."""
    kind = "switchhead" if not isinstance(section, AttentionConfig) else "attention"
    layer: Any = section.build(Place(D_MODEL, 2, 0, (kind,) * 2, backend, 0.0))
    materialize(layer, seed=3, device=device)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith(("up", "up.weight")):
                parameter.copy_(on_a_grid(parameter * 16) / 16)  # before a relu
    num_memory = getattr(section, "memory_blocks", 0) * LENGTH
    memory = None
    if num_memory:
        memory = Memory({0: torch.zeros(ROWS, num_memory, 1, device=device)}, torch.full((ROWS,), 2, device=device))
    context = BatchContext(torch.arange(ROWS, device=device), None, 1, 0, memory, depth=0)
    x = on_a_grid(normal(ROWS, num_memory + LENGTH, D_MODEL, seed=1, device=device)).requires_grad_()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        y = layer.train()(x, context).y_BSD
    y.backward(normal(*y.shape, seed=2, device=device).to(y.dtype))
    assert x.grad is not None
    weights = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    return {"y": y.detach(), "x": x.grad, **weights}


def backends(section: LayerSection) -> tuple[str, ...]:
    return ("triton", "triton_dense") if isinstance(section, SwitchHeadConfig) else ("triton",)


CASES = [(name, backend) for name, section in LAYERS.items() for backend in backends(section)]


@pytest.mark.parametrize(("name", "backend"), CASES if not SMOKE else [CASES[0], CASES[3], CASES[-1]])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)][: 1 if SMOKE else 2], ids=str
)
def test_a_layer_by_the_kernels_equals_its_reference(
    device: torch.device, name: str, backend: str, dtype: torch.dtype, tolerance: float
):
    """As a run computes: without TF32, with deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    wanted = forward_and_backward(LAYERS[name], backend="reference", device=device, dtype=dtype)
    found, again = (forward_and_backward(LAYERS[name], backend=backend, device=device, dtype=dtype) for _ in range(2))
    assert_close(found, wanted, tolerance)
    for part, one in found.items():
        assert torch.equal(one, again[part]), f"{part}: two runs differ"


@pytest.mark.parametrize("name", [*LAYERS, *DENSE][:: 6 if SMOKE else 1])
def test_a_layer_on_a_gpu_equals_the_layer_on_a_cpu(device: torch.device, name: str):
    section = (LAYERS | DENSE)[name]
    torch.use_deterministic_algorithms(True)
    wanted = forward_and_backward(section, backend="reference", device=torch.device("cpu"))
    found = forward_and_backward(section, backend="reference", device=device)
    assert_close({part: one.cpu() for part, one in found.items()}, wanted, 1e-4)
