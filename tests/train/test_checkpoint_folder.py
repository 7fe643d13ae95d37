"""train/checkpoint_folder.py with the rest of a checkpoint: at every instant, and after every damage, a whole one is found."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.disk_states import plant, recorded
from tests.train.thread_mesh import STATE, draw, load_split, on_ranks, same, save_split
from train.checkpoint import latest, read_state
from train.checkpoint_folder import candidates, prepare
from train.inventory import damages


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests write need not outlive them: that and when fsync is called is what counts, and recorded."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def found(folder: Path) -> int | None:
    """Which draw the newest whole checkpoint holds: its `extra` says so, its tensors must agree."""
    path = latest(folder)
    if path is None:
        return None
    number = read_state(path).extra["draw"]
    assert same(load_split(path, 2, seed=3), draw(number))
    return number


def save_draw(folder: Path, number: int, *, step: int, keep: int = 2) -> Path:
    state = dataclasses.replace(STATE, step=step, extra={"draw": number})
    return save_split(folder, draw(number), 3, state=state, keep=keep)


SCENARIOS = {
    "the first": ([], (1, 100, 2), {None, 1}),
    "a second": ([(1, 100)], (2, 200, 2), {1, 2}),
    "a second and the last one kept": ([(1, 100)], (2, 200, 1), {1, 2}),
    "a third, and the oldest goes": ([(1, 100), (2, 200)], (3, 300, 2), {2, 3}),
    "the same step again": ([(1, 100)], (2, 100, 1), {1, 2}),
    "the same step again, beside another": ([(1, 100), (2, 200)], (3, 200, 2), {2, 3}),
    "an earlier step after going back": ([(1, 100), (2, 200)], (3, 150, 2), {2, 3}),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_kill_at_any_instant_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: str
) -> None:
    before, (number, step, keep), expected = SCENARIOS[scenario]
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for earlier in before:
        save_draw(folder, earlier[0], step=earlier[1])
    with recorded(folder, monkeypatch) as recorder:
        save_draw(folder, number, step=step, keep=keep)
    assert len(recorder.states) >= 8

    assert not {path for path in recorder.unnamed if not path.endswith(".partial")}
    for tree in recorder.states:
        for name in tree:  # a folder with a plain name is never half there
            if re.fullmatch(r"step_\d+(\.old)?", name):
                listed = json.loads(tree[f"{name}/manifest.json"] or b"")["files"]
                assert tree.keys() >= {f"{name}/manifest.sha256", *(f"{name}/{file}" for file in listed)}

    seen = [found(plant(tree, tmp_path / f"killed{i}")) for i, tree in enumerate(recorder.states)]
    assert set(seen) == expected
    assert seen == sorted(seen, key=lambda one: one == number), "once the new one counts, the old one never does again"
    for i, tree in enumerate(recorder.torn):
        assert found(plant(tree, tmp_path / f"cut{i}")) in expected

    for i in range(len(recorder.states)):  # and the run goes on from there: as the same step, and as another
        killed, next_step = tmp_path / f"killed{i}", step if i % 2 else step + 50
        prepare(killed, next_step)
        assert found(killed) == seen[i], "clearing up changed what counts"
        save_draw(killed, 9, step=next_step)
        assert found(killed) == 9
        assert not [path for path in killed.iterdir() if path.name.endswith((".partial", ".old"))]


def test_a_replaced_checkpoint_comes_back_even_without_latest(tmp_path: Path) -> None:
    save_draw(tmp_path, 1, step=100).rename(tmp_path / "step_000100.old")
    (tmp_path / "latest").unlink()
    prepare(tmp_path, 200)
    assert {path.name for path in tmp_path.iterdir()} == {"step_000100", "step_000200.partial"}
    assert found(tmp_path) == 1


def test_what_the_disk_changes_is_found_before_it_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, named = save_draw(tmp_path, 1, step=100), (tmp_path / "latest").read_bytes()
    real = os.fsync

    def lying(handle: int) -> None:
        real(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.name == "rank_00001.safetensors":
            harm(path, flip_middle)

    monkeypatch.setattr(os, "fsync", lying)
    with pytest.raises(RuntimeError, match=r"step_000200.partial/rank_00001.safetensors does not match its checksum"):
        save_draw(tmp_path, 2, step=200)
    assert {path.name for path in tmp_path.iterdir()} == {"latest", before.name}
    assert (tmp_path / "latest").read_bytes() == named


def truncate(data: bytes) -> bytes:
    return data[:-1]


def empty(data: bytes) -> bytes:
    return b""


def zero(data: bytes) -> bytes:
    return bytes(len(data))


def flip_first(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def flip_middle(data: bytes) -> bytes:
    half = len(data) // 2
    return data[:half] + bytes([data[half] ^ 0x40]) + data[half + 1 :]


def flip_last(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 0x80])


def remove(data: bytes) -> None:
    return None


def halve(data: bytes) -> bytes:
    return data[: len(data) // 2]


def lengthen(data: bytes) -> bytes:
    return data + b"\n"


def zero_a_stretch(data: bytes) -> bytes:
    """As a block that never reached the disk."""
    third = len(data) // 3
    return data[:third] + bytes(third) + data[2 * third :]


def shift(data: bytes) -> bytes:
    """Every byte is there, one place further on."""
    return data[-1:] + data[:-1]


DAMAGES = [truncate, halve, empty, zero, zero_a_stretch, flip_first, flip_middle, flip_last, shift, lengthen, remove]
FILES = ["manifest.json", "manifest.sha256", "rank_00000.safetensors", "rank_00001.safetensors"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[bytes], bytes | None]
) -> None:
    before, newest = save_draw(tmp_path, 1, step=100), save_draw(tmp_path, 2, step=200)
    assert sorted(file.name for file in newest.iterdir()) == FILES
    harm(newest / name, damage)
    assert latest(tmp_path) == before
    assert re.search(rf"step_000200/.*{name}", caplog.text)
    if name.startswith("rank") and damage in (truncate, halve, empty, lengthen):
        assert re.search(rf"{name} must have \d+ bytes, but has \d+", caplog.text)
    assert on_ranks(3, lambda mesh: latest(tmp_path, mesh=mesh)) == [before] * 3
    with pytest.raises(RuntimeError, match="step_000200/"):
        load_split(newest, 2)
    assert found(tmp_path) == 1
    (sentence,) = damages(newest) or []
    assert f"step_000200/{name}" in sentence or (name == "manifest.sha256" and "manifest.json" in sentence)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint_is_a_damaged_one(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str):
    """Whole in itself, of the same length where it can be: the one before's, or a folder with its name."""
    before, newest = save_draw(tmp_path, 1, step=100), save_draw(tmp_path, 2, step=200)
    shutil.copy(before / name, newest / name)
    assert latest(tmp_path) == before
    (newest / name).unlink()
    (newest / name).mkdir()
    assert latest(tmp_path) == before
    assert len(re.findall(rf"step_000200/.*{name}", caplog.text)) >= 2


