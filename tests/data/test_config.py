"""The `data` section: what it accepts, and the sentence that each clash with the processes gets."""

import pytest
from pydantic import ValidationError

from data.config import DataConfig, check_layout


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
        ("shards", ""),
        ("sequence_lenght", 8),
    ],
)
def test_an_impossible_value_or_unknown_key_is_refused(name, value):
    with pytest.raises(ValidationError, match=name):
        make_config(**{name: value})


def test_every_field_is_described():
    assert all(field.description for field in DataConfig.model_fields.values())


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
