"""The cache of fetched shards: whole or absent, bounded, shared, and nothing in use removed."""

import contextlib
import fcntl
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import cache as cache_module
from data import remote
from data.cache import ShardCache
from data.config import DataConfig
from data.shards import ShardInfo
from data.split import open_train

SIZE = 1000


@pytest.fixture
def far(tmp_path: Path) -> Path:
    """Where the shards lie: ten files of SIZE bytes; each fetch leaves a line in `log`."""
    folder = tmp_path / "far"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.tar").write_bytes(bytes([number]) * SIZE)
    return folder


def make_cache(far: Path, *, shards: float, command: str = "cat") -> ShardCache:
    folder = far.parent / "cache"
    folder.mkdir(exist_ok=True)
    return ShardCache(folder, int(shards * SIZE), f"pipe:echo {{}} >> {far}/log; {command} {far}/{{}}")


def info(far: Path, number: int) -> ShardInfo:
    content = bytes([number]) * SIZE
    return ShardInfo(f"{number}.tar", SIZE, hashlib.sha256(content).hexdigest(), 1, 1, "")


def use(cache: ShardCache, far: Path, number: int) -> None:
    with cache.hold(info(far, number)) as path:
        assert path.read_bytes() == bytes([number]) * SIZE


def fetched(far: Path) -> list[int]:
    return [int(line.split(".")[0]) for line in (far / "log").read_text().splitlines()]


def kept(far: Path) -> list[int]:
    return sorted(int(path.name.split("-")[0]) for path in (far.parent / "cache").glob("*.tar"))


def test_a_shard_is_fetched_once(far):
    cache = make_cache(far, shards=3)
    for number in (1, 2, 1, 2, 1):
        use(cache, far, number)
    assert fetched(far) == [1, 2]
    assert sorted(path.name.split("-")[0] for path in cache.folder.iterdir()) == ["1", "2"]


def test_the_shard_that_was_used_longest_ago_goes_first(far):
    cache = make_cache(far, shards=3.5)
    for number in (1, 2, 3, 1, 4):
        use(cache, far, number)
        time.sleep(0.01)
    assert kept(far) == [1, 3, 4]
    use(cache, far, 2)
    assert kept(far) == [1, 2, 4]


def test_the_limit_holds_at_every_moment(far):
    cache = make_cache(far, shards=2)
    for number in (*range(10), *range(10)):
        use(cache, far, number)
        assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 2 * SIZE


