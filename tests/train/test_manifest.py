"""train/manifest.py: a manifest that is not exactly what docs/checkpoint_format.md allows is refused; the document is true."""

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.fragments import Fragment
from tests.train.thread_mesh import STATE, draw, load_split, on_ranks, same, save_split, write_manifest
from train.checkpoint import TrainState, latest, read_tensors, save
from train.manifest import read_manifest

DOCUMENT = Path(__file__).parents[2] / "docs" / "checkpoint_format.md"
NAME = "master/embedding.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_split(tmp_path_factory.mktemp("manifest"), draw(0), 3)


def pieces_of(manifest: dict) -> list[dict]:
    return manifest["tensors"][NAME]["pieces"]


def rename_file(manifest: dict, name: str) -> None:
    manifest["files"][name] = manifest["files"].pop("rank_00000.safetensors")
    for entry in manifest["tensors"].values():
        for piece in entry["pieces"]:
            piece["file"] = name if piece["file"] == "rank_00000.safetensors" else piece["file"]


FAULTS: dict[str, tuple[Callable[[dict], object], str]] = {
    "another format": (lambda m: m.update(format="zip"), "must say format 'switchyard-checkpoint'"),
    "a later version": (lambda m: m.update(version=2), "has format version 2 and this program reads version 1"),
    "an unknown field": (lambda m: m.update(colour="red"), r"breaks the format at colour \(Extra inputs"),
    "a missing field": (lambda m: m.pop("position"), r"breaks the format at position \(Field required"),
    "a number as text": (lambda m: m.update(step="100"), "breaks the format at step"),
    "a negative position": (lambda m: m.update(position=-1), "breaks the format at position"),
    "another config": (lambda m: m["config"].update(a=1), "config_sha256 in .* must be the checksum of its config"),
    "an unknown dtype": (lambda m: m["tensors"][NAME].update(dtype="F8"), rf"at tensors.{NAME}.dtype"),
    "a gap": (lambda m: pieces_of(m).pop(0), rf"{NAME} in .*manifest.json .* elements \[0, \d+\) of 21 are missing"),
    "a gap at the end": (lambda m: pieces_of(m).pop(), rf"{NAME} in .* elements \[\d+, 21\) of 21 are missing"),
    "an overlap": (lambda m: pieces_of(m).append(pieces_of(m)[0]), rf"{NAME} in .* elements .* of 21 are there twice"),
    "a piece too long": (
        lambda m: pieces_of(m)[-1].update(length=99),
        rf"{NAME} in .* has 21 elements, but a range ends at",
    ),
    "a piece of no length": (lambda m: pieces_of(m)[0].update(length=0), rf"at tensors.{NAME}.pieces.0.length"),
    "a file that is not listed": (lambda m: m["files"].pop("rank_00000.safetensors"), "not among its files"),
    "a file elsewhere": (
        lambda m: rename_file(m, "../rank_00000.safetensors"),
        r"pieces.0.file \(String should match pattern",
    ),
    "a pickle": (lambda m: rename_file(m, "rank_00000.pt"), r"pieces.0.file \(String should match pattern"),
    "a name that is a path": (
        lambda m: m["tensors"].update({"master/../x": m["tensors"][NAME]}),
        "at tensors.master/../x",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_manifest_that_breaks_the_format_is_refused(checkpoint: Path, tmp_path: Path, fault: str) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    change, sentence = FAULTS[fault]
    change(manifest)
    write_manifest(tmp_path, manifest)
    with pytest.raises(RuntimeError, match=sentence) as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def boxed(*boxes: Any) -> Callable[[dict], object]:
    """Puts pieces of these boxes in the place of the tensor's, each with all its elements, or (box, start, length)."""

    def change(manifest: dict) -> None:
        pieces = []
        for given in boxes:
            box, start, length = given if isinstance(given, tuple) else (given, 0, math.prod(b - a for a, b in given))
            pieces.append({"file": "rank_00000.safetensors", "key": "k", "start": start, "length": length, "box": box})
        manifest["tensors"][NAME]["pieces"] = pieces

    return change


LEFT, RIGHT = [[0, 7], [0, 2]], [[0, 7], [2, 3]]
BOXES: dict[str, tuple[Callable[[dict], object], str]] = {
    "none": (boxed(LEFT, RIGHT), ""),
    "two parts of one": (boxed((LEFT, 9, 5), RIGHT, (LEFT, 0, 9)), ""),
    "rows and columns": (boxed([[0, 4], [0, 2]], [[4, 7], [0, 2]], RIGHT), ""),
    "an overlap": (
        boxed(LEFT, [[0, 7], [1, 3]]),
        r"the elements \[\[0, 7\], \[1, 2\]\] of its shape \[7, 3\] are there twice",
    ),
    "a gap": (boxed([[0, 6], [0, 2]], RIGHT), r"the elements \[\[6, 7\], \[0, 2\]\] of its shape \[7, 3\] are missing"),
    "a gap in a box": (boxed((LEFT, 0, 13), RIGHT), r"the elements \[\[6, 7\], \[1, 2\]\] of its shape .* are missing"),
    "one box twice": (boxed(LEFT, LEFT, RIGHT), r"the elements \[\[0, 7\], \[0, 2\]\] of its shape .* are there twice"),
    "beyond the shape": (boxed(LEFT, [[0, 7], [2, 4]]), r"must lie inside, but one is \[\[0, 7\], \[2, 4\]\]"),
    "one dimension": (boxed([[0, 7]]), r"has shape \[7, 3\], and a box of it must lie inside, but one is \[\[0, 7\]\]"),
    "three dimensions": (boxed([[0, 7], [0, 3], [0, 1]]), "must lie inside, but one is"),
    "turned round": (boxed(LEFT, ([[0, 7], [3, 2]], 0, 7)), r"must lie inside, but one is \[\[0, 7\], \[3, 2\]\]"),
    "a range beyond its box": (boxed(LEFT, (RIGHT, 0, 8)), "of 7 elements, but a range ends at 8"),
    "a side of three": (boxed(([[0, 7, 9], [0, 3]], 0, 21)), r"breaks the format at .*box.0 \("),
    "a negative side": (boxed(([[-1, 7], [0, 3]], 0, 21)), r"breaks the format at .*box.0.0 \("),
    "no box for one half": (lambda m: (boxed(LEFT, RIGHT)(m), pieces_of(m)[1].pop("box")), "are missing"),
}


@pytest.mark.parametrize("fault", BOXES)
def test_boxes_that_do_not_hold_each_element_once_are_refused(checkpoint: Path, tmp_path: Path, fault: str) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    change, sentence = BOXES[fault]
    change(manifest)
    write_manifest(tmp_path, manifest)
    if not sentence:
        read_manifest(tmp_path)
        return
    with pytest.raises(RuntimeError, match=sentence) as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith((f"{NAME} in {tmp_path}", f"{tmp_path / 'manifest.json'} breaks"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: pieces_of(m)[0].update(length=pieces_of(m)[0]["length"] + 1), "must have dtype F32 and shape"),
        (lambda m: pieces_of(m)[0].update(key="missing"), "rank_00000.safetensors cannot be read"),
        (lambda m: m["tensors"]["master/bias"].update(dtype="I32"), r"master/bias is I32 \[1\] in the checkpoint"),
    ],
    ids=["length", "key", "dtype"],
)
def test_a_manifest_that_lies_about_its_files_is_refused(
    tmp_path: Path, change: Callable[[dict], object], sentence: str
) -> None:
    path = save_split(tmp_path, draw(0), 3)
    manifest = json.loads((path / "manifest.json").read_bytes())
    change(manifest)
    if sentence.startswith("must have"):  # the next piece begins one later, so that the ranges still cover the tensor
        pieces_of(manifest)[1]["start"] += 1
        pieces_of(manifest)[1]["length"] -= 1
    write_manifest(path, manifest)
    with pytest.raises(RuntimeError, match=sentence):
        load_split(path, 2)


def test_the_documents_ten_lines_and_the_reader_assemble_boxes(tmp_path: Path) -> None:
    """Columns 0 and 1 of a (4, 3) tensor in two ranges, column 2 cut into two boxes."""
    weight = torch.arange(12.0).view(4, 3)
    left, above, below = ((0, 4), (0, 2)), ((0, 1), (2, 3)), ((1, 4), (2, 3))
    flat = weight[:, :2].flatten()
    held = [
        Fragment("w", (4, 3), 0, {"master": flat[:5]}, left),
        Fragment("w", (4, 3), 5, {"master": flat[5:]}, left),
        Fragment("w", (4, 3), 0, {"master": weight[:1, 2]}, above),
        Fragment("w", (4, 3), 0, {"master": weight[1:, 2]}, below),
    ]
    path = on_ranks(2, lambda m: save(tmp_path, state=STATE, fragments=held[m.rank :: 2], mesh=m, keep=1))[0]
    pieces = json.loads((path / "manifest.json").read_bytes())["tensors"]["master/w"]["pieces"]
    assert [(piece["box"], piece["start"]) for piece in pieces] == [
        ([[0, 1], [2, 3]], 0),
        ([[0, 4], [0, 2]], 0),
        ([[0, 4], [0, 2]], 5),
        ([[1, 4], [2, 3]], 0),
    ]
    names: dict = {}
    exec(block("python"), names)
    assert np.array_equal(names["read_tensor"](path, "master/w"), weight)
    assert torch.equal(read_tensors(path, kind="master")["w"], weight)


def test_the_box_of_the_whole_tensor_is_the_default(tmp_path: Path) -> None:
    path = save_split(tmp_path, draw(0), 3)
    manifest = json.loads((path / "manifest.json").read_bytes())
    assert all("box" not in piece for entry in manifest["tensors"].values() for piece in entry["pieces"])
    changed = copy.deepcopy(manifest)
    for piece in pieces_of(changed):
        piece["box"] = [[0, 7], [0, 3]]
    write_manifest(path, changed)
    assert same(load_split(path, 2), draw(0))


def test_a_box_of_the_whole_tensor_is_not_written(tmp_path: Path) -> None:
    held = Fragment("w", (2, 3), 0, {"master": torch.arange(6.0)}, ((0, 2), (0, 3)))
    path = on_ranks(1, lambda m: save(tmp_path, state=STATE, fragments=[held], mesh=m, keep=1))[0]
    (piece,) = json.loads((path / "manifest.json").read_bytes())["tensors"]["master/w"]["pieces"]
    assert piece == {"file": "rank_00000.safetensors", "key": "master/w@0", "start": 0, "length": 6}


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None, f"{DOCUMENT} has no block of {language}"
    return found.group(1)


def write_the_documents_example(folder: Path) -> Path:
    """Two ranks: the first holds elements 0 to 3 of a weight of shape (2, 3), the second the rest."""
    state = TrainState(
        step=100, position=1600, config={"run": {"seed": 1}}, extra={"tokenizer_id": "bytes", "world_size": 2}
    )
    weight = torch.arange(6.0)

    def save_one(mesh) -> Path:
        start, end = [(0, 4), (4, 6)][mesh.rank]
        kinds = {"master": weight, "exp_avg": weight / 2, "exp_avg_sq": weight / 4}
        held = Fragment("embedding.weight", (2, 3), start, {kind: values[start:end] for kind, values in kinds.items()})
        bias = {"router_bias": torch.tensor([0.5, -0.5])} if mesh.rank == 0 else None
        return save(folder, state=state, fragments=[held], mesh=mesh, keep=1, tensors=bias)

    return on_ranks(2, save_one)[0]


def test_the_documents_example_is_what_the_code_writes(tmp_path: Path) -> None:
    path = write_the_documents_example(tmp_path)
    assert block("json") == (path / "manifest.json").read_text()
    assert block("text") == (tmp_path / "latest").read_text()


def test_the_documents_ten_lines_read_a_tensor(tmp_path: Path) -> None:
    path = write_the_documents_example(tmp_path)
    assert latest(tmp_path) == path
    snippet = block("python")
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 16
    names: dict = {}
    exec(snippet, names)
    assert np.array_equal(names["read_tensor"](path, "master/embedding.weight"), [[0, 1, 2], [3, 4, 5]])
    assert names["read_tensor"](path, "state/router_bias").tolist() == [0.5, -0.5]


@pytest.mark.parametrize("name", ["embedding.weight", "blocks.0.value_experts.weight", "scale", "empty"])
def test_the_documents_ten_lines_read_every_shape(checkpoint: Path, name: str) -> None:
    names: dict = {}
    exec(block("python"), names)
    read = names["read_tensor"](checkpoint, f"exp_avg/{name}")
    expected = draw(0)["exp_avg", name]
    assert math.prod(read.shape) == expected.numel()
    assert read.tobytes() == expected.numpy().tobytes()
