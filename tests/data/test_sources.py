"""What counts as text, in which order it is read, and the sentence for each bad source."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sources import STDLIB, check_has_text, cut, find_sources, read_documents


def texts_of(
    *sources: Path | str, text_field: str = "text", document_bytes: int = 1 << 20
) -> tuple[list[str], Counter[str]]:
    skipped: Counter[str] = Counter()
    files = find_sources([str(source) for source in sources], seed=0, excluded=[])
    found = read_documents(files, text_field=text_field, document_bytes=document_bytes, skipped=skipped)
    return [document.text for document in found], skipped


def test_text_is_found_in_every_kind_of_file(tmp_path):
    lines = "".join(json.dumps({"text": f"line {i}"}) + "\n\n" for i in range(3))
    (tmp_path / "plain.anything").write_text("plain é")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.replace("line", "gz").encode()))
    (tmp_path / "c.md.gz").write_bytes(gzip.compress(b"gz text"))
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(lines.replace("line", "zst").encode()))
    frames = zstandard.compress(b"two ") + zstandard.compress(b"frames")
    (tmp_path / "e.txt.zst").write_bytes(frames)
    found, skipped = texts_of(tmp_path)
    expected = [
        "plain é",
        "gz text",
        "two frames",
        *(f"{kind} {i}" for kind in ("line", "gz", "zst") for i in range(3)),
    ]
    assert sorted(found) == sorted(expected)
    assert not skipped


def test_what_is_no_text_is_skipped_and_counted(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "cached.py").write_text("cached")
    found, skipped = texts_of(tmp_path)
    assert found == ["good"]
    assert skipped == {
        "binary files": 1,
        "files that are not UTF-8": 1,
        "empty documents": 1,
        "documents that are not valid Unicode": 1,
    }


def test_order_depends_on_seed_and_names_not_on_where_the_folder_lies(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for i in range(20):
            (tmp_path / folder / f"{i}.txt").write_text(f"text {i}")
    first, second = texts_of(tmp_path / "one")[0], texts_of(tmp_path / "two")[0]
    assert first == second != sorted(first)
    reseeded = [file.path.name for file in find_sources([str(tmp_path / "one")], seed=1, excluded=[])]
    assert [f"text {Path(name).stem}" for name in reseeded] != first


def test_an_excluded_folder_is_left_out(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.json").write_text("{}")
    (tmp_path / "text.txt").write_text("text")
    files = find_sources([str(tmp_path)], seed=0, excluded=[tmp_path / "out"])
    assert [file.path.name for file in files] == ["text.txt"]


def test_the_standard_library_is_a_few_megabytes_of_python_without_its_tests():
    files = find_sources([STDLIB], seed=0, excluded=[])
    assert 5e6 < sum(file.bytes for file in files) < 25e6
    assert all(file.path.suffix == ".py" for file in files)
    assert not {"test", "tests", "site-packages"} & {part for file in files for part in Path(file.name).parts}


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="aé東🙂\n ", max_size=60), limit=st.integers(4, 20))
def test_pieces_join_to_the_text_and_keep_the_limit(text, limit):
    pieces = cut(text, limit=limit)
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= limit for piece in pieces)


def test_a_long_text_is_cut_after_line_ends():
    assert cut("one\ntwo\nthree\n", limit=9) == ["one\ntwo\n", "three\n"]


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"the source .*nowhere must be a file or a folder.*correct --source"):
        find_sources([str(tmp_path / "nowhere")], seed=0, excluded=[])


def test_a_source_without_text_is_named_even_beside_a_good_one(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "image").write_bytes(b"\0\0")
    (tmp_path / "good.txt").write_text("good")
    sources = [str(tmp_path / "good.txt"), str(tmp_path / "bad")]
    files = find_sources(sources, seed=0, excluded=[])
    with pytest.raises(ValueError, match=r"the source .*bad must hold text, but it has none \(1 binary files\)"):
        check_has_text(files, sources=sources, text_field="text")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"body": "x"}', "KeyError"),
        ("not json", "JSONDecodeError"),
        ('["text"]', "TypeError"),
        ('{"text": 3}', "it is int"),
    ],
)
def test_a_bad_json_line_is_named_by_file_and_number(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"line 2 of .*a\.jsonl.*{reason}.*--text-field"):
        texts_of(tmp_path)


def test_another_text_field_can_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}')
    assert texts_of(tmp_path, text_field="body")[0] == ["x"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt.gz", b"no gzip"),
        ("a.txt.gz", gzip.compress(b"text " * 100, mtime=0)[:-12]),
        ("a.txt.zst", b"no zstd!"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "x"}\n' * 1000)[:-6]),
    ],
)
def test_a_damaged_compressed_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RuntimeError, match=f"{name} cannot be decompressed"):
        texts_of(tmp_path)
