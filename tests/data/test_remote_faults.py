"""Answers that are not what they must be, trouble of this node, and fetching ahead: what is kept, told, tried again."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from data import ahead, reader, remote
from data import cache as cache_module
from data.ahead import Ahead
from data.damage import NodeTrouble
from data.loader import train_batches
from data.order import shard_order
from data.reader import LineReader
from data.split import open_train
from tests.data.http_server import SEED, config_of, fails_times, local_rows, room_for, rows, whole

pytestmark = pytest.mark.usefixtures("no_waiting")


def without_length(content: bytes):
    """Half of a file whose length is not told: it looks whole."""

    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2])
        handler.close_connection = True

    return answer


@pytest.mark.parametrize("name", ["index.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["page", "half", "short length", "other tokenizer"])
def test_one_bad_answer_is_fetched_again_and_never_kept(folder, server, tmp_path, name, kind):
    content = (folder / name).read_bytes()
    answers = {
        "page": whole(b"<html>log in</html>"),
        "half": without_length(content),
        "short length": whole(content[: len(content) // 2]),
        "other tokenizer": whole(content.replace(b'"a": 98', b'"a": 99').replace(b'"b": 99', b'"b": 98')),
    }
    bad = answers[kind]
    server.faults.append(fails_times(name, 1, bad))
    assert rows(config_of(server.url, tmp_path)) == local_rows(folder, tmp_path)
    changes_nothing = kind == "other tokenizer" and name == "index.json"
    assert server.asked[name] == (1 if changes_nothing else 2)
    server.asked.clear()
    assert rows(config_of(server.url, tmp_path)) == local_rows(folder, tmp_path)
    assert server.asked == {"index.json": 1}


@pytest.mark.parametrize("name", ["index.json", "tokenizer.json", "train-000002.idx"])
def test_a_kept_file_that_the_disk_damaged_is_fetched_again(folder, server, tmp_path, name):
    rows(config_of(server.url, tmp_path))
    (kept,) = (tmp_path / "cache").glob(f"index-*/{name}")
    content = kept.read_bytes()
    for damaged in (b"x", content[:-9], bytes(len(content))):
        kept.write_bytes(damaged)
        assert rows(config_of(server.url, tmp_path)) == local_rows(folder, tmp_path)
        assert kept.read_bytes() == content


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 507, 520, 599])
def test_these_answers_may_pass(folder, server, tmp_path, status):
    server.faults.append(fails_times("train-000002.tar", 1, lambda h: h.send_error(status, "Busy")))
    assert rows(config_of(server.url, tmp_path)) == local_rows(folder, tmp_path)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 501, 505])
def test_these_answers_are_the_last(folder, server, tmp_path, status):
    server.faults.append(fails_times("train-000002.tar", 1, lambda h: h.send_error(status, "No")))
    with pytest.raises(RuntimeError, match=rf"the server answers {status} No"):
        rows(config_of(server.url, tmp_path))


def test_a_redirect_without_end_is_one_line(server, tmp_path):
    def again(handler):
        handler.send_response(302)
        handler.send_header("Location", handler.path)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    server.faults.append(fails_times("index.json", 99, again))
    with pytest.raises(RuntimeError, match=r"the server answers 302") as error:
        rows(config_of(server.url, tmp_path))
    assert "\n" not in str(error.value)


def passed_over(found: list[list], expected: list[list]) -> list[int]:
    """The micro-steps whose rows differ."""
    return [step for step, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other]


def test_a_shard_that_could_not_be_fetched_is_tried_again_after_some_minutes(folder, server, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(reader.time, "monotonic", lambda: now[0])
    server.faults.append(fails_times("train-000002.tar", 5, lambda h: h.send_error(503)))
    config = config_of(server.url, tmp_path, max_skipped_shards=1)
    expected = local_rows(folder, tmp_path)
    batches = train_batches(
        config, open_train(config), seed=SEED, accumulation_steps=1, rank=0, num_ranks=1, position=0
    )
    found, asked = [], []
    for _ in range(20):
        batch = next(batches)
        found.append([batch.tokens_BS.tolist(), batch.targets_BS.tolist()])
        asked.append(server.asked["train-000002.tar"])
        now[0] += reader.RETRY_S / 3
    lost = passed_over(found, [step[:2] for step in expected])
    assert lost
    assert asked[lost[0]] == asked[lost[-1]] == 5
    assert asked[-1] == 6
    assert len(lost) <= 3
    assert len(batches.damaged) == 1


def test_a_full_disk_is_an_error_however_many_shards_may_be_skipped(folder, server, tmp_path, monkeypatch):
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "fetch", full)
    with pytest.raises(NodeTrouble, match=r"cannot be kept in data\.cache .* \(No space left on device\)"):
        rows(config_of(server.url, tmp_path, max_skipped_shards=5))


def test_no_room_is_an_error_however_many_shards_may_be_skipped(folder, server, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "ROOM_WAIT_S", 0.0)
    config = config_of(server.url, tmp_path, max_skipped_shards=5, cache_gb=room_for(1, tmp_path))
    split = open_train(config)
    index = split.sources[0].index
    assert index.cache is not None
    largest = max(index.shards, key=lambda shard: shard.bytes)
    with index.cache.hold(largest), pytest.raises(NodeTrouble, match=r"data\.cache_gb must hold the shards"):
        for _ in train_batches(config, split, seed=SEED, accumulation_steps=1, rank=0, num_ranks=1, position=0):
            pass


def denied(path: object, *_: object) -> None:
    raise PermissionError(13, "Permission denied", str(path))


def test_kept_shards_of_another_user_are_read(folder, server, tmp_path, monkeypatch):
    expected = rows(config_of(server.url, tmp_path))
    monkeypatch.setattr(os, "utime", denied)
    server.asked.clear()
    assert rows(config_of(server.url, tmp_path)) == expected
    assert set(server.asked) == {"index.json"}


def test_a_kept_shard_that_may_not_be_read_is_a_sentence(folder, server, tmp_path, monkeypatch):
    rows(config_of(server.url, tmp_path))
    plain = Path.open

    def read(path: Path, *arguments: Any, **options: Any):
        return denied(path) if path.suffix == ".tar" else plain(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", read)
    with pytest.raises(NodeTrouble, match=r"cannot be kept in data\.cache .*Permission denied.*: free space there, or"):
        rows(config_of(server.url, tmp_path, max_skipped_shards=5))


def test_a_background_child_ends_with_its_command(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    for number, output in enumerate(("", ">/dev/null")):  # one that holds the output open, and one that does not
        pids = tmp_path / f"pids{number}"
        place = f"pipe:cat {folder}/{{}}; sleep 600 {output} & echo $! >> {pids}"
        config = config_of(place, tmp_path, cache=str(tmp_path / f"cache{number}"))
        if output:
            place = f"pipe:sleep 600 {output} & echo $! >> {pids}; cat {folder}/{{}}"
            config = config_of(place, tmp_path, cache=str(tmp_path / f"cache{number}"))
            open_train(config)
        else:
            with pytest.raises(RuntimeError, match=r"printed nothing for 0\.3 s"):
                open_train(config)
        deadline = time.monotonic() + 20.0
        while left := [pid for pid in pids.read_text().split() if is_running(pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.01)


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def join_ahead() -> None:
    for thread in threading.enumerate():
        if thread.name == "shards ahead":
            thread.join(20.0)


@pytest.mark.parametrize("error", [OSError(13, "Permission denied"), RuntimeError("gone"), KeyError("unforeseen")])
def test_fetching_ahead_goes_on_after_an_error(folder, server, tmp_path, monkeypatch, error):
    index = open_train(config_of(server.url, tmp_path)).sources[0].index
    assert index.cache is not None
    real, failed = cache_module.ShardCache.hold, []

    def hold(cache, shard):
        if not failed:
            failed.append(shard)
            raise error
        return real(cache, shard)

    monkeypatch.setattr(cache_module.ShardCache, "hold", hold)
    fetcher = Ahead(index.cache)
    for shard in index.shards[:3]:
        fetcher.want(shard)
    join_ahead()
    fetcher.want(index.shards[3])
    join_ahead()
    assert failed
    assert all(server.asked[shard.name] == 1 for shard in index.shards[1:4])


def test_rows_are_the_same_with_fetching_ahead(folder, server, tmp_path):
    roomy = {"cache_gb": room_for(2 * 4 + 0.1, tmp_path)}
    for num in (1, 20, 60):
        config = config_of(server.url, tmp_path, cache=str(tmp_path / f"cache{num}"), **roomy)
        assert rows(config, num) == rows(config_of(str(folder), tmp_path, cache=None), num)
    join_ahead()


def test_rows_are_the_same_with_fetching_ahead_and_a_shard_that_fails(folder, server, tmp_path):
    server.faults.append(fails_times("train-000002.tar", 10**6, lambda h: h.send_error(404)))
    config = config_of(server.url, tmp_path, max_skipped_shards=1, cache_gb=room_for(2 * 4 + 0.1, tmp_path))
    found = rows(config, 60)
    join_ahead()
    (folder / "train-000002.tar").unlink()
    assert found == rows(config_of(str(folder), tmp_path, cache=None, max_skipped_shards=1), 60)


def test_nothing_is_fetched_ahead_of_the_last_shard(folder, server, tmp_path):
    index = open_train(config_of(server.url, tmp_path)).sources[0].index
    line = LineReader(index, seed=SEED, cached_documents=4, ahead=True)
    last = shard_order(len(index.shards), seed=SEED, epoch=0)[-1]
    line.read(epoch=0, first_token=index.num_tokens - 2, count=2)
    join_ahead()
    assert [name for name in server.asked if name.endswith(".tar")] == [index.shards[last].name]


@pytest.mark.parametrize(("room", "is_on"), [(2 * 2 * 4 - 0.1, False), (2 * 2 * 4 + 0.1, True)])
def test_the_room_for_fetching_ahead_counts_every_source(folder, server, tmp_path, monkeypatch, room, is_on):
    """Two fetched sources, whose streams have a shard of each open; the local one takes no room."""
    wanted = []
    monkeypatch.setattr(ahead.Ahead, "want", lambda self, shard: wanted.append(shard))
    places = {"a": server.url, "b": f"pipe:cat {folder}/{{}}", "c": str(folder)}
    listed = [{"name": name, "shards": place, "weight": 1.0} for name, place in places.items()]
    rows(config_of(listed, tmp_path, cache_gb=room_for(room, tmp_path)))
    assert bool(wanted) == is_on
