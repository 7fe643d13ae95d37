"""What layers cost: the papers' cells, and our counting against the products that a forward pass really does."""

import re
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model.attention_config import AttentionConfig, SwitchHeadConfig
from model.cost import Cost
from model.feedforward_config import DenseMLPConfig, SigmaMoEConfig
from model.hsm.config import HSMConfig
from model.parameters import ExpertBank, Table, count_parameters, materialize
from model.product_key_config import PEERConfig, PKMConfig
from model.section import LayerSection, Place
from tests.model.build import context, normal, place, remembering
from tests.model.watch import Watched

LENGTH, WIDTH = 8, 6
SMALL = {"d_model": 412, "length": 256, "memory_blocks": 1, "positions": "xl"}
BIG = {"d_model": 1024, "length": 512, "memory_blocks": 1, "positions": "xl"}
ENWIK8 = {"d_model": 512, "length": 512, "memory_blocks": 1, "positions": "xl"}
ROPE_SMALL = {"d_model": 412, "length": 512, "positions": "rope"}
ROPE_BIG = {"d_model": 1024, "length": 1024, "positions": "rope"}
CELLS = [  # the cells of arXiv 2312.07987's tables as recomputed from its formulas
    ({**SMALL, "num_heads": 10, "head_dim": 41}, "453.4M", "3.46M"),
    ({**SMALL, "num_heads": 2, "head_dim": 205}, "453.4M", "1.36M"),
    ({**SMALL, "num_heads": 2, "head_dim": 76, "num_experts": 5, "top_k": 2}, "170.4M", "0.76M"),
    ({**SMALL, "num_heads": 2, "head_dim": 76, "num_experts": 5, "top_k": 3}, "202.5M", "0.76M"),
    ({**BIG, "num_heads": 16, "head_dim": 64}, "5.37G", "20.97M"),
    ({**BIG, "num_heads": 4, "head_dim": 256}, "5.37G", "8.39M"),
    ({**BIG, "num_heads": 2, "head_dim": 512}, "5.37G", "6.29M"),
    ({**BIG, "num_heads": 4, "head_dim": 112, "num_experts": 4, "top_k": 2}, "2.36G", "5.58M"),
    ({**BIG, "num_heads": 2, "head_dim": 132, "num_experts": 8, "top_k": 4}, "1.96G", "2.92M"),
    ({**ENWIK8, "num_heads": 8, "head_dim": 64}, "1.61G", "10.49M"),
    ({**ENWIK8, "num_heads": 2, "head_dim": 256}, "1.61G", "4.19M"),
    ({**ENWIK8, "num_heads": 2, "head_dim": 112, "num_experts": 4, "top_k": 2}, "709.3M", "2.79M"),
    ({**ROPE_SMALL, "num_heads": 10, "head_dim": 41}, "560.9M", "6.08M"),
    ({**ROPE_SMALL, "num_heads": 2, "head_dim": 205}, "560.9M", "1.89M"),
    ({**ROPE_SMALL, "num_heads": 2, "head_dim": 64, "num_experts": 5, "top_k": 3}, "285.6M", "1.32M"),
    ({**ROPE_BIG, "num_heads": 16, "head_dim": 64}, "6.44G", "37.75M"),
    ({**ROPE_BIG, "num_heads": 2, "head_dim": 512}, "6.44G", "8.39M"),
    ({**ROPE_BIG, "num_heads": 4, "head_dim": 100, "num_experts": 4, "top_k": 2}, "3.37G", "10.04M"),
    ({**ROPE_BIG, "num_heads": 4, "head_dim": 100, "num_experts": 4, "top_k": 2, "memory_blocks": 1}, "4.21G", "18.43M"),
]  # fmt: skip


class Layer(NamedTuple):
    """A layer, the multiply-accumulates per token that are no product of matrices (gates, factors of channels, looked-up rows), and
    what is written per token but no product's result, less products' results that are the output or parts of it: both by hand.
    """

    config: Any
    by_elements: int
    besides: int


