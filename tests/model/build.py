"""Small layers and contexts for the tests of this folder, and a layer's weights under the names of tests/model/by_hand.py.

Layers are handed out as Any: to a type checker every attribute of a torch module may be a tensor or a module.
"""

from typing import Any

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.config import AttentionConfig, ModelConfig, SigmaMoEConfig, SwitchHeadConfig
from model.context import BatchContext, document_mask
from model.parameters import materialize
from model.sigma_moe import SigmaMoE
from model.switchhead import SwitchHead
from model.transformer import Transformer

VOCABULARY = 17


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def context(
    positions: int | list[int], *, documents_BS: Tensor | None = None, seed: int = 1, step: int = 0
) -> BatchContext:
    """`positions`: the rows' data positions, or how many rows from position 0 on."""
    positions_B = torch.arange(positions) if isinstance(positions, int) else torch.tensor(positions, dtype=torch.int64)
    return BatchContext(positions_B, None if documents_BS is None else document_mask(documents_BS), seed, step)


def switchhead(*, d_model: int = 6, depth: int = 0, dtype: torch.dtype = torch.float64, **sizes: Any) -> Any:
    """In evaluation mode. head_dim 10: half of it is odd, so the rotated width must be rounded down."""
    sizes = {"num_heads": 2, "head_dim": 10, "num_experts": 3, "top_k": 2} | sizes
    layer = SwitchHead(SwitchHeadConfig(**sizes), d_model=d_model, num_layers=2, depth=depth, backend="reference")
    materialize(layer, seed=5, dtype=dtype)
    return layer.eval()


def sigma_moe(*, d_model: int = 6, depth: int = 0, dtype: torch.dtype = torch.float64, **sizes: Any) -> Any:
    """In evaluation mode."""
    sizes = {"num_experts": 5, "expert_dim": 4, "top_k": 2} | sizes
    layer = SigmaMoE(SigmaMoEConfig(**sizes), d_model=d_model, num_layers=2, depth=depth, backend="reference")
    materialize(layer, seed=5, dtype=dtype)
    return layer.eval()


def attention(*, d_model: int = 6, num_heads: int = 2, head_dim: int = 10) -> Any:
    """In evaluation mode."""
    layer = Attention(AttentionConfig(num_heads=num_heads, head_dim=head_dim), d_model=d_model, num_layers=2)
    materialize(layer, seed=5, dtype=torch.float64)
    return layer.eval()


def model_config(**changes: Any) -> ModelConfig:
    """Two layers that between them have every mixer and every feed-forward; `changes` replace or add top-level fields."""
    fields: dict[str, Any] = {
        "d_model": 8,
        "num_layers": 2,
        "mixers": ["switchhead", "attention"],
        "feedforwards": ["sigma_moe", "dense_mlp"],
        "switchhead": {"num_heads": 2, "head_dim": 4, "num_experts": 3, "top_k": 2},
        "sigma_moe": {"num_experts": 5, "expert_dim": 4, "top_k": 2},
        "attention": {"num_heads": 2, "head_dim": 6},
        "dense_mlp": {"hidden_dim": 12},
    }
    return ModelConfig.model_validate(fields | changes)


def switchall_config(**changes: Any) -> ModelConfig:
    """Two layers of SwitchHead and sigma-MoE. Six attention groups and five experts: no size above 1 divides both."""
    only = {"mixers": ["switchhead"], "feedforwards": ["sigma_moe"], "attention": None, "dense_mlp": None}
    return model_config(**(only | changes))


def transformer(config: ModelConfig, *, dtype: torch.dtype = torch.float64, seed: int = 5) -> Any:
    """In evaluation mode, gains and biases moved off 1 and 0 so that they count."""
    model = Transformer(config, vocab_size=VOCABULARY, backend="reference")
    materialize(model, seed=seed, dtype=dtype)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.1 * normal(*parameter.shape, seed=number, dtype=dtype)
    return model.eval()


def tokens(rows: int, length: int, *, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def set_logits(router: nn.Module, logits: Tensor | float) -> None:
    """Makes a router give these logits (one per expert group, or one for all) to every input whose channel 0 is 1."""
    with torch.no_grad():
        weight = router.get_parameter("weight")
        weight.zero_()
        weight[:, 0] = logits


def with_constant_channel(x_BSD: Tensor) -> Tensor:
    """The input with channel 0 set to 1, see `set_logits`."""
    return torch.cat([torch.ones_like(x_BSD[..., :1]), x_BSD[..., 1:]], dim=-1)


def switchhead_weights(layer: Any) -> dict[str, Tensor]:
    """A SwitchHead's, as keyword arguments of by_hand.switchhead: heads first, group h E + e taken apart."""
    heads, experts = layer.config.num_heads, layer.config.num_experts
    split = {
        "query_HCD": layer.query.weight.unflatten(0, (heads, -1)),
        "key_HCD": layer.key.weight.unflatten(0, (heads, -1)),
        "value_HEDC": layer.value_experts.weight.unflatten(0, (heads, experts)),
        "output_HECD": layer.output_experts.weight.unflatten(0, (heads, experts)),
        "value_router_HED": layer.value_router.weight.unflatten(0, (heads, experts)),
        "output_router_HED": layer.output_router.weight.unflatten(0, (heads, experts)),
    }
    return {name: weight.detach() for name, weight in split.items()}


def sigma_moe_weights(layer: Any) -> dict[str, Tensor]:
    """A SigmaMoE's, as keyword arguments of by_hand.sigma_moe."""
    weights = {"up_EDF": layer.experts.up, "down_EFD": layer.experts.down, "router_ED": layer.router.weight}
    return {name: weight.detach() for name, weight in weights.items()}


def attention_weights(layer: Any) -> dict[str, Tensor]:
    """An Attention's, as keyword arguments of by_hand.attention."""
    heads = layer.num_heads
    split = {
        "query_HCD": layer.query.weight.unflatten(0, (heads, -1)),
        "key_HCD": layer.key.weight.unflatten(0, (heads, -1)),
        "value_HDC": layer.value.weight.unflatten(0, (heads, -1)).transpose(1, 2),
        "output_HCD": layer.output.weight.T.unflatten(0, (heads, -1)),
    }
    return {name: weight.detach() for name, weight in split.items()}


def gradients_agree(layer: nn.Module, x_BSD: Tensor, facts: BatchContext) -> bool:
    """gradcheck of output and auxiliary losses with respect to the input and every parameter of the layer."""
    names, values = zip(*layer.named_parameters(), strict=True)

    def forward(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        result = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, facts))
        return (result.y_BSD, *result.auxiliary_losses)

    leaves = [value.detach().clone().requires_grad_() for value in (x_BSD, *values)]
    return torch.autograd.gradcheck(forward, leaves)


class Recorded:
    """The outputs of a module's forward passes, kept with their gradients."""

    def __init__(self, module: nn.Module) -> None:
        self.outputs: list[Tensor] = []
        module.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
        self.outputs.append(output)

    @property
    def last(self) -> Tensor:
        return self.outputs[-1]

    @property
    def last_gradient(self) -> Tensor:
        gradient = self.last.grad
        assert gradient is not None
        return gradient
