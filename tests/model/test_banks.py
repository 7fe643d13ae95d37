"""What a config says of its banks, against the layers that are built of it and what they hand to their dispatcher."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention_config import SwitchHeadConfig
from model.config import ModelConfig
from model.dispatch import LocalDispatcher, Ready, Routing
from model.feedforward_config import SigmaMoEConfig
from model.parameters import ExpertBank, Table, materialize
from model.product_key_config import PEERConfig, PKMConfig
from model.section import BankShape, LayerSection
from tests.model.build import context, model_config, normal, place, remembering, transformer

D_MODEL, BATCH, LENGTH = 6, 2, 5
SWITCHHEAD: dict[str, Any] = {"num_heads": 2, "head_dim": 10, "num_experts": 3, "top_k": 2}
ONE_EXPERT = SWITCHHEAD | {"num_experts": 1, "top_k": 1}
SIGMA_MOE: dict[str, Any] = {"num_experts": 5, "expert_dim": 4, "top_k": 2}
PKM: dict[str, Any] = {"num_keys": 4, "num_heads": 3, "top_k": 2}
PEER: dict[str, Any] = {"num_experts": 16, "num_heads": 3, "top_k": 2, "key_dim": 4}


class Recorder(LocalDispatcher):
    """Keeps what a layer hands over, by label."""

    def __init__(self) -> None:
        self.routings: tuple[Routing, ...] = ()
        self.widths_in: dict[str, int] = {}
        self.widths_out: dict[str, int] = {}

    def plan(self, *routings: Routing) -> Any:
        self.routings = routings
        return super().plan(*routings)

    def dispatch(self, exchange: Any, rows: Tensor, *, label: str) -> Any:
        self.widths_in[label] = rows.shape[1]
        return super().dispatch(exchange, rows, label=label)

    def combine(self, *arguments: Any, label: str, **options: Any) -> Any:
        sums = super().combine(*arguments, label=label, **options).wait()
        self.widths_out[label] = sums.shape[1]
        return Ready(sums)


class Planned(Exception):
    """The layer has come to its plan."""


class OnlyPlans(Recorder):
    def plan(self, *routings: Routing) -> Any:
        self.routings = routings
        raise Planned


VARIANTS: dict[str, tuple[type[LayerSection], dict[str, Any]]] = {
    "value, output": (SwitchHeadConfig, SWITCHHEAD),
    "all four": (SwitchHeadConfig, SWITCHHEAD | {"experts": ("q", "k", "v", "o")}),
    "key": (SwitchHeadConfig, SWITCHHEAD | {"experts": ("k",)}),
    "memory": (SwitchHeadConfig, SWITCHHEAD | {"experts": ("q", "k", "v", "o"), "memory_blocks": 2}),
    "one head": (SwitchHeadConfig, SWITCHHEAD | {"num_heads": 1}),
    "one expert": (SwitchHeadConfig, ONE_EXPERT),
    "gate_output": (SwitchHeadConfig, ONE_EXPERT | {"single_expert": "gate_output"}),
    "mlp": (SigmaMoEConfig, SIGMA_MOE),
    "mlp that drops": (SigmaMoEConfig, SIGMA_MOE | {"hidden_dropout": 0.5}),
    "mlp with shared experts": (SigmaMoEConfig, SIGMA_MOE | {"num_shared_experts": 2}),
    "pkm": (PKMConfig, PKM),
    "memory+": (PKMConfig, PKM | {"gated": True, "key_dim": 4}),
    "dense pkm": (PKMConfig, PKM | {"top_k": None}),
    "peer": (PEERConfig, PEER),
}
ROUTERS = ("softmax", "softmax_after", "switch", "sinkhorn", "noisy", "average_keys", "recurrent")
VARIANTS |= {f"router {router}": (SigmaMoEConfig, SIGMA_MOE | {"router": router}) for router in ROUTERS}
SECTIONS = {name: section.model_validate(settings) for name, (section, settings) in VARIANTS.items()}


def built(section: LayerSection) -> Any:
    layer = section.build(place("switchhead", d_model=D_MODEL))
    materialize(layer, seed=5, dtype=torch.float64)
    return layer.train()


def forwarded(section: LayerSection, layer: Any, dispatcher: Recorder) -> Recorder:
    """After a training pass over BATCH rows of LENGTH tokens."""
    layer.dispatcher = dispatcher
    num_memory = section.memory_blocks * LENGTH if isinstance(section, SwitchHeadConfig) else 0
    facts = remembering(BATCH, num_memory) if num_memory else context(BATCH)
    layer(normal(BATCH, num_memory + LENGTH, D_MODEL), facts)
    return dispatcher


@pytest.mark.parametrize("name", SECTIONS)
def test_the_banks_of_a_section_are_those_of_its_layer(name: str):
    layer = built(SECTIONS[name])
    shapes = SECTIONS[name].banks(place("switchhead", d_model=D_MODEL))
    banks = {path: module for path, module in layer.named_modules() if isinstance(module, ExpertBank)}
    assert sorted(shape.name for shape in shapes) == sorted(banks)
    for shape in shapes:
        bank = banks[shape.name]
        assert bank.num_groups == shape.num_groups
        assert sum(weight.numel() for weight in bank.parameters()) == shape.num_groups * shape.group_numel
        assert isinstance(bank, Table) == shape.is_table


@pytest.mark.parametrize("name", [name for name in SECTIONS if name not in ("gate_output", "dense pkm")])
def test_what_the_layer_hands_to_its_dispatcher_has_the_sizes_that_the_section_says(name: str):
    section, layer = SECTIONS[name], built(SECTIONS[name])
    recorder = forwarded(section, layer, Recorder())
    shapes = section.banks(place("switchhead", d_model=D_MODEL))
    assert {shape.label: shape.row_dim for shape in shapes} == recorder.widths_in
    assert {shape.label: shape.output_dim for shape in shapes} == recorder.widths_out
    for shape in shapes:
        (routing,) = (one for one in recorder.routings if one.bank is layer.get_submodule(shape.name))
        assert_routed(routing, shape)


def assert_routed(routing: Routing, shape: BankShape) -> None:
    tokens = BATCH * LENGTH * shape.token_factor
    assert (routing.num_rows, routing.num_outputs) == (tokens * shape.rows_per_token, tokens * shape.outputs_per_token)
    assert (routing.source_row_N is routing.output_row_N) == shape.same_rows
    assert (routing.hashes_N is not None) == shape.hashed
    assert routing.gates_NK is not None
    # an entry for each head, in the order of tokens, or one for all of them
    ids_THK = routing.expert_ids_NK.view(tokens, shape.num_heads, shape.top_k)
    assert (len(routing.expert_ids_NK) == tokens) == (max(shape.rows_per_token, shape.outputs_per_token) == 1)
    assert all(len(set(ids)) == shape.top_k for ids in ids_THK.flatten(0, 1).tolist())
    own = shape.num_groups // shape.num_heads
    heads_TH1 = torch.arange(shape.num_heads)[None, :, None].expand(tokens, -1, 1)
    in_own = (ids_THK // own == heads_TH1).all().item()
    assert in_own != shape.shares_groups


@pytest.mark.parametrize("name", ["pkm", "peer"])
def test_gates_wait_for_the_reply_only_where_the_section_says_that_a_table_in_columns_replies(name: str):
    layer = built(SECTIONS[name])
    (shape,) = SECTIONS[name].banks(place("switchhead", d_model=D_MODEL))
    layer.get_submodule(shape.name).columns = 2
    recorder = OnlyPlans()
    with pytest.raises(Planned):
        forwarded(SECTIONS[name], layer, recorder)
    assert (recorder.routings[0].gates_NK is None) == shape.replies


@pytest.mark.parametrize("distinct", [None, 2])
@pytest.mark.parametrize("sharing", [False, True])
def test_the_banks_of_a_model_have_the_paths_of_its_modules_and_a_use_for_each_depth(
    distinct: int | None, sharing: bool
):
    config = model_config(
        num_layers=8,
        mixers=["switchhead", "attention"],
        feedforwards=["sigma_moe", "peer"] if distinct else ["sigma_moe", "pkm", "peer", "pkm"],
        dense_mlp=None,
        pkm=None if distinct else PKM | {"shared_values": sharing},
        peer=PEER | {"shared_experts": sharing and not distinct},
        distinct_layers=distinct,
    )
    banks, model = config.banks(), transformer(config)
    modules = {path: module for path, module in model.named_modules() if isinstance(module, ExpertBank)}
    assert {bank.path: bank.shape.num_groups for bank in banks} == {
        path: module.num_groups for path, module in modules.items()
    }
    for bank in banks:
        assert list(bank.uses) == uses_found(model, config, modules[bank.path])


def uses_found(model: Any, config: ModelConfig, bank: ExpertBank) -> list[str]:
    """By the modules: the path of the layer for each depth at which a layer holds the bank."""
    found = []
    for depth in range(config.num_layers):
        for part in ("mixer", "feedforward"):
            number = depth % len(model.layers)
            if any(module is bank for module in model.layers[number].get_submodule(part).modules()):
                found.append(f"layers.{number}.{part}")
    return found


def test_shared_tables_and_repeated_layers_are_used_several_times():
    """The test above compares with the modules; these are the lists themselves."""
    shared = model_config(
        num_layers=3, mixers=["attention"], feedforwards=["pkm"], switchhead=None, sigma_moe=None, dense_mlp=None,
        pkm=PKM | {"shared_values": True},
    )  # fmt: skip
    (table,) = shared.banks()
    assert table.path == "layers.0.feedforward.table"
    assert table.uses == ("layers.0.feedforward", "layers.1.feedforward", "layers.2.feedforward")
    repeated = model_config(
        num_layers=4, distinct_layers=2, feedforwards=["dense_mlp"], sigma_moe=None, dense_mlp={"hidden_dim": 4}
    )
    assert [(bank.path, bank.uses) for bank in repeated.banks()] == [
        ("layers.0.mixer.value_experts", ("layers.0.mixer", "layers.0.mixer")),
        ("layers.0.mixer.output_experts", ("layers.0.mixer", "layers.0.mixer")),
    ]