@pytest.mark.parametrize("first", FILES)
@pytest.mark.parametrize("second", FILES)
def test_of_two_damaged_checkpoints_each_is_named_and_the_third_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: str, second: str
) -> None:
    oldest, middle, newest = (save_draw(tmp_path, n, step=100 * n, keep=3) for n in (1, 2, 3))
    harm(middle / first, flip_middle)
    harm(newest / second, zero)
    assert on_ranks(2, lambda mesh: latest(tmp_path, mesh=mesh)) == [oldest] * 2
    assert re.search(rf"step_000300/.*{second}", caplog.text)
    assert re.search(rf"step_000200/.*{first}", caplog.text)
    assert found(tmp_path) == 1


def harm(file: Path, damage: Callable[[bytes], bytes | None]) -> None:
    harmed = damage(file.read_bytes())
    file.unlink()
    if harmed is not None:
        file.write_bytes(harmed)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_latest_is_named_and_the_newest_whole_one_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes | None]
) -> None:
    save_draw(tmp_path, 1, step=100)
    newest = save_draw(tmp_path, 2, step=200)
    harm(tmp_path / "latest", damage)
    assert latest(tmp_path) == newest
    assert f"{tmp_path / 'latest'} is damaged" in caplog.text


def test_latest_decides_when_a_newer_step_lies_beside(tmp_path: Path) -> None:
    save_draw(tmp_path, 2, step=200)
    shutil.copytree(tmp_path / "step_000200", tmp_path / "aside")
    shutil.rmtree(tmp_path / "step_000200")
    before = save_draw(tmp_path, 1, step=100)
    (tmp_path / "aside").rename(tmp_path / "step_000200")
    assert latest(tmp_path) == before


def test_without_latest_the_newest_comes_first_and_of_a_step_the_one_with_the_plain_name(tmp_path: Path) -> None:
    for name in ("step_000100", "step_000100.old", "step_000090", "step_1000000", "step_000200.partial", "notes"):
        (tmp_path / name).mkdir()
    assert candidates(tmp_path) == ["step_1000000", "step_000100", "step_000100.old", "step_000090"]


def test_no_checkpoint_is_none_and_only_damaged_ones_are_an_error(tmp_path: Path) -> None:
    assert latest(tmp_path / "nowhere") is None
    (tmp_path / "step_000100.partial").mkdir()
    (tmp_path / "step_5").mkdir()
    assert latest(tmp_path) is None
    path = save_draw(tmp_path, 1, step=100)
    harm(path / "rank_00000.safetensors", flip_middle)
    with pytest.raises(
        RuntimeError, match=r"no checkpoint in .* is whole.*rank_00000.safetensors.*move the folder away"
    ):
        latest(tmp_path)
    shutil.rmtree(path)
    with pytest.raises(RuntimeError, match=r"latest names a checkpoint, but there is none"):
        latest(tmp_path)


def test_the_last_ones_stay_and_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / "step_000300.partial").mkdir()
    (tmp_path / "step_000300.partial" / "rank_00000.safetensors").write_bytes(b"half")
    (tmp_path / "latest.partial").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("the user's own")
    for number, step in enumerate([100, 999_999, 1_000_000, 1_000_001]):
        save_draw(tmp_path, number, step=step, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "step_1000000", "step_1000001", "notes.txt"}
    assert found(tmp_path) == 3


def test_the_newest_is_the_one_with_the_highest_step(tmp_path: Path) -> None:
    for number, step in enumerate([100, 999_999, 1_000_000]):
        save_draw(tmp_path, number, step=step, keep=3)
    (tmp_path / "latest").unlink()
    assert found(tmp_path) == 2


def test_steps_of_a_course_that_was_left_are_removed(tmp_path: Path) -> None:
    for number, step in enumerate([100, 200, 300]):
        save_draw(tmp_path, number, step=step, keep=3)
    save_draw(tmp_path, 7, step=150, keep=3)
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "step_000100", "step_000150"}
    assert found(tmp_path) == 7


def test_sha256sum_checks_latest_and_the_manifest(tmp_path: Path) -> None:
    path = save_draw(tmp_path, 1, step=100)
    for folder, sums in ((tmp_path, "latest"), (path, "manifest.sha256")):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", sums], cwd=folder, check=True)
