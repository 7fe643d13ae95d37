"""Opening a folder of shards: what is recorded, and one sentence for every way in which it can be wrong."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from data.index import INDEX_FILE, check_tokenizer, main, open_index, verify_shards
from data.reader import LineReader
from data.tokenizer import train_bpe
from tests.data.index_by_hand import rewrite_index


@pytest.fixture
def folder(write_shards, random_shards) -> Path:
    return write_shards(random_shards)


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_the_index_counts_what_was_written(folder, random_shards):
    index = open_index(folder)
    documents = [document for shard in random_shards for document in shard]
    assert index.num_documents == len(documents)
    assert index.num_tokens == sum(len(document) + 1 for document in documents)
    assert [shard.documents for shard in index.shards] == [len(shard) for shard in random_shards]
    assert (index.vocab_size, index.end_token, index.token_bytes_V.tolist()) == (257, 0, [0] + [1] * 256)
    verify_shards(index)


def test_the_fingerprint_follows_the_documents_and_not_the_place(write_shards, random_shards):
    index = open_index(write_shards(random_shards))
    assert open_index(write_shards(random_shards, name="copy")).fingerprint == index.fingerprint
    assert open_index(write_shards(random_shards[::-1], name="other_order")).fingerprint != index.fingerprint
    changed = [
        *random_shards[:-1],
        [[1 + random_shards[-1][0][0] % 256, *random_shards[-1][0][1:]], *random_shards[-1][1:]],
    ]
    assert open_index(write_shards(changed, name="other_text")).fingerprint != index.fingerprint


@pytest.mark.parametrize("place", ["nowhere", "pipe:touch executed"])
def test_a_folder_that_is_none_is_a_sentence_and_never_a_command(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no folder of shards at .*python -m data\.prepare --source"):
        open_index(place)
    assert not os.listdir(tmp_path)


def test_a_folder_without_shards_says_how_to_write_them(tmp_path):
    with pytest.raises(ValueError, match=r"neither index\.json nor tars.*python -m data\.prepare --source"):
        open_index(tmp_path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "train-000002.tar").unlink(), r"train-000002\.tar is missing"),
        (
            lambda folder: os.truncate(folder / "train-000002.tar", 700),
            r"train-000002\.tar is truncated: it has 700 bytes",
        ),
        (lambda folder: (folder / "train-000002.tar").write_bytes(b"x" * 20480), r"train-000002\.tar is not the one"),
        (lambda folder: (folder / "train-000009.tar").write_bytes(b""), r"1 more tars lie there \(train-000009\.tar"),
        (lambda folder: (folder / "train-000002.idx").unlink(), r"train-000002\.idx must have 80 bytes .* is missing"),
        (
            lambda folder: os.truncate(folder / "train-000002.idx", 64),
            r"train-000002\.idx must have 80 bytes .* 64 bytes",
        ),
        (lambda folder: flip_byte(folder / INDEX_FILE, 40), r"index\.json (was altered|cannot be read)"),
        (lambda folder: os.truncate(folder / INDEX_FILE, 100), r"index\.json cannot be read"),
        (lambda folder: (folder / INDEX_FILE).write_text("[]"), r"index\.json cannot be read"),
    ],
)
def test_shards_that_do_not_match_their_index_are_named_when_the_folder_is_opened(folder, damage, reason):
    damage(folder)
    with pytest.raises(RuntimeError, match=reason) as error:
        open_index(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bytes": None}, "must list names, checksums and counts, but it has .*'bytes': None"),
        ({"tokens": -1}, "'tokens': -1"),
        ({"name": 5}, "'name': 5"),
        ({"name": "train-000001.tar"}, "lists train-000001.tar twice"),
        ({"colour": 1}, "cannot be read"),
    ],
)
def test_an_index_that_is_not_ours_is_a_sentence(folder, change, reason):
    """Its own checksum is right: another program wrote it."""
    rewrite_index(folder, change)
    with pytest.raises(RuntimeError, match=f"index.json {reason}|index.json must list .*{reason}") as error:
        open_index(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"tokens": 418}, {"tokens": 1}])
def test_counts_that_the_sidecar_does_not_have_are_told_when_it_is_read(folder, change):
    """The checksums are right: only another program writes such an index."""
    rewrite_index(folder, change)
    index = open_index(folder)
    with pytest.raises(
        RuntimeError, match=r"train-000000\.idx and the index must agree, but it has 3 documents and 47 tokens"
    ):
        LineReader(index, seed=None, cached_documents=4).read(epoch=0, first_token=0, count=index.num_tokens)


@pytest.mark.parametrize("name", ["index.json", "tokenizer.json"])
def test_a_file_that_cannot_be_read_is_a_sentence(folder, monkeypatch, name):
    """Rights stop no root user, so the system's answer is feigned."""

    def read(path: Path, *arguments: Any, plain=Path.open, **options: Any):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", read)
    with pytest.raises(RuntimeError, match=r"cannot be read \(.*Permission denied.*\): restore it, or correct its"):
        open_index(folder)


def test_an_index_with_edited_counts_is_refused(folder):
    content = json.loads((folder / INDEX_FILE).read_text())
    content["shards"][0]["tokens"] += 1
    (folder / INDEX_FILE).write_text(json.dumps(content))
    with pytest.raises(RuntimeError, match="was altered"):
        open_index(folder)


def test_another_tokenizer_in_the_folder_is_refused(folder):
    (folder / "tokenizer.json").write_bytes(train_bpe(["some text"], vocab_size=258).to_bytes())
    with pytest.raises(
        RuntimeError, match=r"must be the tokenizer of its shards, but it is bpe-258-.* says bytes-257-"
    ):
        open_index(folder)


def test_sets_of_different_tokenizers_do_not_go_together(folder, write_shards, wide_tokenizer):
    index, other = open_index(folder), open_index(write_shards([[[1]]], name="heldout", tokenizer=wide_tokenizer))
    check_tokenizer(index, open_index(folder))
    check_tokenizer(index, index.tokenizer_id)
    with pytest.raises(
        ValueError, match=r"train and the shards in .*heldout must have the same tokenizer.*bytes-257-.*bytes-933-"
    ):
        check_tokenizer(index, other)
    with pytest.raises(
        ValueError, match=r"train and the checkpoint must have the same tokenizer.*bytes-257-.*bytes-933-"
    ):
        check_tokenizer(index, other.tokenizer_id)


def test_verifying_names_each_shard_with_a_flipped_bit(folder):
    flip_byte(folder / "train-000001.tar", 650)
    flip_byte(folder / "train-000003.tar", 650)
    with pytest.raises(RuntimeError, match=r"2 of 5 shards .*train-000001\.tar, train-000003\.tar"):
        verify_shards(open_index(folder))


def test_the_command_prints_one_line_and_fails_on_damage(folder, capsys):
    assert main([str(folder), "--verify"]) == 0
    assert "5 shards, 14 documents" in capsys.readouterr().out
    flip_byte(folder / "train-000001.tar", 650)
    assert main([str(folder)]) == 0
    assert main([str(folder), "--verify"]) == 1
    assert capsys.readouterr().err.startswith("error: 1 of 5 shards")
