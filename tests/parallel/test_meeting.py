"""Who comes to the meeting of a run, who is missed, and how long that takes. The ranks are threads; two processes: test_starting.py.

Who does not belong there, and a store that falls silent: test_meeting_of_others.py.
"""

import gc
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import PrefixStore, TCPStore

from parallel.config import ParallelConfig, resolve_meeting_s
from parallel.meeting import _named, meet
from parallel.mesh import _open_store
from tests.parallel.comers import RUN, WITHIN_S, card, free_port, process, said_of_run, together


def test_ranks_that_have_all_come_share_a_store_at_once():
    began = time.monotonic()
    stores = together(range(4), 4, within_s=20)
    assert time.monotonic() - began < 10
    stores[3].set("word", "heard")
    assert [store.get("word") for store in stores] == [b"heard"] * 4


@pytest.mark.parametrize(
    ("came", "missing", "there"),
    [
        ((0, 1, 3, 4, 5), "rank 2", "ranks 0 to 1 on node0, rank 3 on node1, ranks 4 to 5 on node2"),
        ((0, 2), "ranks 1, 3 to 5", "rank 0 on node0, rank 2 on node1"),
    ],
)
def test_who_never_came_is_named_on_every_rank_that_did_with_their_hosts(came, missing, there):
    began = time.monotonic()
    errors = together(came, 6)
    assert time.monotonic() - began < WITHIN_S + 3
    for error in errors:
        assert isinstance(error, RuntimeError)
        assert "all 6 ranks must meet at 127.0.0.1:" in str(error)
        assert f"within 1 s (parallel.meeting_s), but {missing} never came; there were {there}: see" in str(error)
    assert len({str(error) for error in errors}) == 1


def test_who_would_wait_longer_hears_the_sentence_of_who_waited_first():
    port = free_port()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(meet, process(0, 3, port), run=RUN, within_s=WITHIN_S)
        second = threads.submit(meet, process(1, 3, port), run=RUN, within_s=10 * WITHIN_S)
        began = time.monotonic()
        said = {str(future.exception()) for future in (first, second)}
    assert time.monotonic() - began < WITHIN_S + 3
    assert len(said) == 1
    assert "rank 2 never came" in said.pop()


def test_rank_zero_that_never_comes_is_named():
    began = time.monotonic()
    (error,) = together([1], 2)
    assert WITHIN_S <= time.monotonic() - began < WITHIN_S + 3
    assert isinstance(error, RuntimeError)
    assert "but rank 0, which keeps the store, is not there ([Errno 111] Connection refused): see what it has" in str(
        error
    )


def test_rank_zero_that_goes_away_ends_the_waiting_of_the_others():
    port = free_port()
    store = TCPStore("127.0.0.1", port, 3, True, timedelta(seconds=5), wait_for_workers=False)
    store.set("meeting/keeper", card(0))
    store.set("meeting/run", said_of_run(3))
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(meet, process(1, 3, port), run=RUN, within_s=60)
        deadline = time.monotonic() + 10
        while not store.check(["meeting/rank/1"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        del store
        gc.collect()
        error = waiting.exception(20)
    assert isinstance(error, RuntimeError)
    there = f"rank 0, which keeps the store, at 127.0.0.1:{port} (process 7 on node9)"
    assert f"{there}, went away before: see what it has printed" in str(error)


def test_a_port_that_is_taken_is_told_with_what_to_set():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        (error,) = together([0], 2, port=taken.getsockname()[1])
    assert isinstance(error, RuntimeError)
    assert "rank 0 must open the run's store at 127.0.0.1:" in str(error)
    assert "set MASTER_PORT (deepspeed: --master_port) to a free one" in str(error)


def test_who_came_while_the_limit_ran_out_is_no_reason_for_a_traceback(monkeypatch: pytest.MonkeyPatch):
    """Rank 1 has written its name and is not counted yet when rank 0 gives up."""
    port, add = free_port(), PrefixStore.add

    def slowly(store: PrefixStore, key: str, amount: int) -> int:
        if key == "late":
            store.set("rank/1", card(1))
        return add(store, key, amount)

    monkeypatch.setattr(PrefixStore, "add", slowly)
    (error,) = together([0], 2, port=port)
    assert isinstance(error, RuntimeError)
    assert "but the last came too late; there are now rank 0 on node0, rank 1 on node9" in str(error)


def test_torchrun_has_a_meeting_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """Its agents count their restarts each for itself: of two machines one may begin its second start and the other its first."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    assert _open_store(process(0, 2, free_port()), run=RUN, meeting_s=WITHIN_S) is None


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([0, 1], "ranks 0 to 1"),
        ([5, 0, 2, 1, 9, 8], "ranks 0 to 2, 5, 8 to 9"),
        ([1, 3], "ranks 1, 3"),
    ],
)
def test_many_ranks_are_named_in_few_words(ranks: list[int], text: str):
    assert _named(ranks) == text


@pytest.mark.parametrize(("local", "seconds"), [(4, 120.0), (2, 600.0)])
def test_several_machines_have_longer_to_come(local: int, seconds: float):
    info = process(0, 4, 1).model_copy(update={"local_world_size": local})
    resolve: Callable[..., float] = resolve_meeting_s
    assert resolve(ParallelConfig().meeting_s, info) == seconds
    assert resolve(ParallelConfig(meeting_s=7.5).meeting_s, info) == 7.5
