"""train/checkpoint.py: every bit comes back at every split of the tensors over ranks, and a failure on one rank is one on all."""

import builtins
import dataclasses
import hashlib
import json
import math
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch

from model.fragments import Fragment, create_state, fragments_of, held_in, share
from model.parameters import Table, logical_parameters, materialize, zeros
from tests.train.thread_mesh import (
    KINDS,
    STATE,
    ThreadMesh,
    blank,
    draw,
    join,
    load_split,
    on_ranks,
    same,
    save_split,
    split,
    try_ranks,
    write_manifest,
)
from train import storage
from train.checkpoint import TrainState, latest, load, read_state, read_tensors, save
from train.manifest import FileEntry, read_manifest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests write need not outlive them; test_checkpoint_folder.py is about what must last."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four float32 to a piece: the small tensors of these tests are cut as large ones are."""
    monkeypatch.setattr(storage, "PIECE_BYTES", 16)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("writers", "readers"), [(1, 3), (2, 4), (3, 1), (3, 3), (4, 2)])
@pytest.mark.usefixtures("small_pieces")
def test_every_bit_comes_back_at_every_split(tmp_path: Path, writers: int, readers: int, seed: int) -> None:
    values = draw(seed)
    path = save_split(tmp_path, values, writers, seed=seed)
    assert path == tmp_path / "step_000100"
    assert same(load_split(path, readers, seed=seed + 10), values)


def test_a_parameter_may_lie_on_three_ranks_and_in_any_order(tmp_path: Path) -> None:
    weight = torch.arange(15.0)
    ranges = [[(9, 15), (0, 2)], [(4, 9)], [(2, 4)]]

    def fragments(rank: int, source: torch.Tensor) -> list[Fragment]:
        return [Fragment("w", (5, 3), a, {"master": source[a:b]}) for a, b in ranges[rank]]

    path = on_ranks(3, lambda m: save(tmp_path, state=STATE, fragments=fragments(m.rank, weight), mesh=m, keep=1))[0]
    loaded = torch.zeros(15)
    on_ranks(3, lambda m: load(path, fragments=fragments((m.rank + 1) % 3, loaded), mesh=m))
    assert torch.equal(loaded, weight)
    assert torch.equal(read_tensors(path, kind="master")["w"], weight.reshape(5, 3))


ROWS, WIDTH = 9, 8  # 9 rows on 2 row shards leave one of padding, on 4 shards three
TABLE_LAYOUTS = [(1, 1), (4, 1), (1, 4), (2, 2)]  # row shards, columns


def random_bits(seed: int) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    bits = {kind: torch.randint(-(2**31), 2**31, (ROWS, WIDTH), generator=drawn) for kind in KINDS}
    return {kind: values.to(torch.int32).view(torch.float32) for kind, values in bits.items()}


class TableRank:
    """A rank of a table with its optimizer, as the engines hold it, and its partition: half of what it has of the table."""

    def __init__(self, rank: int, row_shards: int, columns: int) -> None:
        self.replica, place = divmod(rank, row_shards * columns)
        table = Table(ROWS, {"up": ((WIDTH,), zeros)})
        table.shard(rank=place, size=row_shards * columns, columns=columns)
        materialize(table, seed=1)
        optimizer = torch.optim.AdamW(table.parameters(), lr=0.1)
        create_state(optimizer)
        (self.parameter,) = logical_parameters(table)
        tensor = self.parameter.tensor
        self.held = {"master": tensor.detach(), **optimizer.state[tensor]}
        held = held_in(tensor, optimizer, offset=0, local_start=0, numel=tensor.numel())
        halves = [share(every, rank=self.replica, size=2) for every in fragments_of(self.parameter, held)]
        self.fragments = [half for half in halves if half is not None]
        rows = math.ceil(ROWS / row_shards)
        first = place // columns * rows
        self.rows = slice(min(first, ROWS), min(first + rows, ROWS))
        width = WIDTH // columns
        self.columns = slice(place % columns * width, (place % columns + 1) * width)

    def fill(self, values: dict[str, torch.Tensor]) -> "TableRank":
        for kind, whole in values.items():
            part = whole[self.rows, self.columns]
            self.held[kind][: len(part)] = part
        return self

    def agrees(self, values: dict[str, torch.Tensor]) -> bool:
        """Bit for bit in its own half; the other half as it was; the padding zero."""
        for kind, whole in values.items():
            part = whole[self.rows, self.columns].flatten()
            middle, held = len(part) // 2, self.held[kind].flatten()
            mine = slice(0, middle) if self.replica == 0 else slice(middle, len(part))
            expected = torch.zeros_like(held)
            expected[mine] = part[mine]
            if not torch.equal(held.view(torch.int32), expected.view(torch.int32)):
                return False
        return True


@pytest.mark.parametrize("after", TABLE_LAYOUTS, ids=str)
@pytest.mark.parametrize("before", TABLE_LAYOUTS, ids=str)
def test_a_table_in_rows_columns_or_both_is_read_in_any_other_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """Two replicas of each shard with a partition each; pieces of five elements begin and end inside rows of every width."""
    monkeypatch.setattr(storage, "PIECE_BYTES", 20)
    values = random_bits(seed=3)
    writers = [TableRank(rank, *before).fill(values) for rank in range(2 * math.prod(before))]
    path = on_ranks(
        len(writers), lambda m: save(tmp_path, state=STATE, fragments=writers[m.rank].fragments, mesh=m, keep=1)
    )[0]
    pieces = read_manifest(path).tensors["master/up"].pieces
    assert {piece.box is None for piece in pieces} == {before[1] == 1}
    readers = [TableRank(rank, *after) for rank in range(2 * math.prod(after))]
    on_ranks(len(readers), lambda m: load(path, fragments=readers[m.rank].fragments, mesh=m))
    assert all(reader.agrees(values) for reader in readers)
    for kind, whole in values.items():
        found = read_tensors(path, kind=kind)["up"]
        assert torch.equal(found.view(torch.int32), whole.view(torch.int32))