def test_room_is_counted_and_taken_under_one_lock(far, monkeypatch):
    """Two processes that counted at the same time would both take the last room."""
    cache = make_cache(far, shards=2)
    moments = []

    def locked(name: str) -> None:
        moments.append(name)
        with pytest.raises(BlockingIOError), (cache.folder / ".room.lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    count, take = ShardCache._make_room, os.truncate
    monkeypatch.setattr(ShardCache, "_make_room", lambda self, needed: (locked("counted"), count(self, needed))[1])
    monkeypatch.setattr(os, "truncate", lambda path, size: (locked("taken"), take(path, size))[1])
    use(cache, far, 1)
    assert moments == ["counted", "taken"]


def test_what_was_never_finished_goes_before_any_shard(far):
    cache = make_cache(far, shards=2)
    use(cache, far, 1)
    left = cache.folder / "9-0.partial"
    left.write_bytes(bytes(SIZE))
    os.utime(left, (time.time() + 100, time.time() + 100))  # the last of all by its time
    use(cache, far, 2)
    assert kept(far) == [1, 2]
    assert not left.exists()


def test_what_is_open_is_never_removed(far):
    cache = make_cache(far, shards=2)
    with cache.hold(info(far, 1)) as path:
        for number in (2, 3, 4):
            use(cache, far, number)
        assert path.exists()
        assert kept(far) == [1, 4]


def test_room_that_others_use_is_waited_for_and_then_named(far, monkeypatch):
    monkeypatch.setattr(cache_module, "ROOM_WAIT_S", 0.3)
    cache = make_cache(far, shards=1)
    with cache.hold(info(far, 1)):
        with pytest.raises(
            RuntimeError, match=r"data\.cache_gb must hold .* but it is 1e-06 and 2\.tar of 1e-06 GB needs 1e-06 GB"
        ):
            use(cache, far, 2)
        assert kept(far) == [1]
    use(cache, far, 2)
    assert kept(far) == [2]


def test_a_shard_larger_than_the_limit_is_refused_at_once(far):
    with pytest.raises(RuntimeError, match=r"raise data\.cache_gb"):
        use(make_cache(far, shards=0.9), far, 1)


def test_a_limit_below_a_shard_is_refused_when_the_set_is_opened(write_shards, random_shards, tmp_path):
    folder = write_shards(random_shards)
    config = DataConfig(
        shards=f"pipe:cat {folder}/{{}}", heldout="h", sequence_length=7, global_batch_size=8, streams=4,
        cache=str(tmp_path / "cache"), cache_gb=1e-6, allow_pipe=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"data\.cache_gb must hold each shard, but it is 1e-06 and train-\d+\.tar"):
        open_train(config)


def use_all(cache: ShardCache, far: Path, rounds: int, barrier) -> None:
    barrier.wait()
    for _ in range(rounds):
        for number in range(6):
            use(cache, far, number)


@pytest.mark.parametrize(("shards", "rounds"), [(6, 2), (3, 6)])
def test_processes_share_what_any_of_them_fetches(far, shards, rounds):
    """With room for all, each shard is fetched once; with less, they evict each other's and still read only what is whole."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    cache = make_cache(far, shards=shards)
    processes = [context.Process(target=use_all, args=(cache, far, rounds, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    if shards == 6:
        assert sorted(fetched(far)) == list(range(6))
    assert len(kept(far)) <= shards
    assert not [path for path in cache.folder.iterdir() if path.suffix != ".tar"]


FETCH = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.data.test_cache import info, make_cache, use
far = Path(sys.argv[2])
use(make_cache(far, shards=2, command="sleep 60; cat"), far, 1)
"""


def test_what_a_killed_process_left_is_no_shard_and_takes_no_room(far):
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen([sys.executable, "-c", FETCH, root, str(far)], cwd=root, start_new_session=True)
    partial = far.parent / "cache"
    deadline = time.monotonic() + 60
    while not list(partial.glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.02)
    (left,) = partial.glob("*.partial")
    while not left.stat().st_size and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left.stat().st_size == SIZE  # before a byte has come
    with pytest.raises(BlockingIOError), left.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # while it lives, its room is its own
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert left.exists()
    assert kept(far) == []
    cache = make_cache(far, shards=2)
    use(cache, far, 2)
    use(cache, far, 3)
    assert kept(far) == [2, 3]
    assert not left.exists()
    use(cache, far, 1)


def test_a_fetch_that_fails_leaves_nothing(far, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    cache = make_cache(far, shards=2, command="head -c 10")
    with pytest.raises(RuntimeError, match=r"it has 10 bytes and the index says 1000"):
        use(cache, far, 1)
    assert list(cache.folder.iterdir()) == []


def test_a_disk_that_is_full_is_named(far, monkeypatch):
    cache = make_cache(far, shards=2)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "fetch", full)
    with pytest.raises(
        RuntimeError, match=rf"1\.tar cannot be kept in data\.cache {cache.folder} \(No space left on device\)"
    ):
        use(cache, far, 1)
    assert list(cache.folder.iterdir()) == []


def test_a_file_removed_between_open_and_lock_is_fetched_again(far, monkeypatch):
    cache = make_cache(far, shards=2)
    use(cache, far, 1)
    lock, removed = fcntl.flock, []

    def flock(file, kind):
        if kind == fcntl.LOCK_SH and not removed:
            removed.append(True)
            next(cache.folder.glob("*.tar")).unlink()
        lock(file, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    use(cache, far, 1)
    assert fetched(far) == [1, 1]


def test_equal_names_of_different_shards_do_not_meet(far):
    cache = make_cache(far, shards=4)
    use(cache, far, 1)
    other = far.parent / "other"
    other.mkdir()
    (other / "1.tar").write_bytes(bytes([7]) * SIZE)
    changed = ShardInfo("1.tar", SIZE, hashlib.sha256(bytes([7]) * SIZE).hexdigest(), 1, 1, "")
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(cache.hold(info(far, 1)))
        new = stack.enter_context(ShardCache(cache.folder, 4 * SIZE, f"pipe:cat {other}/{{}}").hold(changed))
        assert (old.read_bytes()[0], new.read_bytes()[0]) == (1, 7)
