"""From text to shards: nothing lost, nothing that depends on the number of processes, nothing half-written."""

import errno
import gzip
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from webdataset.compat import WebDataset

from data.encode import is_heldout
from data.index import open_index, verify_shards
from data.prepare import default_shard_tokens, main, parse_arguments, prepare
from data.tokenizer import load_tokenizer
from data.writer import ShardWriter

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "while",
    "naïve",
    "東京",
    "cats",
    "🙂",
    "sleep",
]


@pytest.fixture
def texts() -> list[str]:
    """120 documents, two of them equal, some empty."""
    texts = [" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(1, 30 + i)) + f"\n{i}" for i in range(117)]
    return [*texts, texts[5], "", " \n"]


@pytest.fixture
def source(tmp_path: Path, texts: list[str]) -> Path:
    """The texts in files of each kind, beside a binary file."""
    folder = tmp_path / "source"
    folder.mkdir()
    for i, text in enumerate(texts[:60]):
        (folder / f"{i}.txt").write_text(text)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[60:90]))
    (folder / "b.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts[90:]).encode())
    )
    (folder / "image").write_bytes(b"\0" * 100)
    return folder


def run(source: Path, out: Path, *options: str) -> str:
    """Runs the preparation in this process; returns what it printed."""
    command_line = ["--source", str(source), "--out", str(out), "--shard-tokens", "3000", "--workers", "1", *options]
    if "--tokenizer" not in options:
        command_line += ["--tokenizer", "bpe", "--vocab-size", "300"]
    arguments, workers = parse_arguments(command_line)
    printed = io.StringIO()
    prepare(arguments, workers=workers, console=Console(file=printed, soft_wrap=True))
    return printed.getvalue()


def texts_in(folder: Path) -> list[str]:
    """Decoded by webdataset and the tokenizer.json: nothing of our own reading."""
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    found = []
    for path in sorted(folder.glob("*.tar")):
        dataset: Any = WebDataset(str(path), shardshuffle=False, empty_check=False).decode()
        for sample in dataset:
            assert sample["npy"][-1] == 0
            found.append(tokenizer.decode(sample["npy"]).decode())
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.mark.parametrize("options", [(), ("--tokenizer", "bytes")])
def test_every_text_is_in_one_of_the_sets_and_equal_texts_are_together(tmp_path, source, texts, options):
    printed = run(source, tmp_path / "out", *options)
    train, heldout = texts_in(tmp_path / "out" / "train"), texts_in(tmp_path / "out" / "heldout")
    assert sorted(train + heldout) == sorted(text for text in texts if text.strip())
    assert 0 < len(heldout) < 0.15 * len(texts)
    assert not set(train) & set(heldout)
    assert "1 binary files" in printed
    assert "2 empty documents" in printed
    for name, found in (("train", train), ("heldout", heldout)):
        index = open_index(tmp_path / "out" / name)
        verify_shards(index)
        assert index.num_documents == len(found)
        assert len(index.shards) > 1 or name == "heldout"
        assert f"{name}: {len(found)} documents" in printed


def test_the_bytes_do_not_depend_on_the_number_of_processes_or_the_run(tmp_path, source, monkeypatch):
    monkeypatch.setattr("data.encode.BATCH_CHARACTERS", 2000)
    run(source, tmp_path / "one")
    run(source, tmp_path / "two", "--workers", "2")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_seed_changes_the_order_and_not_the_split(tmp_path, source):
    run(source, tmp_path / "one", "--tokenizer", "bytes")
    run(source, tmp_path / "two", "--tokenizer", "bytes", "--seed", "1")
    for name in ("train", "heldout"):
        one, two = texts_in(tmp_path / "one" / name), texts_in(tmp_path / "two" / name)
        assert sorted(one) == sorted(two)
    assert texts_in(tmp_path / "one" / "train") != texts_in(tmp_path / "two" / "train")