DEFAULTS: dict[type[LayerSection], dict[str, Any]] = {
    SwitchHeadConfig: {"num_heads": 2, "head_dim": 4, "num_experts": 3, "top_k": 1},
    SigmaMoEConfig: {"num_experts": 5, "expert_dim": 4, "top_k": 1},
    PEERConfig: {"num_experts": 16, "num_heads": 2, "key_dim": 4},
    PKMConfig: {"num_keys": 3, "num_heads": 2, "top_k": 4},
    HSMConfig: {},
}


def made(kind: type[LayerSection], *, by_elements: int, besides: int, **settings: Any) -> Layer:
    return Layer(kind.model_validate(DEFAULTS[kind] | settings), by_elements, besides)


switchhead, sigma_moe, peer, pkm, hsm = (partial(made, kind) for kind in DEFAULTS)


# In besides: attention's probabilities, H * (1 + memory_blocks) * 8 of them, less the output, 6, once for each head that makes a part; of
# product keys the H K picks, three numbers each, less all sub-scores, 2 H J.
LAYERS = {
    "attention_rope": Layer(AttentionConfig(num_heads=2, head_dim=4), 0, 16 - 6),
    "attention_grouped": Layer(AttentionConfig(num_heads=4, head_dim=4, num_kv_heads=2, memory_blocks=2), 0, 96 - 6),
    "attention_xl": Layer(AttentionConfig(num_heads=2, head_dim=5, positions="xl", memory_blocks=1), 0, 32 - 6),
    "switchhead_rope": switchhead(by_elements=16, besides=16 - 12),
    "switchhead_xl": switchhead(positions="xl", memory_blocks=1, by_elements=24, besides=32 - 12),
    "switchhead_qk": switchhead(experts=("q", "k"), positions="none", memory_blocks=1, by_elements=24, besides=32 - 6),
    "switchhead_all": switchhead(
        experts=("q", "k", "v", "o"), routers="separate", memory_blocks=1, by_elements=48, besides=32 - 12
    ),
    "switchhead_shared": switchhead(
        experts=("q", "v", "o"), routers="shared", memory_blocks=1, by_elements=32, besides=32 - 12
    ),
    "switchhead_one": switchhead(num_experts=1, single_expert="gate_output", by_elements=8, besides=16 - 6),
    "hsm_matrix": hsm(variant="matrix", by_elements=0, besides=6),
    "hsm_half": hsm(variant="matrix_scalar", bias=False, by_elements=6, besides=6),
    "hsm_blocks": hsm(
        variant="multihead_matrix", num_heads=3, head_shifts="own", num_shifts=2, by_elements=0, besides=6
    ),
    "hsm_gate": hsm(variant="single_gate", by_elements=12, besides=6),
    "hsm_gates": hsm(variant="double_gate", by_elements=12, besides=6),
    "hsm_fusion": hsm(variant="fusion", hidden_dim=7, by_elements=0, besides=6 - 6),
    "hsm_constant": hsm(by_elements=12, besides=0),
    "hsm_vector": hsm(variant="vector", by_elements=12, besides=0),
    "hsm_heads": hsm(variant="multihead", num_heads=2, by_elements=12, besides=0),
    "sigma_moe": sigma_moe(by_elements=4, besides=-6),
    "sigma_moe_shared": sigma_moe(num_shared_experts=2, by_elements=4, besides=-12),
    "sigma_moe_averages": sigma_moe(router="average_keys", by_elements=4, besides=-6),
    "sigma_moe_noisy": sigma_moe(router="noisy", top_k=2, by_elements=8, besides=-12),
    "sigma_moe_recurrent": sigma_moe(router="recurrent", router_dim=3, top_k=2, by_elements=8, besides=-12),
    "dense_mlp": Layer(DenseMLPConfig(hidden_dim=9), 0, -6),
    "dense_mlp_gated": Layer(DenseMLPConfig(hidden_dim=9, activation="swiglu", bias=True), 0, -6),
    "dense_mlp_plain": Layer(DenseMLPConfig(hidden_dim=9, bias=False), 0, -6),
    "peer": peer(top_k=3, by_elements=78, besides=6 + 18 - 16),
    "peer_own_keys": peer(
        top_k=1, shared_keys=False, query_norm="layer", scores="relu", by_elements=26, besides=2 + 6 - 16
    ),
    "pkm": pkm(key_dim=4, query_norm="batch", shared_keys=True, by_elements=48, besides=24 - 12),
    "pkm_gated": pkm(gated=True, query_norm="layer", by_elements=48, besides=6 - 6 + 24 - 12),
    "pkm_all": pkm(top_k=None, by_elements=0, besides=18 - 6),
    "pkm_all_relu": pkm(top_k=None, scores="relu", by_elements=0, besides=9 - 6),
}


