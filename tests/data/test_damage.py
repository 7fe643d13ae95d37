"""Shards that are passed over: which targets are ignored, that nothing else changes at any layout, and the limit."""

import os
import re
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from data.loader import IGNORED, train_batches
from data.split import open_heldout, open_train
from tests.data.by_hand import fast_rows, rows_of

SEED, LENGTH, STREAMS, ROWS = 3, 7, 4, 8


@pytest.fixture
def folder(write_shards, random_shards) -> Path:
    return write_shards(random_shards)


def make_config(folder: Path, **changes: object) -> DataConfig:
    values = {"sequence_length": LENGTH, "global_batch_size": ROWS, "streams": STREAMS, "max_skipped_shards": 1}
    return DataConfig.model_validate(values | {"shards": str(folder), "heldout": str(folder)} | changes)


def take(num: int, config: DataConfig, *, num_ranks: int = 1, position: int = 0) -> list[dict]:
    split = open_train(config)
    layout: dict[str, Any] = {"accumulation_steps": 1, "num_ranks": num_ranks, "position": position}
    return list(
        fast_rows(
            [
                list(islice(train_batches(config, split, seed=SEED, rank=rank, **layout), num))
                for rank in range(num_ranks)
            ]
        )
    )


def rows_without(shards, bad: set[tuple[int, int]], *, num_rows: int) -> list[dict]:
    return rows_of(shards, length=LENGTH, streams=STREAMS, seed=SEED, num_epochs=9, bad=bad)[:num_rows]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def tar_of(folder: Path, number: int) -> Path:
    return folder / f"train-{number:06d}.tar"


def whole(shards, number: int) -> set[tuple[int, int]]:
    return {(number, d) for d in range(len(shards[number]))}


