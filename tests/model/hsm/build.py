"""HSM layers and small stacks of them for the tests of this folder, with weights moved off their start so that all of them count.

Layers are handed out as Any: to a type checker every attribute of a torch module may be a tensor or a module.
"""

from typing import Any

import torch
from torch import Tensor, nn

from model.hsm.config import HSMConfig
from model.layer import LayerNorm, Linear
from model.parameters import DeclaringModule, materialize
from model.parameters import normal as draw_normal
from tests.model.build import context, normal, place

WIDTH = 6
VARIANTS: dict[str, dict[str, Any]] = {
    "constant": {"variant": "constant"},
    "vector": {"variant": "vector"},
    "multihead": {"variant": "multihead", "num_heads": 3},
    "matrix_scalar": {"variant": "matrix_scalar"},
    "matrix": {"variant": "matrix"},
    "multihead_matrix": {"variant": "multihead_matrix", "num_heads": 3},
    "single_gate": {"variant": "single_gate"},
    "double_gate": {"variant": "double_gate"},
    "fusion": {"variant": "fusion", "hidden_dim": 5},
}
OWN_SHIFTS: dict[str, dict[str, Any]] = {
    f"{name}_own_shifts": VARIANTS[name] | {"head_shifts": "own"} for name in ("multihead", "multihead_matrix")
}
ALL = VARIANTS | OWN_SHIFTS


def hsm(settings: dict[str, Any], *, depth: int = 0, d_model: int = WIDTH, num_layers: int = 4) -> Any:
    """The layer at `depth` of a pure HSM model as it starts, in float64."""
    layer = HSMConfig.model_validate(settings).build(place("hsm", depth=depth, num_layers=num_layers, d_model=d_model))
    materialize(layer, seed=5, dtype=torch.float64)
    return layer.eval()


def stirred(module: Any, *, std: float = 0.5) -> Any:
    """The module with random numbers added to every parameter."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter += std * normal(*parameter.shape, seed=100 + number)
    return module


class Block(DeclaringModule):
    """x += hsm(norm(x)); x += mlp(norm(x)): the block that section 3.1 of the specification writes down."""

    def __init__(self, settings: dict[str, Any], *, depth: int, num_layers: int) -> None:
        super().__init__()
        self.mixer_norm = LayerNorm(WIDTH)
        self.mixer = HSMConfig.model_validate(settings).build(
            place("hsm", depth=depth, num_layers=num_layers, d_model=WIDTH)
        )
        self.mlp_norm = LayerNorm(WIDTH)
        self.up = Linear(WIDTH, 8, draw=draw_normal(0.3), bias=True)
        self.down = Linear(8, WIDTH, draw=draw_normal(0.3), bias=True)

    def forward(self, x_BSD: Tensor, *, documents_BS: Tensor | None, cache: Any = None) -> Tensor:
        facts = context(x_BSD.shape[0], documents_BS=documents_BS)
        x_BSD = x_BSD + self.mixer(self.mixer_norm(x_BSD), facts, cache).y_BSD
        return x_BSD + self.down(self.up(self.mlp_norm(x_BSD)).tanh())


class Stack(nn.Module):
    """Shifts 1, 2, 4, 8: a reach of 15."""

    REACH = 15

    def __init__(self, settings: dict[str, Any], *, num_layers: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(settings, depth=depth, num_layers=num_layers) for depth in range(num_layers))

    def forward(self, x_BSD: Tensor, *, documents_BS: Tensor | None = None, caches: list[Any] | None = None) -> Tensor:
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x_BSD = block(x_BSD, documents_BS=documents_BS, cache=cache)
        return x_BSD

    def new_caches(self) -> list[Any]:
        return [block.get_submodule("mixer").new_cache(block_length=16) for block in self.blocks]  # type: ignore[operator]


def stack(settings: dict[str, Any], **sizes: Any) -> Any:
    """In float64, every weight at random."""
    built = Stack(settings, **sizes)
    materialize(built, seed=3, dtype=torch.float64)
    return stirred(built)
