"""The sections of the two attentions: what they refuse, each with one sentence, and what they tell the rest of the system."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from model.attention_config import AttentionConfig, SwitchHeadConfig
from tests.model.build import place

DENSE: dict[str, Any] = {"num_heads": 4, "head_dim": 8}
SWITCHHEAD: dict[str, Any] = {"num_heads": 2, "head_dim": 8, "num_experts": 3, "top_k": 2}
ONE: dict[str, Any] = SWITCHHEAD | {"num_experts": 1, "top_k": 1}


def refusal(kind: Any, settings: dict[str, Any]) -> Any:
    with pytest.raises(ValidationError) as caught:
        kind(**settings)
    (error,) = caught.value.errors()
    assert "\n" not in error["msg"]
    return error


@pytest.mark.parametrize("kind", [AttentionConfig, SwitchHeadConfig])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rotary_dim": 3}, "rotary_dim .*even.* is 3 and head_dim is 8: write null"),
        ({"rotary_dim": 10}, "rotary_dim .*head_dim.* is 10 and head_dim is 8: write null"),
        ({"rotary_dim": 0}, "rotary_dim .*between 2 .* is 0 and"),
        ({"rotary_dim": 4, "positions": "xl"}, "rotary_dim is for rope, .* positions is xl .* 4: set rotary_dim to null"),
        ({"rotary_dim": 4, "positions": "none"}, "rotary_dim is for rope, .* positions is none .* 4: set rotary_dim to null"),
        ({"head_dim": 3}, "head_dim is 3 and rotary_dim is null: raise head_dim to 4"),
        ({"attend_top_k": 0}, "at least 1, but it is 0: raise it, or write null"),
        ({"attend_top_k": -1}, "at least 1, but it is -1: raise it, or write null"),
        ({"attend_chunk": 0}, "at least 1, but it is 0: raise it, or write null"),
    ],
)  # fmt: skip
def test_what_both_attentions_refuse(kind: Any, changes: dict[str, Any], sentence: str):
    base = DENSE if kind is AttentionConfig else SWITCHHEAD
    assert re.search(sentence, refusal(kind, base | changes)["msg"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("positions", "sinusoid"),
        ("memory_blocks", -1),
        ("attention_dropout", 1.0),
        ("attend_chunk", 0),
        ("attend_top_k", 0),
        ("num_kv_heads", 0),
    ],
)
def test_a_bad_field_is_named(field: str, value: Any):
    assert refusal(AttentionConfig, DENSE | {field: value})["loc"] == (field,)


@pytest.mark.parametrize("heads", [3, 8])
def test_heads_of_k_and_v_must_divide_those_of_q(heads: int):
    sentence = f"num_kv_heads is {heads} and num_heads is 4: set num_kv_heads to a divisor"
    assert sentence in refusal(AttentionConfig, DENSE | {"num_kv_heads": heads})["msg"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (SWITCHHEAD | {"top_k": 4}, "top_k is 4 and num_experts is 3: lower top_k"),
        (SWITCHHEAD | {"experts": ("v", "v")}, r"experts .*once, .*\['v', 'v'\]: leave out"),
        (SWITCHHEAD | {"gates": "softmax", "top_k": 1}, "gates is softmax and top_k is 1, .*: raise top_k or set gates"),
        (SWITCHHEAD | {"single_expert": "gate_both"}, "single_expert is gate_both and num_experts is 3: set single_expert to null"),
        (SWITCHHEAD | {"single_expert": "gate_output"}, "single_expert is gate_output and num_experts is 3: set single_expert to null"),
        (ONE | {"entropy_weight": 0.1}, "entropy_weight is 0.1 and num_experts is 1: set entropy_weight to 0"),
        (ONE | {"single_expert": "gate_output", "experts": ("v",)}, "experts is .* single_expert is gate_output: remove experts"),
        (ONE | {"single_expert": "gate_output", "routers": "shared"}, "routers is shared and single_expert is gate_output"),
        (ONE | {"single_expert": "gate_output", "expert_dropout": 0.1}, "expert_dropout .* is 0.1 and top_k is num_experts"),
    ],
)  # fmt: skip
def test_what_switchhead_refuses(settings: dict[str, Any], sentence: str):
    assert re.search(sentence, refusal(SwitchHeadConfig, settings)["msg"])


@pytest.mark.parametrize("experts", [(), ("x", "v")])
def test_the_projections_that_are_experts_are_some_of_the_four(experts: tuple[str, ...]):
    assert refusal(SwitchHeadConfig, SWITCHHEAD | {"experts": experts})["loc"][0] == "experts"


@pytest.mark.parametrize(
    ("head_dim", "width"), [(41, 20), (64, 32), (76, 38), (82, 40), (100, 50), (112, 56), (205, 102), (10, 4), (4, 2)]
)
def test_half_of_the_channels_rounded_down_to_even_are_rotated_by_default(head_dim: int, width: int):
    assert AttentionConfig(num_heads=1, head_dim=head_dim).rotary_width() == width


def test_a_width_that_came_out_odd_is_noted_and_no_other():
    (note,) = AttentionConfig(num_heads=1, head_dim=82).notes()
    assert "rotary_dim is 40" in note
    assert "head_dim 82 is 41" in note
    quiet = [{"head_dim": 41}, {"head_dim": 82, "rotary_dim": 40}, {"head_dim": 82, "positions": "xl"}]
    assert [AttentionConfig(num_heads=1, **settings).notes() for settings in quiet] == [[], [], []]


def test_an_explicit_width_is_taken_and_other_positions_rotate_nothing():
    assert AttentionConfig(**DENSE, rotary_dim=8).rotary_width() == 8
    assert AttentionConfig(num_heads=1, head_dim=2, rotary_dim=2).rotary_width() == 2
    assert AttentionConfig(**DENSE, positions="xl").rotary_width() == 0
    assert AttentionConfig(num_heads=1, head_dim=1, positions="none").rotary_width() == 0


def test_more_kept_keys_than_a_row_and_its_memory_have_are_refused():
    config = AttentionConfig(**DENSE, attend_top_k=17, memory_blocks=1)
    config.check_length(9, ("attention",))
    with pytest.raises(ValueError, match=r"attend_top_k is 17 and a row of 8 .* has 16: lower attend_top_k"):
        config.check_length(8, ("attention",))


def test_every_expert_projection_has_a_bank():
    here = place("switchhead", d_model=24)

    def groups(**settings: Any) -> list[int]:
        return [bank.num_groups for bank in SwitchHeadConfig(**settings).banks(here)]

    assert groups(**SWITCHHEAD) == [6, 6]
    assert groups(**SWITCHHEAD, experts=("k",)) == [6]
    assert groups(**SWITCHHEAD, experts=("q", "k", "v", "o")) == [6] * 4
    assert groups(**ONE) == [2, 2]
    assert SwitchHeadConfig(**SWITCHHEAD).expert_widths(24) == {8, 24}
    without = SwitchHeadConfig(**ONE, single_expert="gate_output")
    assert (without.banks(here), without.expert_widths(24)) == ([], set())


@pytest.mark.parametrize(
    ("experts", "routers", "expected"),
    [
        ("vo", "side", {"value": "value", "output": "output"}),
        ("qkvo", "side", {"value": "value", "key": "value", "output": "output", "query": "output"}),
        ("kq", "side", {"key": "key", "query": "query"}),
        ("vko", "separate", {"value": "value", "key": "key", "output": "output"}),
        ("vo", "shared", {"value": "value", "output": "value"}),
        ("qo", "shared", {"output": "output", "query": "output"}),
        ("qk", "shared", {"key": "key", "query": "key"}),
    ],
)
def test_which_projections_share_a_router(experts: str, routers: Any, expected: dict[str, str]):
    config = SwitchHeadConfig.model_validate(SWITCHHEAD | {"experts": list(experts), "routers": routers})
    assert config.router_of() == expected


def test_memory_blocks_are_told():
    assert AttentionConfig(**DENSE).num_memory_blocks() == 0
    assert SwitchHeadConfig(**SWITCHHEAD, memory_blocks=2).num_memory_blocks() == 2
