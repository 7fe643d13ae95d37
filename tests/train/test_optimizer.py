"""The schedule's values and which parameters decay."""

import math

import pytest
import torch

from model.config import ModelConfig
from model.parameters import logical_parameters, materialize
from model.transformer import Transformer
from train.config import OptimConfig
from train.optimizer import build_optimizer, learning_rate, parameter_groups


def optim(**values) -> OptimConfig:
    return OptimConfig.model_validate({"lr": 0.8, "warmup_steps": 4, **values})


def test_the_warmup_rises_linearly_to_the_peak():
    assert [learning_rate(step, optim(), num_steps=100) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_the_cosine_goes_through_half_and_ends_at_the_floor():
    config = optim(min_lr_ratio=0.1)
    rates = [learning_rate(step, config, num_steps=104) for step in range(4, 105)]
    assert rates[0] == pytest.approx(0.8)
    assert rates[50] == pytest.approx(0.8 * (0.1 + 0.9 * 0.5))
    assert rates[100] == pytest.approx(0.08)
    expected = [0.8 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 100)) / 2) for i in range(101)]
    assert rates == pytest.approx(expected)


def test_a_constant_schedule_stays_at_the_peak():
    assert {learning_rate(step, optim(schedule="constant"), num_steps=10) for step in range(4, 10)} == {0.8}


@pytest.mark.parametrize("router", ["sigmoid", "noisy", "recurrent"])
def test_routers_norms_and_biases_never_decay_and_no_parameter_is_left_out(router: str):
    config = ModelConfig.model_validate(
        {
            "d_model": 8,
            "num_layers": 2,
            "mixers": ["switchhead"],
            "feedforwards": ["sigma_moe", "dense_mlp"],
            "switchhead": {"num_heads": 1, "head_dim": 4, "num_experts": 2, "top_k": 1},
            "sigma_moe": {"num_experts": 3, "expert_dim": 4, "top_k": 2, "router": router},
            "dense_mlp": {"hidden_dim": 6},
        }
    )
    model = Transformer(config, vocab_size=11, backend="reference")
    materialize(model, seed=1)
    decay, no_decay = parameter_groups(model, weight_decay=0.1)
    names = {id(parameter.tensor): parameter.name for parameter in logical_parameters(model)}
    decaying, others = ({names[id(p)] for p in group["params"]} for group in (decay, no_decay))
    assert decaying | others == set(names.values())
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    for name in names.values():
        spared = any(part in name for part in ("router", "norm", "noise", "recurrence")) or name.endswith("bias")
        assert (name in others) == spared, name
    (everything,) = parameter_groups(model, weight_decay=0.0)
    assert len(everything["params"]) == len(names)


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_the_optimizer_gets_the_configs_values(name, kind):
    group = {"name": "decay", "params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": 0.3}
    own = {"betas": [0.7, 0.8], "eps": 1e-5} if name == "adamw" else {}
    optimizer = build_optimizer([group], optim(optimizer=name, **own))
    assert type(optimizer) is kind
    settings = optimizer.param_groups[0]
    assert (settings["lr"], settings["weight_decay"]) == (0.8, 0.3)
    if name == "adamw":
        assert (settings["betas"], settings["eps"]) == ((0.7, 0.8), 1e-5)
