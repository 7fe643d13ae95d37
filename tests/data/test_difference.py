"""What changed in the shards since a checkpoint: named, counted, and small in the checkpoint."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data.difference import MAX_LISTED, describe_changes, summarize
from data.index import open_index
from data.split import Source, TrainSplit, one_source

FIRST = [[[1, 2, 3], [4]], [[5, 6]], [[7, 8, 9]]]


@pytest.fixture
def saved(write_shards):
    """As a checkpoint gives it back."""
    return json.loads(json.dumps(summarize(one_source(open_index(write_shards(FIRST, name="train"))))))


def changes(saved, folder: Path) -> str:
    """The same set written elsewhere; its tars are called train-... as well."""
    for path in sorted(folder.iterdir()):
        path.rename(path.with_name(path.name.replace(folder.name, "train")))
    index = folder / "index.json"
    content = json.loads(index.read_text().replace(f"{folder.name}-", "train-"))
    del content["checksum"]
    from data.index import _checksum

    index.write_text(json.dumps(content | {"checksum": _checksum(content)}))
    return describe_changes(saved, one_source(open_index(folder)))


def test_a_new_shard_is_named_with_its_size(saved, write_shards):
    said = changes(saved, write_shards([*FIRST, [[10, 11], [12]]], name="other"))
    assert said.startswith("1 new: train-000003.tar (2 documents, 5 tokens)")
    assert "3 shards with 4 documents and 13 tokens became 4 with 6 and 18" in said


def test_a_shard_that_is_gone_is_named_with_its_size(saved, write_shards):
    said = changes(saved, write_shards(FIRST[:2], name="other"))
    assert said.startswith("1 gone: train-000002.tar (1 documents, 4 tokens)")


def test_an_altered_shard_is_named_with_both_sizes(saved, write_shards):
    said = changes(saved, write_shards([*FIRST[:2], [[7, 8, 9], [60]]], name="other"))
    assert said.startswith("1 altered: train-000002.tar (1 documents, 4 tokens became 2 documents, 6 tokens)")


def test_an_altered_byte_is_seen_where_the_sizes_stay(saved, write_shards):
    said = changes(saved, write_shards([FIRST[0], [[5, 7]], FIRST[2]], name="other"))
    assert said.startswith("1 altered: train-000001.tar (1 documents, 3 tokens became 1 documents, 3 tokens)")


def test_many_changes_are_counted_and_a_few_named(saved, write_shards):
    said = changes(saved, write_shards([*FIRST, *([[[n]] for n in range(1, 9)])], name="other"))
    assert "8 new: train-000003.tar" in said
    assert "train-000005.tar (1 documents, 2 tokens), ..." in said
    assert "train-000006.tar" not in said


def test_another_order_is_told_as_such(saved, write_shards):
    index = open_index(write_shards(FIRST, name="again"))
    old = json.loads(json.dumps(summarize(one_source(index))))
    assert (
        describe_changes(old, one_source(replace(index, shards=index.shards[::-1])))
        == "the same shards in another order"
    )


def test_the_source_that_changed_is_named(write_shards):
    index, other = open_index(write_shards(FIRST, name="a")), open_index(write_shards(FIRST[:2], name="b"))
    split = TrainSplit((Source("web", 1.0, index), Source("code", 1.0, index)))
    now = TrainSplit((Source("web", 1.0, index), Source("code", 1.0, other)))
    said = describe_changes(summarize(split), now)
    assert said.startswith("source code: ")
    assert "web" not in said


def test_a_huge_set_keeps_totals_only(write_shards):
    index = open_index(write_shards(FIRST))
    huge = replace(index, shards=index.shards * MAX_LISTED)
    (summary,) = summarize(one_source(huge))
    assert summary["shards"] is None
    assert len(json.dumps(summary)) < 200
    less = one_source(replace(huge, shards=huge.shards[1:]))
    assert "12288 shards with 16384 documents and 53248 tokens became 12287 with 16382 and 53242" in describe_changes(
        [summary], less
    )
    assert "some of the 12288 shards were altered" in describe_changes([summary], one_source(huge))


def test_the_largest_list_is_small_beside_a_checkpoint(write_shards):
    index = open_index(write_shards(FIRST))
    shards = tuple(replace(index.shards[0], name=f"train-{n:06d}.tar") for n in range(MAX_LISTED))
    assert len(json.dumps(summarize(one_source(replace(index, shards=shards))))) < 300_000
