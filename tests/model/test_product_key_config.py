"""The sections model.pkm and model.peer: refusals with their remedies, banks, notes, published sizes."""

from typing import Any

import pytest
from pydantic import ValidationError

from model.parameters import count_parameters
from model.product_key_config import PEERConfig, PKMConfig
from model.section import Place
from tests.model.build import model_config, place

PEER = {"num_experts": 16, "num_heads": 2, "top_k": 3, "key_dim": 4}
PKM = {"num_keys": 4, "num_heads": 2, "top_k": 3}
ONE_PICK = "the softmax over one pick is always 1, so queries and keys keep their first values"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_experts": 1000}, "num_experts must be a square.* but is 1000: write 961 or 1024"),
        ({"top_k": 17}, "top_k must be at most num_experts, but top_k is 17 and num_experts is 16: lower top_k"),
        ({"key_dim": 3}, "multiple of 2"),
        ({"scores": "tanh"}, "softmax"),
    ],
)
def test_bad_settings_of_peer_are_refused_with_the_remedy(changes: dict[str, Any], sentence: str):
    with pytest.raises(ValidationError, match=sentence):
        PEERConfig.model_validate(PEER | changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"top_k": 17}, r"top_k must be at most the number of values num_keys\^2, but top_k is 17 and num_keys is 4"),
        ({"shared_keys": True}, "heads must differ by their query or by their keys.* set key_dim"),
        ({"top_k": None, "shared_values": True}, "shared_values is about a table that is looked up.* set top_k"),
        ({"key_dim": 5}, "multiple of 2"),
    ],
)
def test_bad_settings_of_pkm_are_refused_with_the_remedy(changes: dict[str, Any], sentence: str):
    with pytest.raises(ValidationError, match=sentence):
        PKMConfig.model_validate(PKM | changes)


def test_an_odd_input_cannot_be_a_query():
    with pytest.raises(ValueError, match=r"pkm\.key_dim is null and d_model is 7: set an even key_dim"):
        PKMConfig(num_keys=4, top_k=3).build(place("attention", d_model=7))


def test_tables_are_banks_and_the_values_of_the_dense_form_are_not():
    here = place("attention", d_model=8)
    assert [bank.num_groups for bank in PKMConfig(num_keys=4, top_k=3).banks(here)] == [16]
    assert PKMConfig(num_keys=4, top_k=None).banks(here) == []
    assert [bank.num_groups for bank in PEERConfig.model_validate(PEER).banks(here)] == [16]
    assert PEERConfig.model_validate(PEER).expert_widths(8) == set()


def test_one_pick_under_softmax_is_noted():
    assert PKMConfig(num_keys=4, top_k=1).notes() == [f"model.pkm: {ONE_PICK}"]
    assert PKMConfig(num_keys=4, top_k=1, scores="relu").notes() == []
    assert PEERConfig.model_validate(PEER | {"top_k": 1}).notes() == [f"model.peer: {ONE_PICK}"]
    assert PEERConfig.model_validate(PEER).notes() == []


def test_a_model_names_them_like_any_other_feedforward():
    model = model_config(feedforwards=["pkm", "peer"], sigma_moe=None, dense_mlp=None, pkm=PKM, peer=PEER)
    assert model.smallest_bank() == 6  # the attention's
    assert [type(section) for section in model.feedforward_sections()] == [PKMConfig, PEERConfig]


@pytest.mark.parametrize(("num_keys", "d_model", "count"), [(62, 412, 1_686_000), (89, 1024, 8_476_000)])
def test_the_parameter_matched_pkm_of_the_paper_has_its_count(num_keys: int, d_model: int, count: int):
    """arXiv 2310.10837 (specs, section 3): 3844 and 7921 values."""
    layer = PKMConfig(num_keys=num_keys, top_k=None).build(place("attention", d_model=d_model))
    assert count_parameters(layer) == pytest.approx(count, rel=1e-3)


def test_the_published_peer_has_its_count():
    config = PEERConfig(num_experts=1024**2, num_heads=8, top_k=16, key_dim=128)
    here = Place(1024, 12, 5, ("attention",) * 12, "reference", 0.0)
    layer, (bank,) = config.build(here), config.banks(here)
    tables, keys, queries, norm = 2**31, 1024 * 128, 1024 * 8 * 128, 2 * 8 * 128
    assert count_parameters(layer) == tables + keys + queries + norm
    assert (bank.num_groups, bank.group_numel, config.num_keys) == (1024**2, 2 * 1024, 1024)
