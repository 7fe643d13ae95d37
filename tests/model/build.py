"""Small layers and contexts for the tests of this folder, and a layer's weights under the names of tests/model/by_hand.py.

Layers are handed out as Any: to a type checker every attribute of a torch module may be a tensor or a module.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.config import AttentionConfig, ModelConfig, SwitchHeadConfig
from model.context import BatchContext, Memory
from model.feedforward_config import SigmaMoEConfig
from model.layer import LayerOutput
from model.parameters import materialize
from model.router import entropy_loss
from model.section import Place
from model.sigma_moe import SigmaMoE
from model.transformer import Transformer
from tests.model import by_hand
from tests.model.by_hand import Positions

VOCABULARY = 17
OPEN = 100.0  # a logit whose sigmoid is exactly 1 in float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def context(
    positions: int | list[int], *, documents_BS: Tensor | None = None, seed: int = 1, step: int = 0, depth: int = 0
) -> BatchContext:
    """`positions`: the rows' data positions, or how many rows from position 0 on."""
    positions_B = torch.arange(positions) if isinstance(positions, int) else torch.tensor(positions, dtype=torch.int64)
    return BatchContext(positions_B, documents_BS, seed, step, depth=depth)


def remembering(
    rows: int, num_memory: int, *, filled: int | list[int] | None = None, depth: int = 0, step: int = 0
) -> BatchContext:
    """The first `num_memory` positions of what the mixer is given are memory, of which the last `filled` are filled; None: all."""
    filled = num_memory if filled is None else filled
    filled_B = torch.full((rows,), filled) if isinstance(filled, int) else torch.tensor(filled)
    states = {depth: torch.zeros(rows, num_memory, 1)}  # only its length is the mixer's business
    return replace(context(rows, step=step, depth=depth), memory=Memory(states, filled_B))


def decoded(layer: Any, x_BSD: Tensor, pieces: list[int], *, block_length: int = 1000) -> Tensor:
    """The layer's output, given piece after piece with one cache."""
    cache, found = layer.new_cache(block_length=block_length), []
    with torch.no_grad():
        for piece_BSD in x_BSD.split(pieces, dim=1):
            found.append(layer(piece_BSD, context(len(x_BSD)), cache).y_BSD)
    assert cache.length == x_BSD.shape[1]
    return torch.cat(found, dim=1)


def row_by_row(layer: Any, x_BSD: Tensor, *, block_length: int, memory_blocks: int) -> Tensor:
    """The layer's output on rows of a stream, each with the `memory_blocks` rows before it as memory, as training gives it."""
    size, found = memory_blocks * block_length, []
    padded_BSD = torch.cat(
        [normal(len(x_BSD), size, x_BSD.shape[2], seed=9), x_BSD], dim=1
    )  # what is not filled is arbitrary
    for first in range(0, x_BSD.shape[1], block_length):
        facts = remembering(len(x_BSD), size, filled=min(first, size))
        found.append(layer(padded_BSD[:, first : first + size + block_length], facts).y_BSD)
    return torch.cat(found, dim=1)


def place(*mixers: str, d_model: int = 6, depth: int = 0, num_layers: int = 2, dropout: float = 0.0) -> Place:
    """`mixers`: the kinds of all layers, or one kind for all."""
    kinds = mixers if len(mixers) > 1 else mixers * num_layers
    return Place(d_model, len(kinds), depth, kinds, "reference", dropout)