def test_bpe_sees_no_heldout_text(tmp_path):
    (tmp_path / "source").mkdir()
    secret = next(text for i in range(1000) if is_heldout(text := f"zqzqzqzq{i} " * 100))
    for i in range(60):
        (tmp_path / "source" / f"{i}.txt").write_text(f"ordinary text number {i}, " * 20)
    (tmp_path / "source" / "secret.txt").write_text(secret)
    run(tmp_path / "source", tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out" / "train" / "tokenizer.json")
    assert len(tokenizer.encode("zqzqzqzq")) == 8
    assert len(tokenizer.encode("ordinary")) < 5


def test_a_tokenizer_of_another_set_can_be_used_again(tmp_path, source):
    run(source, tmp_path / "one")
    run(source, tmp_path / "two", "--tokenizer", str(tmp_path / "one" / "train" / "tokenizer.json"))
    one, two = open_index(tmp_path / "one" / "train"), open_index(tmp_path / "two" / "heldout")
    assert one.tokenizer_id == two.tokenizer_id


def test_a_second_call_says_so_and_changes_nothing(tmp_path, source):
    run(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert "nothing to do" in run(source, tmp_path / "out")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_other_arguments_for_a_finished_folder_say_what_differs(tmp_path, source):
    run(source, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"other arguments \(.*--vocab-size is 300 there and None here; --seed is 0 there and 4 here\)"
    ):
        run(source, tmp_path / "out", "--tokenizer", "bytes", "--seed", "4")


@pytest.mark.parametrize("change", ["text", "size", "new file", "gone"])
def test_a_source_file_that_changed_is_noticed(tmp_path, source, change):
    run(source, tmp_path / "out")
    path = source / "7.txt"
    if change == "text":
        path.write_text(path.read_text()[::-1])
    elif change == "size":
        path.write_text(path.read_text() + "more")
    elif change == "new file":
        (source / "new.txt").write_text("new")
    else:
        path.unlink()
    with pytest.raises(ValueError, match=r"holds shards of other texts: the files of --source changed since"):
        run(source, tmp_path / "out")


def test_shards_of_a_source_that_is_gone_are_kept(tmp_path, source):
    run(source, tmp_path / "out")
    source.rename(tmp_path / "elsewhere")
    assert "from a source that is gone): nothing to do" in run(source, tmp_path / "out")


def test_shards_from_before_files_were_recorded_are_taken_as_they_are(tmp_path, source):
    run(source, tmp_path / "out")
    record = tmp_path / "out" / "prepare.json"
    content = json.loads(record.read_text())
    del content["files"]
    record.write_text(json.dumps(content))
    (source / "new.txt").write_text("new")
    assert "nothing to do" in run(source, tmp_path / "out")


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_a_damaged_record_is_a_sentence(tmp_path, source, content):
    run(source, tmp_path / "out")
    (tmp_path / "out" / "prepare.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(RuntimeError, match=r"prepare\.json must say how the shards were made, but it cannot be read"):
        run(source, tmp_path / "out")


@pytest.mark.parametrize("out", [".", "..", "/", "x/.."])
def test_an_out_without_a_name_is_a_sentence(source, monkeypatch, tmp_path, capsys, out):
    monkeypatch.chdir(tmp_path)
    assert main(["--source", str(source), "--out", out, "--tokenizer", "bytes"]) == 1
    assert f"--out must name a new folder, but it is {out}" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(tmp_path, source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds something else"):
        run(source, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_what_a_killed_run_left_is_replaced(tmp_path, source):
    run(source, tmp_path / "whole")
    (tmp_path / "out.partial" / "train").mkdir(parents=True)
    (tmp_path / "out.partial" / "train" / "train-000099.tar").write_bytes(b"half")
    (tmp_path / "out.lock").touch()
    run(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "whole", "out"}


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, source, monkeypatch, capsys):
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", full_disk)
    status = main(["--source", str(source), "--out", str(tmp_path / "out"), "--tokenizer", "bytes", "--workers", "1"])
    assert status == 1
    assert re.fullmatch(
        r"error: .*out cannot be prepared \(.*No space left on device\): make room .*\n", capsys.readouterr().err
    )
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_long_documents_are_cut(tmp_path):
    (tmp_path / "one.txt").write_text("".join(f"line {i}\n" for i in range(5000)))
    with pytest.raises(ValueError, match=r"1 for training and 0 held out .* --document-bytes"):
        run(tmp_path / "one.txt", tmp_path / "out", "--tokenizer", "bytes")
    run(tmp_path / "one.txt", tmp_path / "out", "--tokenizer", "bytes", "--document-bytes", "300")
    found = texts_in(tmp_path / "out" / "train") + texts_in(tmp_path / "out" / "heldout")
    assert max(map(len, found)) <= 300
    assert sorted("".join(found).splitlines()) == sorted(f"line {i}" for i in range(5000))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--tokenizer", "bpe", "--vocab-size", "256"), "at least 257 .* but it is 256"),
        (("--tokenizer", "bpe"), "at least 257 .* but it is None"),
        (("--tokenizer", "bytes", "--vocab-size", "300"), "must be 257"),
        (("--tokenizer", "bpe", "--vocab-size", "90000"), "at most what the text can fill"),
        (("--tokenizer", "nowhere.json"), r"no tokenizer at nowhere\.json"),
        (("--tokenizer", "nowhere.json", "--vocab-size", "300"), "leave it out"),
        (("--tokenizer", "bytes", "--shard-tokens", "0"), "--shard-tokens must be at least 1"),
        (
            ("--tokenizer", "bytes", "--text-field", "body"),
            r"line 1 of .*a\.jsonl.*'body'|line 1 of .*b\.jsonl\.gz.*'body'",
        ),
    ],
)
def test_bad_arguments_are_one_sentence_and_leave_nothing(tmp_path, source, options, reason):
    with pytest.raises(ValueError, match=reason) as error:
        run(source, tmp_path / "out", *options)
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize(
    ("num_bytes", "shard_tokens"), [(0, 1 << 18), (12 << 20, 1 << 18), (1 << 30, 1 << 22), (1 << 50, 1 << 26)]
)
def test_shards_are_many_but_not_tiny(num_bytes, shard_tokens):
    assert default_shard_tokens(num_bytes) == shard_tokens


def test_the_tokenising_processes_do_not_import_torch():
    code = "import sys, data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
