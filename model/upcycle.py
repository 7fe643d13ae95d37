"""Upcycling: the weights of a dense model -> those of a model with experts that computes the same at its first step.

Owns which dense model begins which model with experts, and the arithmetic of each tensor; train/begin.py, the caller, reads and writes.
Experts are copies of the dense projection or MLP (sparse upcycling, arXiv 2212.05055) or slices of the MLP's hidden layer. A layer of
the same kind in both models is taken as it is.

Gates are not renormalised here as they are in that paper, so what the chosen experts give is scaled instead. At a gate of g for each of
K experts, K copies of W come to K g W: W is divided by K g. For slices each gate is to be 1: W2 is divided by g.

| experts | gates | equal to the dense model |
|---|---|---|
| copies | sum to 1 (SwitchHead softmax; sigma-MoE softmax_after, noisy, recurrent) | exactly, whatever the router is |
| copies | sigmoid (also sinkhorn): g = 1/2; softmax of all E (also switch): g = 1/E | exactly where the router's weights are 0 |
| slices | as in the line above, or open (average_keys): g = 1 | the same, and only with K = E |

Exactly: up to the rounding of sums in another order. Weights of 0 would send all tokens to the first K experts, where they stay; so the
router keeps what was drawn for it, made small: the logits of a normalised input then have the standard deviation `router_std`, and a
sigmoid gate is off 1/2 by a quarter of it: with the default of 1e-3, by less than 1e-3 at four standard deviations. (A trained gain of
the norm before the router scales this.) With K < E slices the model computes the sum of K of E parts: a beginning, not the same model.

Shape letters: D model width, H heads, G heads of K and V, C head width, E experts, F expert width, X hidden width of the dense MLP.
"""

from collections.abc import Callable

from torch import Tensor

from model.attention_config import PROJECTIONS, AttentionConfig, SwitchHeadConfig
from model.config import ModelConfig
from model.feedforward_config import DenseMLPConfig, SigmaMoEConfig
from model.router import Gates
from model.section import LayerSection
from model.selection import GATES

Read = Callable[[str], Tensor]  # a whole tensor of the dense model by its logical name
Recipe = Callable[[Read], Tensor]

ROUTER_STD = 1.0e-3


def recipes(dense: ModelConfig, sparse: ModelConfig) -> dict[str, Recipe]:
    """By logical name, each tensor of `sparse` that is not simply the one of that name in `dense`, nor a router's.

    Raises:
        ValueError: a layer of the one cannot begin that of the other; says which sizes or settings would fit.
    """
    for name in ("d_model", "num_layers", "distinct_layers", "norm"):
        _equal(f"model.{name}", getattr(dense, name), getattr(sparse, name))
    found: dict[str, Recipe] = {}
    depths = range(sparse.distinct_layers or sparse.num_layers)
    for depth, before, after in zip(depths, dense.mixer_sections(), sparse.mixer_sections(), strict=False):
        if isinstance(before, AttentionConfig) and isinstance(after, SwitchHeadConfig):
            found |= _switchhead(f"layers.{depth}.mixer", before, after)
        else:
            _same_kind("mixers", before, after)
    feedforwards = zip(depths, dense.feedforward_sections(), sparse.feedforward_sections(), strict=False)
    for depth, before, after in feedforwards:
        if isinstance(before, DenseMLPConfig) and isinstance(after, SigmaMoEConfig):
            found |= _sigma_moe(f"layers.{depth}.feedforward", before, after)
        else:
            _same_kind("feedforwards", before, after)
    return found


def gate_at_zero(gates: Gates, *, num_experts: int, top_k: int) -> float:
    """The gate of each of the K chosen experts where all logits are equal."""
    return {"sigmoid": 0.5, "softmax": 1 / top_k, "softmax_of_all": 1 / num_experts, "open": 1.0}[gates]


def small_routers(sparse: ModelConfig) -> set[str]:
    """Paths of the layers' parts whose routers must be small, because their gates do not sum to 1 by themselves."""
    paths = set()
    for depth in range(sparse.distinct_layers or sparse.num_layers):
        mixer, feedforward = sparse.mixer_sections()[depth], sparse.feedforward_sections()[depth]
        if isinstance(mixer, SwitchHeadConfig) and mixer.gates != "softmax":
            paths.add(f"layers.{depth}.mixer")
        if isinstance(feedforward, SigmaMoEConfig) and GATES[feedforward.router] != "softmax":
            paths.add(f"layers.{depth}.feedforward")
    return paths