def switchhead(*, d_model: int = 6, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """In evaluation mode. head_dim 10: half of it is odd, so the rotated width must be rounded down."""
    settings = {"num_heads": 2, "head_dim": 10, "num_experts": 3, "top_k": 2} | settings
    layer = SwitchHeadConfig(**settings).build(place("switchhead", d_model=d_model))
    materialize(layer, seed=5, dtype=dtype)
    return layer.eval()


def sigma_moe(*, d_model: int = 6, dtype: torch.dtype = torch.float64, **sizes: Any) -> Any:
    """In evaluation mode."""
    sizes = {"num_experts": 5, "expert_dim": 4, "top_k": 2} | sizes
    layer = SigmaMoE(SigmaMoEConfig(**sizes), place("switchhead", d_model=d_model))
    materialize(layer, seed=5, dtype=dtype)
    return layer.eval()


def attention(*, d_model: int = 6, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """In evaluation mode, with Transformer-XL's biases and scale off their initial values."""
    settings = {"num_heads": 2, "head_dim": 10} | settings
    layer = Attention(AttentionConfig(**settings), place("attention", d_model=d_model))
    materialize(layer, seed=5, dtype=dtype)
    if layer.attend.relative is not None:
        with torch.no_grad():
            layer.attend.relative.scale += 0.2
            layer.attend.relative.content_bias += normal(*layer.attend.relative.content_bias.shape, seed=6)
            layer.attend.relative.position_bias += normal(*layer.attend.relative.position_bias.shape, seed=7)
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


def positions_of(layer: Any) -> Positions:
    """How a layer's scores know of positions, for by_hand."""
    config, relative = layer.attend.config, layer.attend.relative
    if relative is None:
        return Positions(config.positions, config.rotary_dim)
    heads = (config.num_heads, config.head_dim)
    position_HCD = relative.weight.detach().unflatten(0, heads)
    if not relative.learned:
        return Positions("xl", position_HCD=position_HCD)
    biases = (relative.content_bias.detach().view(heads), relative.position_bias.detach().view(heads))
    return Positions("xl", None, position_HCD, *biases, scale=relative.scale.item())


def switchhead_weights(layer: Any) -> dict[str, Any]:
    """A SwitchHead's, as keyword arguments of by_hand.switchhead: heads first, group h E + e taken apart."""
    heads, weights, routers = layer.attend.config.num_heads, {}, {}
    for name in ("query", "key", "value", "output"):
        if name in getattr(layer, "router_of", {}):
            weights[name] = getattr(layer, f"{name}_experts").weight.detach().unflatten(0, (heads, -1))
            router = getattr(layer, f"{layer.router_of[name]}_router")
            routers[name] = router.weight.detach().unflatten(0, (heads, -1))
        else:
            weights[name] = getattr(layer, name).weight.detach().T
            weights[name] = (
                weights[name].unflatten(0, (heads, -1))
                if name == "output"
                else weights[name].unflatten(1, (heads, -1)).transpose(0, 1)
            )
    return {"weights": weights, "routers": routers, "positions": positions_of(layer)}


def dense_attention(layer: Any, x_BSD: Tensor) -> Tensor:
    """Multi-head attention with the weights of a SwitchHead, the experts of each head summed."""
    form, sums = switchhead_weights(layer), {}
    for name, weight in form["weights"].items():
        sums[name] = weight.sum(1) if weight.ndim == 4 else weight
    dense = {
        "query_HCD": sums["query"].mT,
        "key_HCD": sums["key"].mT,
        "value_HDC": sums["value"],
        "output_HCD": sums["output"],
        "positions": form["positions"],
    }
    visible = by_hand.causal(x_BSD.shape[1])
    return torch.stack([by_hand.attention(row, **dense, visible_SS=visible) for row in x_BSD])


def sigma_moe_weights(layer: Any) -> dict[str, Tensor]:
    """A SigmaMoE's, as keyword arguments of by_hand.sigma_moe."""
    weights = {"up_EDF": layer.experts.up, "down_EFD": layer.experts.down, "router_ED": layer.router.weight}
    return {name: weight.detach() for name, weight in weights.items()}


def attention_weights(layer: Any) -> dict[str, Any]:
    """An Attention's, as keyword arguments of by_hand.attention; query head h looks at head h G / H of K and V."""
    heads, kv_heads = layer.num_heads, layer.num_kv_heads
    shared = [head * kv_heads // heads for head in range(heads)]
    split = {
        "query_HCD": layer.query.weight.unflatten(0, (heads, -1)),
        "key_HCD": layer.key.weight.unflatten(0, (kv_heads, -1))[shared],
        "value_HDC": layer.value.weight.unflatten(0, (kv_heads, -1)).transpose(1, 2)[shared],
        "output_HCD": layer.output.weight.T.unflatten(0, (heads, -1)),
    }
    return {name: weight.detach() for name, weight in split.items()} | {"positions": positions_of(layer)}


def gradients_agree(layer: nn.Module, x_BSD: Tensor, facts: BatchContext, *, fast: bool = False) -> bool:
    """gradcheck of output and auxiliary losses with respect to the input and every parameter of the layer.

    fast: in a random direction of each of them instead of element by element.
    """
    names, values = zip(*layer.named_parameters(), strict=True)

    def forward(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        result = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, facts))
        return (result.y_BSD, *losses_of(result))

    leaves = [value.detach().clone().requires_grad_() for value in (x_BSD, *values)]
    return torch.autograd.gradcheck(forward, leaves, fast_mode=fast)


def losses_of(result: LayerOutput) -> tuple[Tensor, ...]:
    """All auxiliary losses of a layer that is used once."""
    return (*result.auxiliary_losses, *(entropy_loss([spread]) for spread in result.spreads.values()))
