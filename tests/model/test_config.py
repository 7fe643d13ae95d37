"""The `model` section: what it refuses, each with one sentence, and how its patterns spread over the depth."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from tests.model.build import model_config

SWITCHHEAD = {"num_heads": 2, "head_dim": 4, "num_experts": 3, "top_k": 2}
SIGMA_MOE = {"num_experts": 5, "expert_dim": 4, "top_k": 2}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        pytest.param({"switchhead": SWITCHHEAD | {"top_k": 4}}, "top_k .*num_experts.* 4 .* 3: lower top_k", id="switchhead_k"),
        pytest.param({"sigma_moe": SIGMA_MOE | {"top_k": 6}}, "top_k .*num_experts.* 6 .* 5: lower top_k", id="sigma_moe_k"),
        pytest.param({"switchhead": None}, r"mixers names switchhead, .*model\.switchhead is missing: add it", id="missing_mixer"),
        pytest.param({"sigma_moe": None}, r"feedforwards names sigma_moe, .*model\.sigma_moe is missing: add", id="missing_mlp"),
        pytest.param(
            {"mixers": ["switchhead"]},
            r"model\.attention is given, but mixers is \['switchhead'\]: remove .*attention.* or name attention in model\.mixers",
            id="unused_mixer",
        ),
        pytest.param(
            {"feedforwards": ["dense_mlp"]},
            r"model\.sigma_moe is given, but feedforwards is \['dense_mlp'\]: remove .* or name sigma_moe in model\.feedforwards",
            id="unused_mlp",
        ),
        pytest.param({"num_layers": 1}, "mixers .*longer.* 2 entries .*num_layers is 1: shorten mixers or raise num_layers", id="depth"),
        pytest.param(
            {"feedforwards": ["sigma_moe", "dense_mlp", "dense_mlp"]},
            "feedforwards .*longer.* 3 entries .*num_layers is 2: shorten feedforwards or raise",
            id="depth_mlp",
        ),
    ],
)  # fmt: skip
def test_a_clash_inside_the_section_is_one_sentence_with_both_values_and_the_remedy(
    changes: dict[str, Any], sentence: str
):
    with pytest.raises(ValidationError) as caught:
        model_config(**changes)
    (error,) = caught.value.errors()
    assert re.search(sentence, error["msg"])
    assert "\n" not in error["msg"]


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"mixer": ["attention"]}, ("mixer",)),
        ({"attention": {"num_heads": 2, "head_dim": 6, "bias": True}}, ("attention", "bias")),
        ({"attention": {"num_heads": 0, "head_dim": 6}}, ("attention", "num_heads")),
        ({"dense_mlp": {"hidden_dim": -1}}, ("dense_mlp", "hidden_dim")),
        ({"vocab_size": 0}, ("vocab_size",)),
        ({"mixers": []}, ("mixers",)),
        ({"feedforwards": []}, ("feedforwards",)),
        ({"mixers": ["switchhead", "mamba"]}, ("mixers",)),
        ({"dropout": 1.0}, ("dropout",)),
        ({"dropout": -0.1}, ("dropout",)),
        ({"switchhead": SWITCHHEAD | {"expert_dropout": 1.0}}, ("switchhead", "expert_dropout")),
        ({"switchhead": SWITCHHEAD | {"positions": "alibi"}}, ("switchhead", "positions")),
        ({"sigma_moe": SIGMA_MOE | {"entropy_weight": -1e-4}}, ("sigma_moe", "entropy_weight")),
        ({"sigma_moe": SIGMA_MOE | {"router": "nearest"}}, ("sigma_moe", "router")),
    ],
)
def test_a_bad_field_is_one_error_at_its_own_place(changes: dict[str, Any], where: tuple[str | int, ...]):
    with pytest.raises(ValidationError) as caught:
        model_config(**changes)
    (error,) = caught.value.errors()
    assert error["loc"] == where


def test_values_never_change_after_reading():
    with pytest.raises(ValidationError, match="frozen"):
        model_config().dropout = 0.5  # type: ignore[misc]


def test_the_patterns_of_mixers_and_feedforwards_repeat_over_the_depth_on_their_own():
    config = model_config(num_layers=5, mixers=["switchhead", "switchhead", "attention"])
    switchhead, attention, sigma_moe, dense_mlp = (
        config.switchhead,
        config.attention,
        config.sigma_moe,
        config.dense_mlp,
    )
    assert config.mixer_sections() == [switchhead, switchhead, attention, switchhead, switchhead]
    assert config.feedforward_sections() == [sigma_moe, dense_mlp, sigma_moe, dense_mlp, sigma_moe]


def test_the_smallest_bank_counts_groups_per_head_in_attention_and_experts_in_the_mlp():
    dense = model_config(mixers=["attention"], feedforwards=["dense_mlp"], switchhead=None, sigma_moe=None)
    assert dense.smallest_bank() is None
    assert model_config().smallest_bank() == 5
    assert model_config(sigma_moe=SIGMA_MOE | {"num_experts": 7}).smallest_bank() == 6


def test_expert_widths_are_the_widths_of_every_expert_matmul():
    dense = model_config(mixers=["attention"], feedforwards=["dense_mlp"], switchhead=None, sigma_moe=None)
    assert dense.expert_widths() == set()
    changed = model_config(switchhead=SWITCHHEAD | {"head_dim": 10}, sigma_moe=SIGMA_MOE | {"expert_dim": 24})
    assert changed.expert_widths() == {8, 10, 24}