def _switchhead(path: str, dense: AttentionConfig, sparse: SwitchHeadConfig) -> dict[str, Recipe]:
    for name in ("num_heads", "head_dim", "positions", "memory_blocks", "attend_top_k"):
        _equal(f"model.attention.{name} and model.switchhead.{name}", getattr(dense, name), getattr(sparse, name))
    _equal("the rotated channels (rotary_dim) of both", dense.rotary_width(), sparse.rotary_width())
    if dense.positions == "xl":
        raise ValueError(
            "SwitchHead has none of the learned biases and scale that attention has with positions xl, but model.attention.positions is "
            "xl: upcycle a dense model with positions rope or none"
        )
    if sparse.single_expert == "gate_output":
        raise ValueError(
            "upcycling needs a gate for each projection, but model.switchhead.single_expert is gate_output: set it to gate_both"
        )
    heads, experts = dense.num_heads, sparse.num_experts
    gate = gate_at_zero(sparse.gates, num_experts=experts, top_k=sparse.top_k)
    factor = 1 / (sparse.top_k * gate)

    def of_heads(name: str) -> Recipe:
        """(H, D, C) of a projection into heads; query heads that share one of G heads get a copy each."""

        def recipe(read: Read) -> Tensor:
            weight_GCD = read(f"{path}.{name}.weight").unflatten(0, (-1, dense.head_dim))
            return weight_GCD.repeat_interleave(heads // len(weight_GCD), dim=0).mT

        return recipe

    def out_of_heads(read: Read) -> Tensor:
        """(H, C, D) of the output projection."""
        return read(f"{path}.output.weight").T.unflatten(0, (heads, -1))

    def copies(per_head: Recipe) -> Recipe:
        return lambda read: (factor * per_head(read)).repeat_interleave(experts, dim=0)

    found: dict[str, Recipe] = {}
    for letter, name in PROJECTIONS.items():
        per_head = out_of_heads if name == "output" else of_heads(name)
        if letter in sparse.experts:
            found[f"{path}.{name}_experts.weight"] = copies(per_head)
        elif name != "output":
            found[f"{path}.{name}.weight"] = lambda read, per_head=per_head: per_head(read).mT.flatten(0, 1)
    return found


def _sigma_moe(path: str, dense: DenseMLPConfig, sparse: SigmaMoEConfig) -> dict[str, Recipe]:
    for name, value, fits in (
        ("dense_mlp.activation", dense.activation, "relu"),
        ("dense_mlp.bias", dense.has_bias(), False),
        ("dense_mlp.top_k", dense.top_k, None),
        ("sigma_moe.num_shared_experts", sparse.num_shared_experts, 0),
    ):
        if value != fits:
            raise ValueError(
                f"sigma-MoE's experts are relu layers without biases that a router chooses, so model.{name} must be {fits} to upcycle, "
                f"but it is {value}: upcycle a model, or into one, with model.{name}={fits}"
            )
    hidden, experts, width = dense.hidden_dim, sparse.num_experts, sparse.expert_dim
    gates = GATES[sparse.router]
    gate = gate_at_zero(gates, num_experts=experts, top_k=sparse.top_k)
    up, down = f"{path}.up.weight", f"{path}.down.weight"  # (X, D) and (D, X)
    names = (f"{path}.experts.up", f"{path}.experts.down")
    if width == hidden and gates != "open":
        factor = 1 / (sparse.top_k * gate)
        return {
            names[0]: lambda read: read(up).T.expand(experts, -1, -1),
            names[1]: lambda read: (factor * read(down).T).expand(experts, -1, -1),
        }
    if width * experts == hidden and gates != "softmax":
        return {
            names[0]: lambda read: read(up).unflatten(0, (experts, width)).mT,
            names[1]: lambda read: read(down).T.unflatten(0, (experts, width)) / gate,
        }
    fits = []
    if gates != "open":  # equal experts have equal keys there, so every token would choose the same
        fits.append(f"expert_dim {hidden} (copies of the dense layer)")
    if gates != "softmax":  # gates that sum to 1 cannot all be 1
        equal = f"num_experts x expert_dim = {hidden}"
        fits.append(
            f"expert_dim {hidden // experts} ({equal}, slices)" if hidden % experts == 0 else f"{equal} (slices)"
        )
    raise ValueError(
        f"a dense layer begins experts that are copies or slices of it, but model.dense_mlp.hidden_dim is {hidden} and "
        f"model.sigma_moe has router {sparse.router}, num_experts {experts} and expert_dim {width}: with this router choose "
        f"{' or '.join(fits)}"
    )


def _equal(what: str, dense: object, sparse: object) -> None:
    if dense != sparse:
        raise ValueError(
            f"to upcycle, {what} must be equal, but the dense model has {dense} and this model {sparse}: set it to {dense}"
        )


def _same_kind(pattern: str, dense: LayerSection, sparse: LayerSection) -> None:
    kinds = [type(section).__name__.removesuffix("Config") for section in (dense, sparse)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"upcycling turns attention into switchhead and dense_mlp into sigma_moe and takes other layers as they are, but a layer of "
            f"model.{pattern} is {kinds[0]} in the dense model and {kinds[1]} in this one: use the same kind for it"
        )
    before, after = dense.model_dump(), sparse.model_dump()
    changes = [f"{name} was {before[name]} and is {after[name]}" for name in after if before[name] != after[name]]
    if changes:
        raise ValueError(
            f"a layer of the same kind in both models is taken as it is, but of {kinds[0]} in model.{pattern} {'; '.join(changes)}: "
            "give it the dense model's settings"
        )
