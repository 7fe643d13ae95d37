"""Whether a set of shards can be read here, found out without reading it."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from data.split import look_at
from tests.data.index_by_hand import rewrite_index


def test_equal_shards_look_equal_and_others_do_not(write_shards: Callable[..., Path]):
    first, same = (write_shards([[[1, 2]], [[3]]], name=name) for name in "ab")
    other = write_shards([[[1, 2]], [[4]]], name="c")
    assert look_at(str(first)) == look_at(str(same)) != look_at(str(other))


def test_a_missing_folder_and_a_missing_shard_are_named(write_shards: Callable[..., Path], tmp_path: Path):
    with pytest.raises(ValueError, match=r"no folder of shards at .*nowhere"):
        look_at(str(tmp_path / "nowhere"))
    folder = write_shards([[[1, 2]], [[3]], [[4]]])
    tars = sorted(folder.glob("*.tar"))
    tars[1].unlink()
    with pytest.raises(RuntimeError, match=f"{tars[1].name} is missing"):
        look_at(str(folder))
    assert look_at(str(folder), tolerant=True)


def test_a_shard_that_cannot_be_read_is_named(write_shards: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    """A disk that fails is played: permissions do not bind root."""
    folder = write_shards([[[1, 2]]])
    true_open = Path.open

    def refuse(path: Path, *arguments, **options):
        if path.suffix == ".tar":
            file = mock.mock_open()()
            file.read.side_effect = OSError(5, "Input/output error")
            return file
        return true_open(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(RuntimeError, match=r"\.tar must be readable, but it is not \(Input/output error\)"):
        look_at(str(folder))


def test_of_a_remote_set_only_the_index_is_fetched(write_shards: Callable[..., Path], tmp_path: Path):
    folder = write_shards([[[1, 2]], [[3]]])
    log = tmp_path / "log"
    place = f"pipe:echo {{}} >> {log}; cat {folder}/{{}}"
    assert look_at(place)
    assert log.read_text().split() == ["index.json"]
    rewrite_index(folder, {"name": "$(reboot).tar"})
    with pytest.raises(RuntimeError, match="names have letters"):
        look_at(place)
