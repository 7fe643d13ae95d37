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
        ({"\udcff.txt": b"\xff"}, r"the document \\udcff\.txt .* cannot be read \('utf-8'"),
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


def docs_padded_with_zeros() -> dict[str, bytes]:
    members = {}
    for i in range(4):
        buffer = io.BytesIO()
        np.save(buffer, np.array([i + 1] * 20 + [0] * 500, dtype=np.int64))
        members[f"{i}.npy"] = buffer.getvalue()
    return members


def test_a_tar_cut_at_any_block_is_refused_or_whole(tmp_path):
    """Documents that end in zeros, so that a cut behind one looks like the end of a tar."""
    write_members(tmp_path / "shard.tar", docs_padded_with_zeros())
    content = (tmp_path / "shard.tar").read_bytes()
    with tarfile.open(tmp_path / "shard.tar") as tar:
        whole_from = tar.getmembers()[-1].offset_data + 4608 + 1024
    for size in range(0, len(content) + 1, 512):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "tokenizer.json").write_bytes(bytes_tokenizer().to_bytes())
        (folder / "shard.tar").write_bytes(content[:size])
        if size >= whole_from:
            assert open_index(folder).num_documents == 4
            continue
        with pytest.raises(RuntimeError, match=r"shard\.tar (is truncated|cannot be read as an uncompressed tar)"):
            open_index(folder)


@pytest.mark.parametrize("number", range(8))
def test_a_damaged_header_never_loses_a_document(tmp_path, number):
    """The headers of four documents and of the four other members between them, one at a time."""
    texts = [f"text {i}" for i in range(4)]
    members = {f"{i}.{kind}": texts[i].encode() for i in range(4) for kind in ("txt", "json")}
    write_members(tmp_path / "shard.tar", members)
    whole = (tmp_path / "shard.tar").read_bytes()
    before, header, after = whole[: 1024 * number], whole[1024 * number :][:512], whole[1024 * number + 512 :]
    flipped = [header[:i] + bytes([header[i] ^ 1]) + header[i + 1 :] for i in (*range(0, 512, 37), 148, 156)]
    for damaged in (bytes(512), *flipped):
        (tmp_path / "shard.tar").write_bytes(before + damaged + after)
        with pytest.raises(RuntimeError, match=r"shard\.tar (is damaged|must be one whole|cannot be read as)"):
            open_index(tmp_path)


def test_joined_tars_are_refused(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_members(tmp_path / name, {f"{name}.txt": b"text"})
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    (tmp_path / "b.tar").unlink()
    with pytest.raises(RuntimeError, match=r"a\.tar must be one whole tar, but it ends at byte 1024 .*joined by cat"):
        open_index(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_are_refused_by_name(tmp_path, kind):
    write_members(tmp_path / "a.tar", {"a.txt": b"text"})
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        member = tarfile.TarInfo("b.txt")
        member.type, member.linkname = kind, "a.txt"
        tar.addfile(member)
    with pytest.raises(RuntimeError, match=r"a\.tar must be files, but b\.txt is a link"):
        open_index(tmp_path)


def test_empty_tars_are_shards_without_documents_unless_all_are(tmp_path):
    write_members(tmp_path / "a.tar", {})
    with pytest.raises(RuntimeError, match=r"must hold documents, but all 1 are empty"):
        open_index(tmp_path)
    write_members(tmp_path / "b.tar", {"b.txt": b"b"})
    assert read_line(tmp_path) == expected_line(["b"])


def test_the_index_file_of_another_program_is_not_overwritten(tmp_path):
    write_members(tmp_path / "a.tar", {"a.txt": b"text"})
    (tmp_path / "a.idx").write_text("v1.2 1\ntxt 0 1 a.txt\n")
    with pytest.raises(RuntimeError, match=r"a\.idx, but another program's file has that name: move it away"):
        open_index(tmp_path)
    assert (tmp_path / "a.idx").read_text().startswith("v1.2")


def test_sidecars_of_an_adoption_that_was_cut_off_are_written_anew(tmp_path):
    write_members(tmp_path / "a.tar", {"a.txt": b"text"})
    before = open_index(tmp_path).fingerprint
    (tmp_path / "index.json").unlink()
    assert open_index(tmp_path).fingerprint == before


def test_a_tar_that_cannot_be_read_is_named(tmp_path):
    write_members(tmp_path / "a.tar", {"a.txt": b"text"})
    (tmp_path / "b.tar").mkdir()
    with pytest.raises(RuntimeError, match=r"b\.tar cannot be read \(Is a directory\)"):
        open_index(tmp_path)


def npy_header(text: str, version: bytes = b"\1\0") -> bytes:
    header = text.encode() + b"\n"
    return b"\x93NUMPY" + version + len(header).to_bytes(2 if version == b"\1\0" else 4, "little") + header


HOSTILE = {
    "huge": npy_header("{'descr': '>i8', 'fortran_order': False, 'shape': (1000000000000,), }"),
    "huge, version 2": npy_header("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }", b"\2\0"),
    "overflow": npy_header(f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({10**30},), }}"),
    "open brackets": npy_header("{'descr': '<i8', 'fortran_order': False, 'shape': (" + "(" * 3000),
    "nested": npy_header("(" * 2000 + ")" * 2000),
    "header longer than it says": b"\x93NUMPY\1\0\x20\0" + npy_header("{'descr': '<i8', 'fortran_order': False, 'shape': (5,), }")[10:],
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_array_is_a_sentence(tmp_path, kind):
    write_members(tmp_path / "a.tar", {"a.npy": HOSTILE[kind] + bytes(80)})
    with pytest.raises(RuntimeError, match=r"a\.npy in .*a\.tar cannot be read \(.{1,200}\): repair") as error:
        open_index(tmp_path)
    assert "\n" not in str(error.value)


def test_text_without_a_tokenizer_says_where_to_put_one(tmp_path):
    write_members(tmp_path / "a.tar", {"a.txt": b"text"})
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer at .*tokenizer\.json: put the tokenizer\.json"):
        open_index(tmp_path)
