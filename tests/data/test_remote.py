"""Shards behind a server or a command, through everything that opens and reads them: the same rows, or one sentence."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from data import remote
from data.loader import train_batches
from data.order import shard_order
from data.split import open_heldout, open_train
from tests.data.http_server import SEED, Server, config_of, cut, fails_times, local_rows, room_for, rows, whole
from tests.data.index_by_hand import rewrite_index

pytestmark = pytest.mark.usefixtures("no_waiting")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_server_gives_the_rows_of_the_folder(folder, server, tmp_path, num_workers):
    assert rows(config_of(server.url, tmp_path, num_workers=num_workers)) == local_rows(folder, tmp_path)
    assert all(server.asked[path.name] == 1 for path in folder.glob("*.tar"))
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_command_gives_the_rows_of_the_folder(folder, tmp_path):
    place = f"pipe:cat {folder}/{{}}"
    assert rows(config_of(place, tmp_path)) == local_rows(folder, tmp_path)


def test_a_query_stays_at_the_end_of_the_address(folder, server, tmp_path):
    assert rows(config_of(f"{server.url}/?key=a%2Fb", tmp_path)) == local_rows(folder, tmp_path)
    assert server.queries == {"key=a%2Fb"}


def test_held_out_shards_and_single_sources_may_be_remote(folder, server, tmp_path):
    config = config_of([{"name": "a", "shards": server.url, "weight": 1.0}], tmp_path, heldout=server.url)
    assert open_heldout(config).num_tokens == 418
    assert rows(config) == local_rows(folder, tmp_path)


def test_index_tokenizer_and_sidecars_come_first_and_tars_when_they_are_read(folder, server, tmp_path):
    config = config_of(server.url, tmp_path)
    split = open_train(config)
    assert set(server.asked) == {"index.json", "tokenizer.json", *(path.name for path in folder.glob("*.idx"))}
    server.asked.clear()
    batches = train_batches(config, split, seed=SEED, accumulation_steps=1, rank=0, num_ranks=1, position=0)
    assert not server.asked
    next(batches)
    assert set(server.asked) < {path.name for path in folder.glob("*.tar")}


def asked_by_the_first_batch(server: Server, tmp_path: Path, *, shards: float) -> list[str]:
    """The tars that are fetched by reading one batch and waiting; shards: of the largest size that the cache has room for."""
    config = config_of(
        server.url, tmp_path, cache=str(tmp_path / f"cache-{shards}"), cache_gb=room_for(shards, tmp_path)
    )
    split = open_train(config)
    server.asked.clear()
    next(train_batches(config, split, seed=SEED, accumulation_steps=1, rank=0, num_ranks=1, position=0))
    for thread in threading.enumerate():
        if thread.name == "shards ahead":
            thread.join(20.0)
    return sorted(server.asked)


def test_the_shard_after_each_one_that_is_begun_is_fetched_ahead_where_two_for_each_stream_have_room(
    folder, server, tmp_path
):
    needed = asked_by_the_first_batch(server, tmp_path, shards=2 * 4 - 0.1)
    ahead = asked_by_the_first_batch(server, tmp_path, shards=2 * 4 + 0.1)
    shards = [shard.name for shard in open_train(config_of(str(folder), tmp_path, cache=None)).sources[0].index.shards]
    order = shard_order(len(shards), seed=SEED, epoch=0)
    places = [order.index(shards.index(name)) for name in needed]
    following = {shards[order[place + 1]] for place in places if place + 1 < len(order)}
    assert set(ahead) == {*needed, *following} > set(needed)


def test_a_second_run_fetches_only_the_index(folder, server, tmp_path):
    first = rows(config_of(server.url, tmp_path))
    server.asked.clear()
    assert rows(config_of(server.url, tmp_path)) == first
    assert server.asked == {"index.json": 1}


@pytest.mark.parametrize("name", ["index.json", "tokenizer.json", "train-000002.idx", "train-000002.tar"])
@pytest.mark.parametrize("status", [500, 503, 429])
def test_two_failures_of_the_server_are_waited_out(folder, server, tmp_path, name, status):
    server.faults.append(fails_times(name, 2, lambda handler: handler.send_error(status)))
    assert rows(config_of(server.url, tmp_path)) == local_rows(folder, tmp_path)
    assert server.asked[name] == 3


@pytest.mark.parametrize("name", ["index.json", "tokenizer.json", "train-000002.idx", "train-000002.tar"])
def test_a_file_that_was_cut_off_is_fetched_again(folder, server, tmp_path, name):
    server.faults.append(fails_times(name, 1, cut((folder / name).read_bytes())))
    assert rows(config_of(server.url, tmp_path)) == local_rows(folder, tmp_path)
    assert server.asked[name] == 2


@pytest.mark.parametrize("name", ["train-000002.idx", "train-000002.tar"])
def test_a_file_with_another_content_is_fetched_again(folder, server, tmp_path, name):
    size = (folder / name).stat().st_size
    for content in (bytes(size), bytes(size - 1), bytes(size + 1)):
        server.faults.append(fails_times(name, 1, whole(content)))
    assert rows(config_of(server.url, tmp_path)) == local_rows(folder, tmp_path)
    assert server.asked[name] == 4


@pytest.mark.parametrize(
    ("name", "fault", "reason"),
    [
        ("index.json", lambda h: h.send_error(404), r"the server answers 404 Not Found\)"),
        ("train-000002.tar", lambda h: h.send_error(403), r"the server answers 403 Forbidden\)"),
        (
            "train-000002.tar",
            lambda h: h.send_error(500),
            r"the server answers 500 Internal Server Error; 5 attempts in \d+ s",
        ),
        ("train-000002.tar", whole(b"short"), r"it has 5 bytes and the index says \d+; 5 attempts"),
        ("train-000002.idx", whole(b"short"), r"it has not the checksum that the index records; 5 attempts"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence_with_name_place_and_reason(
    folder, server, tmp_path, name, fault, reason
):
    server.faults.append(fails_times(name, 99, fault))
    with pytest.raises(RuntimeError, match=rf"^{name} cannot be fetched from {server.url} \({reason}") as error:
        rows(config_of(server.url, tmp_path))
    assert "\n" not in str(error.value)
    assert server.asked[name] == (1 if "answers 40" in str(error.value) else 5)
    left = [path.name for path in (tmp_path / "cache").rglob("*") if path.suffix in (".partial", ".lock")]
    assert left == []


def test_a_server_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"^index\.json cannot be fetched from http://127\.0\.0\.1:1/x \(no answer: "
    ):
        open_train(config_of("http://127.0.0.1:1/x", tmp_path))


def test_a_command_that_fails_says_what_it_said(tmp_path):
    place = "pipe:echo the disk {} sleeps >&2; exit 3"
    with pytest.raises(
        RuntimeError, match=r"\(the command ends with status 3: the disk index\.json sleeps; 5 attempts"
    ):
        open_train(config_of(place, tmp_path))


def test_a_command_that_prints_without_end_is_stopped(folder, tmp_path):
    place = f"pipe:case {{}} in *.tar) yes;; *) cat {folder}/{{}};; esac"
    with pytest.raises(RuntimeError, match=r"train-\d+\.tar cannot be fetched .*it has more than \d+ bytes"):
        rows(config_of(place, tmp_path))


def stats() -> Iterator[list[str]]:
    """Of every process: its state, its parent, its group, ..."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            yield path.read_text().rpartition(")")[2].split()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("sleep 600", "the command printed nothing for 0.3 s"),
        ("echo half; sleep 600", "the command printed nothing for 0.3 s"),
        ("exec 1>&-; sleep 600", "the command has not ended 0.3 s after its last byte"),
    ],
)
def test_a_command_that_hangs_is_ended_with_what_it_started(tmp_path, monkeypatch, command, reason):
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    place = f"pipe:echo $$ >> {tmp_path}/pids; {command}; true {{}}"
    with pytest.raises(RuntimeError, match=rf"index\.json cannot be fetched .*\({reason}; 2 attempts"):
        open_train(config_of(place, tmp_path))
    groups = (tmp_path / "pids").read_text().split()
    assert len(groups) == 2
    deadline = time.monotonic() + 20.0  # of a busy machine: a process that was killed ends when it is next due
    while left := [stat for stat in stats() if stat[2] in groups and stat[0] != "Z"]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["../x.tar", "x;touch executed;.tar", ".hidden.tar", "x.txt", "a b.tar"])
