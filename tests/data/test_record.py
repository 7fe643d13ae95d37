"""Another tokenizer for a folder that is finished: refused, and nothing of the folder is touched. Other arguments: test_prepare.py."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from data.prepare import parse_arguments, prepare
from data.tokenizer import train_bpe


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"the quick brown fox jumps over the lazy dog number {i} " * 9)
    return folder


def run(source: Path, tokenizer: str, *vocab_size: str) -> str:
    """Prepares source/../out in this process; returns what it printed."""
    command_line = ["--source", str(source), "--out", str(source.parent / "out"), "--workers", "1"]
    command_line += ["--tokenizer", tokenizer, *(part for size in vocab_size for part in ("--vocab-size", size))]
    arguments, workers = parse_arguments(command_line)
    printed = io.StringIO()
    prepare(arguments, workers=workers, console=Console(file=printed, soft_wrap=True))
    return printed.getvalue()


def contents(source: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (source.parent / "out").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("made", "asked", "differs"),
    [
        (("bpe", "270"), ("bpe", "271"), "--vocab-size is 270 there and 271 here"),
        (("bpe", "270"), ("bytes",), "--tokenizer is 'bpe' there and 'bytes' here"),
        (("bytes",), ("bpe", "270"), "--tokenizer is 'bytes' there and 'bpe' here"),
    ],
)
def test_another_tokenizer_or_size_is_refused_with_both_values(source, made, asked, differs):
    run(source, *made)
    before = contents(source)
    with pytest.raises(ValueError, match=rf"other arguments \(.*{differs}.*\): choose another --out, or remove the"):
        run(source, *asked)
    assert contents(source) == before


def test_a_tokenizer_file_that_changed_is_refused_with_both_ids(source, tmp_path):
    path = tmp_path / "tokenizer.json"
    old, new = (train_bpe(["the quick brown fox " * 20], vocab_size=size) for size in (265, 270))
    path.write_bytes(old.to_bytes())
    run(source, str(path))
    before = contents(source)
    path.write_bytes(new.to_bytes())
    changed = (
        rf"changed since \(they were made with {old.tokenizer_id} and it is {new.tokenizer_id}\): restore the file"
    )
    with pytest.raises(ValueError, match=rf"the file of --tokenizer, {path}, {changed}"):
        run(source, str(path))
    assert contents(source) == before


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_tokenizer_file_that_says_the_same_or_is_gone_changes_nothing(source, tmp_path, is_gone):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(train_bpe(["the quick brown fox " * 20], vocab_size=265).to_bytes())
    run(source, str(path))
    if is_gone:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_bytes())))  # in other bytes
    assert "nothing to do" in run(source, str(path))