class Products(TorchDispatchMode):
    """The sizes of the results of every product of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if re.match(r"aten\.(mm|bmm|addmm|baddbmm)\.", str(func)):
            self.sizes.append(result.numel())
        return result


def of(config: LayerSection, *, d_model: int = WIDTH, depth: int = 0, length: int = LENGTH) -> Cost:
    cost = config.cost(here(config, d_model=d_model, depth=depth), length=length)
    assert cost is not None
    return cost


def here(config: LayerSection, *, d_model: int = WIDTH, depth: int = 0) -> Place:
    return place("hsm" if isinstance(config, HSMConfig) else "switchhead", d_model=d_model, depth=depth)


def built(config: LayerSection, *, depth: int = 0) -> Any:
    """In training mode: noise is part of what a router costs."""
    layer = config.build(here(config, depth=depth))
    materialize(layer, seed=1)
    return layer


def row(length: int = LENGTH) -> Tensor:
    return normal(1, length, WIDTH, dtype=torch.float32)


def run(config: LayerSection) -> None:
    """One row, with full memory where the layer has any."""
    num_memory = LENGTH * getattr(config, "memory_blocks", 0)
    memory_BMD = normal(1, num_memory, WIDTH, seed=2, dtype=torch.float32)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        built(config)(torch.cat([memory_BMD, row()], dim=1), remembering(1, num_memory) if num_memory else context(1))


@pytest.mark.parametrize(("settings", "macs", "floats"), CELLS)
def test_the_papers_counting_gives_the_cells_of_its_tables(settings: dict[str, Any], macs: str, floats: str):
    sizes = {name: value for name, value in settings.items() if name not in ("d_model", "length")}
    kind = SwitchHeadConfig if "num_experts" in sizes else AttentionConfig
    work = of(kind.model_validate(sizes), d_model=settings["d_model"], length=settings["length"]).papers_work
    unit = {"M": 1e6, "G": 1e9}[macs[-1]]
    assert f"{work.macs / unit:.{1 if unit == 1e6 else 2}f}{macs[-1]}" == macs
    assert f"{work.floats / 1e6:.2f}M" == floats


def test_the_papers_counting_of_a_sigma_moe_is_its_formula():
    T, D, G, K, N = 1024, 1024, 128, 16, 387  # MoEUT 244M: 2 T D G K + T D N
    cost = of(SigmaMoEConfig.model_validate({"num_experts": N, "expert_dim": G, "top_k": K}), d_model=D, length=T)
    assert cost.papers_work.macs == 2 * T * D * G * K + T * D * N


def test_peer_with_a_million_experts_has_the_operations_of_its_specification():
    cost = of(PEERConfig(num_experts=1024**2, num_heads=8, top_k=16, key_dim=128), d_model=1024, length=1)
    query, scores, experts, gates = 2 * 1024 * 8 * 128, 2 * 1024 * 128 * 8, 4 * 8 * 16 * 1024, 2 * 8 * 16
    assert (2 * cost.work.macs, round(query / 1e6, 2), round(scores / 1e6, 2)) == (
        query + scores + experts + gates,
        2.10,
        2.10,
    )
    assert round(2 * cost.work.macs / 1e6, 2) == 4.72


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_our_counting_is_what_a_forward_pass_multiplies(layer: Layer):
    with FlopCounterMode(display=False) as counter:
        run(layer.config)
    assert of(layer.config).work.macs == counter.get_total_flops() // 2 + LENGTH * layer.by_elements


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_our_counting_is_what_a_forward_pass_writes_besides_its_output(layer: Layer):
    with Products() as products:
        run(layer.config)
    assert of(layer.config).work.floats == sum(products.sizes) + LENGTH * layer.besides


@pytest.mark.parametrize("positions", ["rope", "xl"])
@pytest.mark.parametrize("top_k", [1, 4, 16])
def test_top_k_attention_reads_only_the_kept_keys(top_k: int, positions: str):
    """Besides, the scores of the distances (xl) wait for nothing: each of 2 heads has one for every pair."""
    sizes = {"num_heads": 2, "head_dim": 4, "memory_blocks": 1, "positions": positions}
    full, kept = (of(AttentionConfig.model_validate({**sizes, "attend_top_k": k})) for k in (None, top_k))
    distances = 2 * LENGTH * 2 * LENGTH if positions == "xl" else 0
    assert full.work.macs - kept.work.macs == 2 * 4 * LENGTH * (2 * LENGTH - top_k)
    assert full.work.floats - kept.work.floats == 2 * 2 * LENGTH * (2 * LENGTH - top_k) + distances


def test_top_k_activation_works_with_the_kept_rows_of_the_second_matrix():
    full, kept = (of(DenseMLPConfig(hidden_dim=9, top_k=k)) for k in (None, 2))
    assert full.active_parameters - kept.active_parameters == (9 - 2) * WIDTH
    assert full.work == kept.work  # zeros are multiplied too


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize(
    "name", [name for name in LAYERS if name.split("_")[0] in ("switchhead", "sigma") and name != "switchhead_one"]
)
def test_active_parameters_are_those_that_one_token_reaches(name: str, top_k: int):
    config = LAYERS[name].config.model_copy(update={"top_k": top_k})
    layer = built(config)
    layer.dispatcher = watched = Watched()
    layer(row(1), context(1))
    banks = [module for module in layer.modules() if isinstance(module, ExpertBank)]
    elsewhere = count_parameters(layer) - sum(count_parameters(bank) for bank in banks)
    group = count_parameters(banks[0]) // banks[0].num_groups
    reached = sum(len(ids_NK.unique()) * group for ids_NK in watched.expert_ids)
    assert of(config).active_parameters == elsewhere + reached


@pytest.mark.parametrize("name", ["peer", "peer_own_keys", "pkm", "pkm_gated"])
def test_active_parameters_of_a_table_are_the_rows_of_all_picks(name: str):
    config = LAYERS[name].config
    layer, picks = built(config), config.num_heads * config.top_k
    (table,) = (module for module in layer.modules() if isinstance(module, Table))
    rows = {"peer": 2 * WIDTH, "pkm": WIDTH}[name[:4].rstrip("_")]
    assert count_parameters(table) == rows * config.num_keys**2
    assert of(config).active_parameters == count_parameters(layer) - count_parameters(table) + picks * rows


ALL_ACTIVE = ("attention", "hsm", "dense")


@pytest.mark.parametrize(
    "name", [*(name for name in LAYERS if name.startswith(ALL_ACTIVE)), "switchhead_one", "pkm_all"]
)
def test_all_weights_of_a_layer_without_a_choice_are_active(name: str):
    assert of(LAYERS[name].config).active_parameters == count_parameters(built(LAYERS[name].config))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith(("attention", "switchhead", "hsm"))])
def test_the_decode_state_is_what_the_cache_holds_after_as_many_tokens_as_a_row_sees(name: str, depth: int):
    config = LAYERS[name].config
    layer = built(config, depth=depth).eval()
    cache = layer.new_cache(block_length=LENGTH)
    with torch.no_grad():
        for _ in range(1 + getattr(config, "memory_blocks", 0)):
            layer(row(), context(1), cache)
    assert of(config, depth=depth).decode_floats == cache.num_floats
