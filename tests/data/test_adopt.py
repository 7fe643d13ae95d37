"""A plain webdataset of others: text or token arrays with a tokenizer beside them, indexed on first use."""

import io
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from webdataset.writer import TarWriter

from data.index import INDEX_FILE, open_index
from data.reader import LineReader
from data.shards import Member, decode_document
from data.tokenizer import bytes_tokenizer

TEXTS = ["first text", "", "zweiter Text: äöü", "x" * 20000, "last"]


def write_tar(path: Path, samples: list[dict[str, object]]) -> None:
    """By webdataset itself, with its own encoders, as its users would."""
    path.parent.mkdir(exist_ok=True)
    (path.parent / "tokenizer.json").write_bytes(bytes_tokenizer().to_bytes())
    with TarWriter(str(path)) as writer:
        for i, sample in enumerate(samples):
            writer.write({"__key__": f"sample{i}"} | sample)


def write_members(path: Path, members: dict[str, bytes]) -> None:
    (path.parent / "tokenizer.json").write_bytes(bytes_tokenizer().to_bytes())
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def read_line(folder: Path) -> list[int]:
    index = open_index(folder)
    reader = LineReader(index, seed=None, cached_documents=4)
    return reader.read(epoch=0, first_token=0, count=index.num_tokens).tokens.tolist()


def expected_line(texts: list[str]) -> list[int]:
    return [token for text in texts for token in [*(byte + 1 for byte in text.encode()), 0]]


@pytest.mark.parametrize("field", ["txt", "text", "npy"])
def test_text_and_token_shards_of_others_are_read_like_our_own(tmp_path, field):
    folder = tmp_path / "plain"
    values = [
        np.array([byte + 1 for byte in text.encode()], dtype=np.int64) if field == "npy" else text for text in TEXTS
    ]
    for number in (3, 1, 4, 0, 2):  # not the order of the names
        write_tar(folder / f"{number}.tar", [{field: values[number], "json": {"other": 1}}])
    write_tar(folder / "5.tar", [{field: value, "json": {"other": 1}} for value in values])
    assert read_line(folder) == expected_line([*TEXTS, *TEXTS])
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_an_end_token_that_is_there_already_is_not_doubled(tmp_path):
    folder = tmp_path / "plain"
    write_tar(folder / "a.tar", [{"npy": np.array([5, 6, 0])}, {"npy": np.array([7])}])
    assert read_line(folder) == [5, 6, 0, 7, 0]


def test_metadata_folders_long_names_and_foreign_members_do_not_shift_the_documents(tmp_path):
    names = ["__meta__/a.txt", "./folder.with.dots/" + "long" * 30 + ".TXT", "b.jpg", "b.txt", "__init__.txt", "README"]
    write_members(tmp_path / "a.tar", {name: name.encode() for name in names})
    assert read_line(tmp_path) == expected_line([names[1], names[3], names[4]])


def test_processes_that_start_at_once_agree_on_the_index(tmp_path):
    folder = tmp_path / "plain"
    write_tar(folder / "a.tar", [{"txt": text} for text in TEXTS])
    with ThreadPoolExecutor(4) as pool:
        indexes = list(pool.map(open_index, [folder] * 4))
    assert {index.fingerprint for index in indexes} == {open_index(folder).fingerprint}


class Planted:
    """A pickle that leaves a trace where it is decoded."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self):
        return Path.touch, (self._trace,)


@pytest.mark.parametrize("name", ["a.npy", "a.pyd", "a.pickle", "a.pkl", "a.pth", "a.txt"])
@pytest.mark.parametrize("as_array", [True, False])
def test_no_pickle_is_decoded(tmp_path, name, as_array):
    trace = tmp_path / "executed"
    buffer = io.BytesIO()
    if as_array:
        np.save(buffer, np.array([Planted(trace)], dtype=object), allow_pickle=True)
    else:
        pickle.dump(Planted(trace), buffer)
    content = buffer.getvalue()
    (tmp_path / "shards").mkdir()
    write_members(tmp_path / "shards" / "shard.tar", {name: content})
    with pytest.raises(RuntimeError, match=r"shard\.tar"):
        open_index(tmp_path / "shards")
    with pytest.raises(RuntimeError, match=r"cannot be read"):
        decode_document(tmp_path, Member(name, content), field="npy", tokenizer=bytes_tokenizer())
    assert not trace.exists()
    pickle.loads(pickle.dumps(Planted(trace)))
    assert trace.exists(), "the trap itself must work"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a.npy": np.array([[1, 2]])}, r"a\.npy .* must be a flat array of integers, but it is int64 of \(1, 2\)"),
        ({"a.npy": np.array([1.5])}, "must be a flat array of integers, but it is float64"),
        ({"a.npy": np.array([1, 257])}, "below the tokenizer's vocab_size 257, but they go from 1 to 257"),
        ({"a.npy": np.array([-1, 3])}, "go from -1 to 3"),
        ({"a.txt": b"\xff"}, r"a\.txt .* cannot be read \('utf-8'"),
        ({"a.jpg": b"x"}, r"must hold documents as \.npy, \.txt, \.text, but its members are like \['a\.jpg'\]"),
        ({"a.txt": b"x", "b.jpg": b"x"}, r"one \.txt document, but it has 2 samples and 1 such"),
    ],
)
def test_a_shard_that_cannot_be_adopted_is_named_with_the_reason(tmp_path, members, reason):
    contents = {}
    for name, value in members.items():
        buffer = io.BytesIO()
        if isinstance(value, np.ndarray):
            np.save(buffer, value)
        contents[name] = buffer.getvalue() or value
    write_members(tmp_path / "shard.tar", contents)
    with pytest.raises(RuntimeError, match=reason) as error:
        open_index(tmp_path)
    assert "shard.tar" in str(error.value)
    assert not (tmp_path / INDEX_FILE).exists()


@pytest.mark.parametrize("size", range(0, 10240, 512))
def test_a_truncated_tar_is_never_adopted(tmp_path, size):
    write_members(tmp_path / "shard.tar", {f"{i}.txt": b"text " * 200 for i in range(4)})
    content = (tmp_path / "shard.tar").read_bytes()
    (tmp_path / "shard.tar").write_bytes(content[: min(size, len(content.rstrip(b"\0")))])
    with pytest.raises(RuntimeError, match=r"shard\.tar (is truncated|cannot be read as an uncompressed tar)"):
        open_index(tmp_path)


def test_text_without_a_tokenizer_says_where_to_put_one(tmp_path):
    write_members(tmp_path / "a.tar", {"a.txt": b"text"})
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer at .*tokenizer\.json: put the tokenizer\.json"):
        open_index(tmp_path)
