"""The `data` section: what it accepts, and the sentence that each clash with the processes gets."""

import pytest
from pydantic import ValidationError

from data.config import DataConfig, SourceConfig, check_layout


def make_config(**changes: object) -> DataConfig:
    values: dict[str, object] = {
        "shards": "train",
        "heldout": "heldout",
        "sequence_length": 8,
        "global_batch_size": 12,
        "streams": 12,
    }
    return DataConfig(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["auto", True, False])
def test_document_mask_is_auto_true_or_false(value):
    assert make_config(document_mask=value).document_mask == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("document_mask", "always"),
        ("sequence_length", 0),
        ("global_batch_size", 0),
        ("streams", 0),
        ("num_workers", -1),
        ("max_skipped_shards", -1),
        ("cache_gb", 0.0),
        ("shards", []),
        ("shards", 3),
        ("shards", [{"name": "a", "shards": "x"}]),
        ("shards", [{"name": "a", "shards": "", "weight": 1.0}]),
        ("shards", [{"name": "a", "shards": "x", "weight": 0.0}]),
        ("shards", [{"name": "a", "shards": "x", "weight": float("nan")}]),
        ("shards", [{"name": "a", "shards": "x", "weight": 1.0, "share": 2}]),
        ("shards", ""),
        ("sequence_lenght", 8),
    ],
)
def test_an_impossible_value_or_unknown_key_is_refused(name, value):
    with pytest.raises(ValidationError, match=name):
        make_config(**{name: value})


def test_every_field_is_described():
    assert all(field.description for kind in (DataConfig, SourceConfig) for field in kind.model_fields.values())


def source(name: str = "a", weight: float = 1.0, shards: str = "x") -> dict[str, object]:
    return {"name": name, "shards": shards, "weight": weight}


def test_a_path_and_a_list_of_sources_read_back_equal():
    for shards in ("train", [source("web", 0.7), source("code", 0.3)]):
        config = make_config(shards=shards)
        assert config.model_dump(mode="json")["shards"] == shards
        assert DataConfig.model_validate_json(config.model_dump_json(), strict=True) == config
    assert [s.shards for s in make_config().sources] == ["train"]


ODD_ADDRESSES = [
    "https://exämple.com/x",
    "https://host/ä",
    "https://host/a b",
    "https://host:port/x",
    "https://host:99999/x",
    "https:///x",
    "http://[::1/x",
    "https://me:secret@host/x",
    "https://host/x#part",
]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"shards": [source("web"), source("web")]}, ["name of its own", "two are web", "rename"]),
        ({"shards": [source("a/b")]}, ["letters, digits", "'a/b'"]),
        (
            {"shards": [source("web", 1.0), source("tiny", 0.0009)]},
            ["at least 1/1024 of their sum", "tiny is 0.0009", "1.0009"],
        ),
        ({"shards": "https://host/x"}, ["data.shards is https://host/x", "data.cache is null", "set data.cache"]),
        ({"heldout": "http://host/x"}, ["data.heldout is http://host/x", "data.cache is null"]),
        ({"shards": [source("web", shards="http://host/x")]}, ["data.shards (web) is http://host/x", "data.cache"]),
        (
            {"shards": "pipe:cat x/{}", "cache": "c"},
            ["data.allow_pipe is true", "pipe:cat x/{}", "data.allow_pipe is false", "set data.allow_pipe"],
        ),
        ({"shards": "pipe:cat x", "cache": "c", "allow_pipe": True}, ["must have {}", "pipe:cat x", "add {}"]),
        ({"shards": "s3://bucket/x", "cache": "c"}, ["s3://bucket/x", "pipe:COMMAND"]),
        *(
            ({"shards": place, "cache": "c"}, ["must be an address as https://host:port/folder", place, "%XX"])
            for place in ODD_ADDRESSES
        ),
        ({"shards": [source("a", 1e308), source("b", 1e308), source("c", 1.0)]}, ["at least 1/1024", "the sum is inf"]),
        ({"cache": "c"}, ["data.cache is for remote shards", "is c", "remove data.cache"]),
    ],
)
def test_sources_and_places_that_cannot_be_are_one_sentence(changes, parts):
    with pytest.raises(ValidationError) as error:
        make_config(**changes)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": "https://host/x", "cache": "c"},
        {"shards": "pipe:cat x/{}", "cache": "c", "allow_pipe": True},
        {"shards": [source("a", 1.0), source("b", 0.000978)]},
        {"shards": "https://xn--exmple-cua.com:8080/%C3%A4/?key=a%2Fb&x=1", "cache": "c"},
        {"shards": "http://[::1]:80/x", "cache": "c"},
        {"heldout": "http://host/x", "cache": "c", "cache_gb": 0.5},
        {"allow_pipe": True},
    ],
)
def test_remote_places_pass_with_what_they_need(changes):
    make_config(**changes)


@pytest.mark.parametrize(("accumulation_steps", "num_ranks"), [(1, 1), (1, 4), (2, 6), (3, 4), (12, 1)])
def test_a_layout_that_deals_rows_and_streams_evenly_passes(accumulation_steps, num_ranks):
    check_layout(make_config(), accumulation_steps=accumulation_steps, num_ranks=num_ranks)


@pytest.mark.parametrize(
    ("changes", "accumulation_steps", "num_ranks", "names_and_values"),
    [
        ({}, 5, 1, ["optim.accumulation_steps", "data.global_batch_size", "5", "12"]),
        ({}, 1, 8, ["8 processes", "data.streams", "12"]),
        ({"streams": 24}, 3, 8, ["8 processes", "12 / 3 = 4 rows"]),
    ],
)
def test_an_uneven_layout_is_one_sentence_with_both_values(changes, accumulation_steps, num_ranks, names_and_values):
    with pytest.raises(ValueError, match="must divide") as error:
        check_layout(make_config(**changes), accumulation_steps=accumulation_steps, num_ranks=num_ranks)
    for text in names_and_values:
        assert text in str(error.value)