def test_replicas_may_all_read_everything(tmp_path: Path) -> None:
    values = draw(1)
    path = save_split(tmp_path, values, 3)
    ranks = [split(blank(values), 1, seed=0)[0] for _ in range(2)]
    on_ranks(2, lambda mesh: load(path, fragments=ranks[mesh.rank], mesh=mesh))
    assert same(join(ranks[:1]), values)
    assert same(join(ranks[1:]), values)


def test_the_small_state_comes_back_equal(tmp_path: Path) -> None:
    extra = {"lr": 0.1 + 0.2, "tiny": 5e-324, "none": None, "text": "ä\n", "nested": {"list": [1, [True, {}]]}}
    state = TrainState(step=7, position=2**60, config={"a": {"b": None}}, extra=extra)
    path = save_split(tmp_path, draw(0), 2, state=state)
    assert path.name == "step_000007"
    assert read_state(path) == state
    ranks = split(draw(0), 2, seed=0)
    assert on_ranks(2, lambda mesh: load(path, fragments=ranks[mesh.rank], mesh=mesh)) == [state, state]


@pytest.mark.parametrize(
    "extra", [{"a": (1, 2)}, {1: 2}, {"a": math.nan}, {"a": math.inf}, {"a": torch.zeros(1)}], ids=str
)
def test_state_that_json_would_change_is_refused(tmp_path: Path, extra: dict) -> None:
    state = dataclasses.replace(STATE, extra=extra)
    with pytest.raises(RuntimeError, match="a checkpoint's extra must"):
        save_split(tmp_path, draw(0), 2, state=state)


def test_a_rank_with_nothing_writes_no_file(tmp_path: Path) -> None:
    path = save_split(tmp_path, draw(0), 3)
    names = sorted(file.name for file in path.iterdir())
    assert names == ["manifest.json", "manifest.sha256", "rank_00000.safetensors", "rank_00001.safetensors"]


def test_each_file_is_read_back_by_the_next_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a network file system its writer would be answered from its own memory."""
    ranks: dict[int, int] = {}
    read: list[tuple[int, str]] = []
    check = storage.check_file

    def noted(file: Path, entry: FileEntry) -> None:
        read.append((ranks[threading.get_ident()], file.name))
        check(file, entry)

    def work(mesh: ThreadMesh) -> None:
        ranks[threading.get_ident()] = mesh.rank
        save(tmp_path, state=STATE, fragments=split(draw(1), 2, seed=0)[mesh.rank], mesh=mesh, keep=1)

    monkeypatch.setattr(storage, "check_file", noted)
    on_ranks(2, work)
    assert sorted(read) == [(0, "rank_00001.safetensors"), (1, "rank_00000.safetensors")]


def test_keep_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"checkpoint.keep must be at least 1, but is 0"):
        save_split(tmp_path, draw(0), 1, keep=0)


@pytest.mark.parametrize(
    "full", ["rank_00000.safetensors", "rank_00002.safetensors", "manifest.json", "manifest.sha256", "latest.partial"]
)
def test_a_full_disk_fails_all_ranks_alike_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    before = save_split(tmp_path, draw(1), 4, state=dataclasses.replace(STATE, step=50))
    named = (tmp_path / "latest").read_bytes()

    def open_on_a_full_disk(path: Path, mode: str):
        if mode == "xb" and path.name == full:
            path.touch()
            return builtins.open("/dev/full", "wb")
        return builtins.open(path, mode)

    monkeypatch.setattr(storage, "open", open_on_a_full_disk, raising=False)
    ranks = split(draw(2), 4, seed=0)
    outcome = try_ranks(4, lambda m: save(tmp_path, state=STATE, fragments=ranks[m.rank], mesh=m, keep=1))
    for error in outcome.errors:
        with pytest.raises(
            RuntimeError, match=rf"{full} needs \d+ bytes \(\d+ are free\) .*No space.*: free space there"
        ):
            raise error or AssertionError("a rank did not notice")
    assert all(calls == outcome.calls[0] for calls in outcome.calls)
    assert not (tmp_path / "step_000100.partial").exists()
    assert (tmp_path / "latest").read_bytes() == named
    assert latest(tmp_path) == before
    assert same(load_split(before, 2), draw(1))
    monkeypatch.undo()
    assert latest(tmp_path) == before
    assert same(load_split(save_split(tmp_path, draw(2), 2), 2), draw(2))


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        RuntimeError, match=r"step_000100.partial cannot be made \(.*\): give this user a writable folder"
    ):
        save_split(tmp_path / "file", draw(0), 2)


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_no_pickle_is_ever_decoded(tmp_path: Path) -> None:
    values, sprung = draw(0), tmp_path / "sprung"
    path = save_split(tmp_path / "c", values, 2)
    for name in ("model.pt", "rank_00002.safetensors", "data.pkl"):
        torch.save(Trap(sprung), path / name)
    assert latest(tmp_path / "c") == path
    assert same(load_split(path, 2), values)  # files that the manifest does not list are not opened

    torch.save(Trap(sprung), path / "rank_00000.safetensors")
    data = (path / "rank_00000.safetensors").read_bytes()
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["files"]["rank_00000.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_manifest(path, manifest)
    with pytest.raises(RuntimeError, match=r"rank_00000.safetensors cannot be read"):
        load_split(path, 2)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap works
