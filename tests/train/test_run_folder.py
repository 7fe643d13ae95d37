"""The folder of a run: what may begin in it, and what is said when it cannot be read or written."""

import errno
import os
from pathlib import Path

import pytest

from train.config import Config, load_config
from train.run_folder import RunFolder, find_changes, replace_file, write_folder

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_cpu.yaml"


def config(folder: Path, *overrides: str) -> Config:
    return load_config(TINY, [f"run.dir={folder}", f"data.shards={folder.parent}", *overrides])


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that has told something and has no checkpoint yet."""
    (tmp_path / "tokenizer.json").write_text("{}")  # of the shards
    found = RunFolder(tmp_path / "run")
    write_folder(config(found.path))
    found.metrics.write_text('{"step": 1}\n')
    return found


def add_checkpoint(folder: RunFolder) -> None:
    (folder.checkpoints / "step_000100").mkdir(parents=True)
    (folder.checkpoints / "step_000100" / "manifest.json").touch()


def test_a_folder_without_a_checkpoint_takes_a_run_with_any_config(folder: RunFolder):
    (folder.checkpoints / "step_000100.partial").mkdir(parents=True)  # killed in its first save
    assert find_changes(config(folder.path, "optim.lr=0.5")) == []


def test_a_folder_with_a_checkpoint_takes_only_its_own_run(folder: RunFolder):
    add_checkpoint(folder)
    assert find_changes(config(folder.path, "checkpoint.keep=9")) == ["checkpoint.keep was 3 and is 9"]
    with pytest.raises(ValueError, match=r"optim.lr was 0.001 and is 0.5"):
        find_changes(config(folder.path, "optim.lr=0.5"))


@pytest.mark.parametrize("torn", [b"", b"run:\n  dir: [a", b"run", b"\xff\xfe\x00"])
def test_a_torn_config_is_named_with_the_remedy(folder: RunFolder, torn: bytes):
    add_checkpoint(folder)
    folder.config.write_bytes(torn)
    with pytest.raises(RuntimeError, match=r"config.yaml must hold the config .* is damaged: remove it") as caught:
        find_changes(config(folder.path))
    assert str(folder.path) in str(caught.value)


def test_a_config_that_cannot_be_read_is_named_with_the_reason(folder: RunFolder):
    add_checkpoint(folder)
    folder.config.unlink()
    folder.config.mkdir()
    with pytest.raises(
        RuntimeError, match=rf"{folder.config} cannot be read \(Is a directory\): let this user read it"
    ):
        find_changes(config(folder.path))


def test_a_run_dir_that_is_a_file_is_the_users_to_change(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"run.dir must be a folder, but .*file is a file: .*another run.dir"):
        find_changes(config(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("place", ["/proc/run", "file/run"])
def test_a_folder_that_cannot_be_made_is_named_with_the_remedy(tmp_path: Path, place: str):
    (tmp_path / "file").touch()
    run = config(tmp_path / place)
    assert find_changes(run) == []
    with pytest.raises(RuntimeError, match=rf"{place} cannot be written \(.+\): .* choose another run.dir"):
        write_folder(run)


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "config.yaml"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RuntimeError, match=r"config.yaml cannot be written \(No space left on device\)"):
        replace_file(path, "new")
    assert path.read_text() == "old"
