"""The `model.hsm` section: what it refuses, each with one sentence, and the shifts it gives to the layers."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from model.hsm.config import HSMConfig
from tests.model.build import place
from tests.model.hsm.build import ALL


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_heads": 2}, r"num_heads .*variants multihead, multihead_matrix, .*variant is constant .*num_heads is 2: remove num_heads"),
        ({"variant": "matrix", "num_heads": 2}, "num_heads .*variant is matrix"),
        ({"head_shifts": "shared"}, "head_shifts .*variant is constant and head_shifts is shared"),
        ({"variant": "vector", "bias": False}, "bias .*variant is vector and bias is False: remove bias"),
        ({"variant": "matrix", "initial_a": 0.0}, "initial_a .*variant is matrix and initial_a is 0.0"),
        ({"variant": "matrix_scalar", "initial_a": 1.0}, "initial_a .*constant, vector, multihead, but variant is matrix_scalar"),
        ({"variant": "fusion", "hidden_dim": 4, "initial_b": 1.0}, "initial_b .*matrix_scalar, but variant is fusion"),
        ({"variant": "double_gate", "hidden_dim": 4}, "hidden_dim .*variants fusion, but variant is double_gate"),
        ({"variant": "single_gate", "activation": "relu"}, "activation .*variants fusion, but variant is single_gate"),
        ({"variant": "multihead"}, "variant multihead needs num_heads, but num_heads is null: add num_heads"),
        ({"variant": "multihead_matrix"}, "variant multihead_matrix needs num_heads"),
        ({"variant": "fusion"}, "variant fusion needs hidden_dim, but hidden_dim is null: add hidden_dim"),
        ({"wrap": "hold"}, "wrap is hold and num_shifts is null .*: set num_shifts or remove wrap"),
    ],
)  # fmt: skip
def test_a_setting_that_the_variant_does_not_use_or_lacks_is_one_sentence_with_the_remedy(
    settings: dict[str, Any], sentence: str
):
    with pytest.raises(ValidationError) as caught:
        HSMConfig.model_validate(settings)
    (error,) = caught.value.errors()
    assert re.search(sentence, error["msg"])
    assert "\n" not in error["msg"]


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"variant": "softmax"}, "variant"),
        ({"boundary": "roll"}, "boundary"),
        ({"num_shifts": 0}, "num_shifts"),
        ({"num_shifts": 2, "wrap": "stop"}, "wrap"),
        ({"hybrid_shift": "keep"}, "hybrid_shift"),
        ({"initial_a": float("nan")}, "initial_a"),
        ({"shifts": [1, 2]}, "shifts"),
    ],
)
def test_a_bad_field_is_one_error_at_its_own_place(settings: dict[str, Any], where: str):
    with pytest.raises(ValidationError) as caught:
        HSMConfig.model_validate(settings)
    (error,) = caught.value.errors()
    assert error["loc"] == (where,)


@pytest.mark.parametrize("settings", ALL.values(), ids=ALL)
def test_every_variant_is_read_again_from_its_own_values(settings: dict[str, Any]):
    config = HSMConfig.model_validate(settings)
    assert HSMConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_shift_of_a_whole_row_or_more_is_refused_with_the_number_of_shifts_that_fits():
    mixers = ("attention", *["hsm"] * 9)
    skip = HSMConfig(hybrid_shift="skip")
    with pytest.raises(ValueError, match=r"layer 9 .*shifts by 512") as caught:
        skip.check_length(512, mixers)
    assert str(caught.value) == (
        "every shift must be below data.sequence_length, but layer 9 of model.mixers shifts by 512 and data.sequence_length is 512: "
        "set model.hsm.num_shifts to 9 or less, or raise data.sequence_length above 512"
    )
    skip.check_length(513, mixers)
    HSMConfig(hybrid_shift="skip", num_shifts=9).check_length(512, mixers)
    HSMConfig(hybrid_shift="compress").check_length(512, mixers)


def test_the_check_of_the_length_counts_the_shifts_of_every_head_and_of_no_other_mixer():
    mixers = ("hsm", "hsm", "attention", "attention")
    shared = HSMConfig(variant="multihead", num_heads=2, hybrid_shift="skip")
    own = HSMConfig(variant="multihead", num_heads=2, hybrid_shift="skip", head_shifts="own")
    with pytest.raises(ValueError, match=r"layer 1 .*shifts by 4 .*num_shifts to 2 or less"):
        own.check_length(4, mixers)
    own.check_length(5, mixers)
    shared.check_length(3, mixers)


def test_a_row_of_one_token_has_no_shift_at_all():
    with pytest.raises(ValueError, match=r"sequence_length is 1: raise data\.sequence_length above 1$"):
        HSMConfig().check_length(1, ("hsm",))


def test_heads_have_one_shift_together_unless_they_have_their_own():
    mixers = ("hsm",) * 4
    assert HSMConfig(variant="multihead", num_heads=3).shifts(mixers, depth=2) == (4,)
    assert HSMConfig(variant="multihead", num_heads=3, head_shifts="own").shifts(mixers, depth=2) == (4, 8, 1)
    held = HSMConfig(variant="multihead", num_heads=3, head_shifts="own", wrap="hold", num_shifts=3)
    assert held.shifts(mixers, depth=2) == (4, 4, 4)


def test_the_section_has_no_experts_no_memory_and_nothing_for_the_log():
    config = HSMConfig()
    assert config.banks(place("hsm")) == []
    assert (config.expert_widths(8), config.notes(), config.num_memory_blocks()) == (set(), [], 0)