def test_names_in_a_foreign_index_are_never_paths_or_commands(folder, tmp_path, monkeypatch, name):
    rewrite_index(folder, {"name": name})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match=r"must list tars whose names have letters, digits.* but it lists the shard"):
        open_train(config_of(f"pipe:cat {folder}/{{}}", tmp_path))
    assert not (tmp_path / "executed").exists()


def test_an_index_that_was_altered_is_refused(folder, server, tmp_path):
    index = folder / "index.json"
    index.write_text(index.read_text().replace('"tokens": ', '"tokens": 1', 1))
    with pytest.raises(RuntimeError, match=r"index\.json cannot be fetched .*\(it was altered since it was written"):
        open_train(config_of(server.url, tmp_path))


def test_a_set_that_changes_on_the_server_does_not_disturb_who_uses_the_old_one(
    folder, server, tmp_path, write_shards, random_shards
):
    config = config_of(server.url, tmp_path)
    old, expected = open_train(config), local_rows(folder, tmp_path)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    write_shards(random_shards[:3], name="train")
    new = open_train(config)
    assert new.fingerprint != old.fingerprint
    assert old.sources[0].index.folder != new.sources[0].index.folder
    assert rows(config) == local_rows(folder, tmp_path) != expected


def test_a_shard_that_cannot_be_fetched_may_be_passed_over(folder, server, tmp_path):
    server.faults.append(fails_times("train-000002.tar", 99, lambda handler: handler.send_error(404)))
    config = config_of(server.url, tmp_path, max_skipped_shards=1)
    found = rows(config)
    assert server.asked["train-000002.tar"] == 1  # not once for each row
    (folder / "train-000002.tar").unlink()
    assert found == rows(config_of(str(folder), tmp_path, cache=None, max_skipped_shards=1))


def test_a_kept_shard_that_the_disk_damaged_is_fetched_again(folder, server, tmp_path):
    expected = rows(config_of(server.url, tmp_path))
    for path in (tmp_path / "cache").glob("*.tar"):
        path.write_bytes(os.urandom(path.stat().st_size))
    server.asked.clear()
    assert rows(config_of(server.url, tmp_path)) == expected
    assert all(server.asked[path.name] == 1 for path in folder.glob("*.tar"))
