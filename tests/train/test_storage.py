"""train/storage.py: tensor files hold every dtype, in pieces of bounded size, and a reader takes only what it asks for."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from model.fragments import Fragment
from model.parameters import Box
from tests.train.thread_mesh import STATE, on_ranks
from train import storage
from train.checkpoint import load, read_tensors, save
from train.coverage import parts_of
from train.manifest import Manifest, TensorEntry, read_manifest
from train.storage import Part


def test_named_tensors_of_every_dtype_come_back(tmp_path: Path) -> None:
    tensors = {
        "router_bias": torch.randn(3, 5),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "memory.16": torch.randn(2, 3).to(torch.bfloat16),
        "mask": torch.tensor([True, False, True]),
        "rng": torch.arange(5, dtype=torch.uint8),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "none": torch.zeros(0, 3, dtype=torch.float16),
    }
    bring = [{k: v for i, (k, v) in enumerate(tensors.items()) if i % 2 == rank} for rank in range(2)]
    path = on_ranks(2, lambda m: save(tmp_path, state=STATE, fragments=[], mesh=m, keep=1, tensors=bring[m.rank]))[0]
    loaded = read_tensors(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    for file in path.glob("*.safetensors"):  # aligned, so that other readers can map them as they are
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for entry in json.loads(data[8 : 8 + size]).values():
            start, end = entry["data_offsets"]
            assert (8 + size + start) % ((end - start) // math.prod(entry["shape"])) == 0


def test_views_may_be_strided(tmp_path: Path) -> None:
    source, target = torch.arange(20.0), torch.zeros(20)
    for_saving = [Fragment("w", (10,), 0, {"master": source[::2]})]
    for_loading = [Fragment("w", (10,), 0, {"master": target[1::2]})]
    path = on_ranks(1, lambda m: save(tmp_path, state=STATE, fragments=for_saving, mesh=m, keep=1))[0]
    on_ranks(1, lambda m: load(path, fragments=for_loading, mesh=m))
    assert torch.equal(target[1::2], source[::2])
    assert not target[::2].any()


class SpiedSlice:
    """A tensor in a file that counts the elements taken from it."""

    taken = 0

    def __init__(self, stored) -> None:
        self.stored, self.get_shape, self.get_dtype = stored, stored.get_shape, stored.get_dtype

    def __getitem__(self, wanted: slice) -> torch.Tensor:
        values = self.stored[wanted]
        SpiedSlice.taken += values.numel()
        return values


class SpiedFile:
    def __init__(self, file: Path, framework: str) -> None:
        self.opened = safe_open(file, framework=framework)

    def __enter__(self) -> "SpiedFile":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def get_slice(self, key: str) -> SpiedSlice:
        return SpiedSlice(self.opened.get_slice(key))


def test_a_reader_reads_only_its_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, ends = torch.arange(20.0), [0, 7, 13, 20]

    def held(rank: int) -> list[Fragment]:
        return [Fragment("w", (4, 5), ends[rank], {"master": weight[ends[rank] : ends[rank + 1]]})]

    monkeypatch.setattr(storage, "PIECE_BYTES", 16)
    path = on_ranks(3, lambda m: save(tmp_path, state=STATE, fragments=held(m.rank), mesh=m, keep=1))[0]
    (path / "rank_00002.safetensors").unlink()  # elements 13 to 19: nobody asks for them
    monkeypatch.setattr(storage, "safe_open", SpiedFile)
    monkeypatch.setattr(SpiedSlice, "taken", 0)
    wanted = torch.zeros(8)
    storage.read_parts(path, read_manifest(path), parts_of([Fragment("w", (4, 5), 5, {"master": wanted})], {}))
    assert wanted.tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert SpiedSlice.taken == 8


@pytest.mark.parametrize(
    ("stored_box", "wanted_box", "rows_taken"),
    [
        (
            None,
            ((1, 3), (2, 5)),
            2 * 5,
        ),  # whole rows of the map are asked for, and of them only the columns are touched
        (((0, 4), (2, 5)), ((1, 3), (0, 5)), 2 * 3),
        (((2, 4), (0, 5)), ((1, 3), (4, 5)), 1 * 5),
        (((0, 4), (0, 2)), ((0, 4), (2, 5)), 0),
    ],
)
def test_of_another_box_only_the_rows_that_meet_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored_box: Box | None, wanted_box: Box, rows_taken: int
) -> None:
    """Of a tensor of (4, 5), one box is stored and another is wanted: what both have is copied."""
    weight = torch.arange(20.0).view(4, 5)
    stored = Part("master/w", (4, 5), 0, weight[_slices(stored_box)].flatten(), stored_box)
    written = storage.write_tensors(tmp_path / "one.safetensors", [stored])
    entry = TensorEntry(shape=[4, 5], dtype="F32", pieces=written.pieces["master/w"])
    manifest = Manifest.model_construct(tensors={"master/w": entry})
    monkeypatch.setattr(storage, "safe_open", SpiedFile)
    monkeypatch.setattr(SpiedSlice, "taken", 0)
    found = torch.full((4, 5), -1.0)
    values = torch.full((found[_slices(wanted_box)].numel(),), -1.0)
    storage.read_parts(tmp_path, manifest, [Part("master/w", (4, 5), 0, values, wanted_box)])
    found[_slices(wanted_box)] = values.view(found[_slices(wanted_box)].shape)
    both = torch.zeros(4, 5, dtype=torch.int)
    both[_slices(stored_box)] += 1
    both[_slices(wanted_box)] += 1
    assert torch.equal(found, torch.where(both == 2, weight, -1.0))
    assert SpiedSlice.taken == rows_taken


def _slices(box: Box | None) -> tuple[slice, ...]:
    return (slice(None),) if box is None else tuple(slice(*side) for side in box)


def test_a_slice_of_a_file_is_a_view_of_its_map(tmp_path: Path) -> None:
    """So rows that are asked for do not come into memory whole when only some of their columns are copied."""
    written = storage.write_tensors(tmp_path / "one.safetensors", [Part("master/w", (32,), 0, torch.arange(32.0))])
    with safe_open(tmp_path / "one.safetensors", framework="pt") as file:
        stored = file.get_slice(written.pieces["master/w"][0].key)
        first, second = stored[5:], stored[9:]
        assert second.data_ptr() - first.data_ptr() == 4 * 4


def test_one_piece_at_a_time_of_at_most_32_mib_is_in_memory(tmp_path: Path) -> None:
    weight = torch.arange(20 * 2**20, dtype=torch.float32)  # 80 MiB: two full pieces and a half
    one = Fragment("w", (20, 2**20), 0, {"master": weight})
    path = on_ranks(1, lambda m: save(tmp_path, state=STATE, fragments=[one], mesh=m, keep=1))[0]
    pieces = read_manifest(path).tensors["master/w"].pieces
    assert [piece.length * 4 for piece in pieces] == [32 * 2**20, 32 * 2**20, 16 * 2**20]
    assert torch.equal(read_tensors(path, kind="master")["w"], weight.reshape(20, 2**20))
