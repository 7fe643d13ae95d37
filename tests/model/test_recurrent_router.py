"""RMoE's router: the gated recurrent unit, one for all layers, and its state on the way through the depth."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.feedforward_config import SigmaMoEConfig
from model.parameters import count_parameters, logical_parameters, materialize
from model.recurrent_router import Recurrence, RecurrentRouter
from model.section import Place
from tests.model.build import context, model_config, normal, tokens, transformer

DIM, EXPERTS = 7, 5
SETTINGS = {"num_experts": EXPERTS, "expert_dim": 4, "top_k": 2, "router": "recurrent", "router_dim": DIM}


def layers(number: int) -> list[Any]:
    """Of one model: they share the place's modules. Biases off their initial zeros."""
    shared: dict[str, torch.nn.Module] = {}
    kinds = ("attention",) * number
    places = [Place(6, number, depth, kinds, "reference", 0.0, shared) for depth in range(number)]
    built = torch.nn.ModuleList([SigmaMoEConfig.model_validate(SETTINGS).build(place) for place in places])
    materialize(built, seed=5, dtype=torch.float64)
    with torch.no_grad():
        for number, (name, value) in enumerate(built.named_parameters()):
            if "bias" in name:
                value += normal(*value.shape, seed=number)
    return list(built)


def cell_of(router: RecurrentRouter) -> torch.nn.GRUCell:
    """torch's own unit with the router's weights."""
    cell, own = torch.nn.GRUCell(DIM, DIM).double(), router.recurrence
    with torch.no_grad():
        for theirs, mine in (("ih", "input"), ("hh", "state")):
            getattr(cell, f"weight_{theirs}").copy_(own.get_parameter(f"{mine}_weight"))
            getattr(cell, f"bias_{theirs}").copy_(own.get_parameter(f"{mine}_bias"))
    return cell


def test_state_and_logits_are_those_of_torchs_unit_from_layer_to_layer():
    stack, x_TD = layers(3), normal(8, 6)
    cell, carry_TX, state_TX = cell_of(stack[0].router), None, torch.zeros(8, DIM, dtype=torch.float64)
    for layer in stack:
        logits_T1E, carry_TX = layer.router(x_TD, carry_TX)
        state_TX = cell(x_TD @ layer.router.input_weight.T, state_TX)
        torch.testing.assert_close(carry_TX, state_TX, rtol=0, atol=1e-13)
        torch.testing.assert_close(logits_T1E[:, 0], state_TX @ layer.router.weight.T, rtol=0, atol=1e-13)


def test_without_update_gate_and_state_it_is_a_router_of_two_layers_without_memory():
    first, second = layers(2)
    unit, x_TD = first.router.recurrence, normal(8, 6)
    with torch.no_grad():
        unit.state_weight.zero_()
        unit.state_bias.zero_()
        unit.input_weight[DIM : 2 * DIM] = 0
        unit.input_bias[DIM : 2 * DIM] = -1000.0  # z = 0
        unit.input_bias[2 * DIM :] = 0
    _, carry_TX = first.router(x_TD, None)
    expected = torch.tanh(x_TD @ second.router.input_weight.T @ unit.input_weight[2 * DIM :].T) @ second.router.weight.T
    for carried in (carry_TX, None):
        torch.testing.assert_close(second.router(x_TD, carried)[0][:, 0], expected, rtol=0, atol=1e-13)


def test_gradients_flow_through_the_state_into_every_layer_below():
    first, second = layers(2)
    names, values = zip(*[*first.router.named_parameters(), *second.router.named_parameters()], strict=True)

    def logits(x_TD: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        own = dict(zip(names[:6], parameters[:6], strict=True)), dict(zip(names[6:], parameters[6:], strict=True))
        below = torch.func.functional_call(first.router, own[0], (x_TD, None))
        above = torch.func.functional_call(second.router, own[1], (x_TD, below.state_TX))
        return below.logits_T1E, above.logits_T1E

    leaves = [value.detach().clone().requires_grad_() for value in (normal(3, 6), *values)]
    assert torch.autograd.gradcheck(logits, leaves)


def config(**changes: Any) -> Any:
    only = {"mixers": ["attention"], "feedforwards": ["sigma_moe"], "switchhead": None, "dense_mlp": None}
    return model_config(**(only | {"num_layers": 3, "sigma_moe": SETTINGS} | changes))


def test_a_model_has_one_unit_and_each_layer_two_projections_of_its_own():
    model = transformer(config())
    names = [parameter.name for parameter in logical_parameters(model) if "router" in parameter.name]
    unit = [f"layers.0.feedforward.router.recurrence.{a}_{b}" for a in ("input", "state") for b in ("weight", "bias")]
    own = [f"layers.{depth}.feedforward.router.{name}" for depth in range(3) for name in ("input_weight", "weight")]
    assert sorted(names) == sorted(unit + own)
    plain = transformer(config(sigma_moe=SETTINGS | {"router": "sigmoid", "router_dim": None}))
    more = 3 * (DIM * 8 + DIM * EXPERTS - 8 * EXPERTS) + 6 * DIM * DIM + 6 * DIM
    assert count_parameters(model) - count_parameters(plain) == more


def test_the_transformer_carries_the_state_from_layer_to_layer_also_past_other_feed_forwards():
    model = transformer(
        config(
            num_layers=5,
            feedforwards=["sigma_moe", "dense_mlp", "sigma_moe", "sigma_moe", "dense_mlp"],
            dense_mlp={"hidden_dim": 12},
        )
    )
    given, made = [], []
    for depth in (0, 2, 3):
        router = model.layers[depth].feedforward.router
        router.register_forward_hook(
            lambda _module, inputs, scored: (given.append(inputs[1]), made.append(scored.state_TX))[0]
        )
    model(tokens(2, 5), context(2))
    assert given[0] is None
    assert given[1] is made[0]
    assert given[2] is made[1]


@pytest.mark.parametrize("distinct_layers", [None, 1])
def test_recompute_gives_the_same_gradients(distinct_layers: int | None):
    gradients = []
    for recompute in (False, True):
        model = transformer(config(recompute=recompute, distinct_layers=distinct_layers)).train()
        output = model(tokens(2, 5), context(2))
        (output.logits_BSV.square().sum() + output.auxiliary_loss).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_the_weights_of_the_recurrence_start_with_the_standard_deviation_of_its_width():
    recurrence = Recurrence(64)
    materialize(recurrence, seed=1)
    for weight in (recurrence.input_weight, recurrence.state_weight):
        assert weight.std().item() == pytest.approx(1 / 8, rel=0.03)