DAMAGES = {
    "missing": (lambda folder: tar_of(folder, 2).unlink(), lambda shards: whole(shards, 2)),
    "zeroed": (
        lambda folder: tar_of(folder, 2).write_bytes(bytes(tar_of(folder, 2).stat().st_size)),
        lambda s: whole(s, 2),
    ),
    "no sidecar": (lambda folder: tar_of(folder, 2).with_suffix(".idx").unlink(), lambda shards: whole(shards, 2)),
    "flipped sidecar": (lambda folder: flip(tar_of(folder, 2).with_suffix(".idx"), 9), lambda shards: whole(shards, 2)),
    "flipped text": (lambda folder: flip(tar_of(folder, 2), 512 + 140), lambda shards: {(2, 0)}),
    "flipped name": (lambda folder: flip(tar_of(folder, 2), 3), lambda shards: {(2, 0)}),
    "unreadable": (
        lambda folder: (tar_of(folder, 2).unlink(), tar_of(folder, 2).mkdir()),
        lambda shards: whole(shards, 2),
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize(("num_ranks", "num_workers"), [(1, 0), (2, 0), (4, 0)])
def test_what_is_damaged_is_ignored_and_all_else_is_as_it_was(folder, random_shards, kind, num_ranks, num_workers):
    damage, bad = DAMAGES[kind]
    damage(folder)
    expected = rows_without(random_shards, bad(random_shards), num_rows=160)
    assert take(20, make_config(folder, num_workers=num_workers), num_ranks=num_ranks) == expected


def test_reader_processes_see_the_same(folder, random_shards):
    damage, bad = DAMAGES["flipped text"]
    damage(folder)
    expected = rows_without(random_shards, bad(random_shards), num_rows=160)
    assert take(20, make_config(folder, num_workers=2)) == expected


def test_a_resume_sees_the_same_whatever_was_read_before(folder, random_shards):
    damage, bad = DAMAGES["flipped text"]
    damage(folder)
    expected = rows_without(random_shards, bad(random_shards), num_rows=160)
    for step in range(18):
        assert take(2, make_config(folder), position=8 * step) == expected[8 * step : 8 * step + 16]


def test_a_shard_cut_at_every_512_bytes_loses_just_the_documents_that_are_cut(folder, random_shards):
    path = tar_of(folder, 2)
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [member.offset_data + member.size for member in tar]
    for size in range(0, len(content), 512):
        path.write_bytes(content[:size])
        bad = {(2, d) for d, end in enumerate(ends) if end > size}
        assert take(8, make_config(folder)) == rows_without(random_shards, bad, num_rows=64)


def test_a_shard_cut_at_every_512_bytes_is_refused_or_counted_by_name(folder):
    path = tar_of(folder, 2)
    content = path.read_bytes()
    for size in range(0, len(content), 512):
        path.write_bytes(content[:size])
        said = f"train-000002.tar is truncated: it has {size} bytes and the index says {len(content)}"
        with pytest.raises(RuntimeError, match=re.escape(said)):
            open_train(make_config(folder, max_skipped_shards=0))
        assert list(open_train(make_config(folder)).damaged) == [str(path)]


def test_a_shard_cut_at_every_512_bytes_behind_the_index_is_named_by_the_first_document_that_is_cut(folder):
    path, config = tar_of(folder, 2), make_config(folder, max_skipped_shards=0)
    split, content = open_train(config), path.read_bytes()
    with tarfile.open(path) as tar:
        end = max(member.offset_data + member.size for member in tar)
    for size in range(0, end, 512):
        path.write_bytes(content[:size])
        batches = train_batches(config, split, seed=SEED, accumulation_steps=1, rank=0, num_ranks=1, position=0)
        with pytest.raises(RuntimeError, match=r"the shard .*train-000002\.tar is damaged at byte"):
            list(islice(batches, 20))


def test_a_step_may_have_no_target_at_all(folder):
    for number in range(5):
        tar_of(folder, number).unlink()
    config = make_config(folder, max_skipped_shards=5)
    batches = train_batches(
        config, open_train(config), seed=SEED, accumulation_steps=1, rank=0, num_ranks=1, position=0
    )
    batch = next(batches)
    assert (batch.targets_BS == IGNORED).all()
    assert batch.num_bytes == 0
    assert len(batches.damaged) == 5


def test_without_leave_every_damage_is_an_error_that_names_it(folder):
    tar_of(folder, 2).unlink()
    with pytest.raises(RuntimeError, match=r"train-000002\.tar is missing"):
        open_train(make_config(folder, max_skipped_shards=0))


def test_more_missing_shards_than_allowed_are_all_named_before_the_first_step(folder):
    tar_of(folder, 1).unlink()
    os.truncate(tar_of(folder, 3), 512)
    with pytest.raises(
        RuntimeError, match=r"allows 1 damaged shard, but 2 are: .*train-000001\.tar is missing"
    ) as error:
        open_train(make_config(folder))
    assert "train-000003.tar is truncated: it has 512 bytes" in str(error.value)
    assert "raise data.max_skipped_shards" in str(error.value)
    open_train(make_config(folder, max_skipped_shards=2))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_damage_than_allowed_ends_the_reading_and_names_all(folder, num_workers):
    tar_of(folder, 1).unlink()
    flip(tar_of(folder, 3), 512 + 140)
    with pytest.raises(
        RuntimeError, match=r"allows 1 damaged shard, but 2 are: .*train-000001\.tar is missing"
    ) as error:
        take(60, make_config(folder, num_workers=num_workers))
    assert "train-000003.tar is damaged at byte 0: the document" in str(error.value)


def test_each_damaged_shard_counts_once_with_its_first_reason(folder):
    flip(tar_of(folder, 2), 512 + 140)
    config = make_config(folder)
    batches = train_batches(
        config, open_train(config), seed=SEED, accumulation_steps=1, rank=0, num_ranks=1, position=0
    )
    for _ in range(60):
        next(batches)
    assert list(batches.damaged) == [str(tar_of(folder, 2))]
    assert "has not the checksum" in batches.damaged[str(tar_of(folder, 2))]


def test_what_other_processes_met_counts_too(folder):
    config = make_config(folder)
    batches = train_batches(
        config, open_train(config), seed=SEED, accumulation_steps=1, rank=0, num_ranks=1, position=0
    )
    batches.add_damaged({"a": "a is gone"})
    batches.add_damaged({"a": "a is gone"})
    with pytest.raises(RuntimeError, match="allows 1 damaged shard, but 2 are: a is gone; b is gone"):
        batches.add_damaged({"b": "b is gone"})


def test_held_out_shards_are_never_passed_over(folder):
    tar_of(folder, 2).unlink()
    with pytest.raises(RuntimeError, match=r"train-000002\.tar is missing"):
        open_heldout(make_config(folder))


@pytest.mark.parametrize("suffix", [".idx", ".tar"])
def test_a_file_that_may_not_be_read_is_passed_over_like_a_missing_one(folder, random_shards, monkeypatch, suffix):
    expected = rows_without(random_shards, whole(random_shards, 2), num_rows=160)
    plain = Path.open

    def read(path: Path, *arguments: Any, **options: Any):
        if path.name == f"train-000002{suffix}":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", read)
    assert take(20, make_config(folder)) == expected
    with pytest.raises(
        RuntimeError, match=rf"train-000002\{suffix} cannot be (read|opened) \(Permission denied\): restore"
    ):
        take(20, make_config(folder, max_skipped_shards=0))
