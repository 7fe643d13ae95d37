"""Processes that do not belong to a meeting are named there and on their own side; a rank 0 that is stopped is not waited for."""

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch._C._distributed_c10d import TCPStore

from parallel import meeting
from parallel.config import ProcessInfo
from parallel.meeting import meet
from tests.parallel.comers import RUN, WITHIN_S, card, free_port, process, said_of_run, together

OTHER = RUN | {"run.dir": "b", "optim.lr": "0.2"}


@pytest.fixture(autouse=True)
def _processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank is a process of its own: 1, 2, ... in the order in which they come."""
    numbers = itertools.count(1)
    monkeypatch.setattr(meeting.os, "getpid", lambda: next(numbers))


@contextlib.contextmanager
def waiting(info: ProcessInfo, *, run: Mapping[str, str] = RUN, within_s: float = 60.0) -> Iterator[Any]:
    """The future of a rank that has come and waits for others."""
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(meet, info, run=run, within_s=within_s)
        wait_for(info.master_port, f"meeting/rank/{info.rank}")
        yield future


def wait_for(port: int, key: str) -> TCPStore:
    """A connection to the store, when it has the key."""
    store = TCPStore("127.0.0.1", port, 1, False, timedelta(seconds=10), wait_for_workers=False)
    deadline = time.monotonic() + 10
    while not store.check([key]):
        assert time.monotonic() < deadline, f"no {key}"
        time.sleep(0.02)
    return store


def test_a_rank_of_another_run_is_refused_by_name_and_the_run_goes_on(caplog: pytest.LogCaptureFixture):
    port = free_port()
    with waiting(process(0, 2, port)) as first:
        began = time.monotonic()
        (error,) = together([1], 2, port=port, run=OTHER, within_s=60)
        assert time.monotonic() - began < 5
        assert isinstance(error, RuntimeError)
        said = (
            f"only processes of one run may meet at 127.0.0.1:{port}, but rank 1 (process 2 on node0) has run.dir b, optim.lr 0.2, and "
            "rank 0 (process 1 on node0) run.dir a, optim.lr 0.1: if these are two runs, set MASTER_PORT (deepspeed: --master_port) to "
            "another port for one of them, else give both the same values"
        )
        assert str(error) == said
        while not caplog.messages and time.monotonic() < began + 10:
            time.sleep(0.02)
        assert caplog.messages == [f"{said}; this run goes on waiting for its own"]
        (second,) = together([1], 2, port=port)
        second.set("word", "heard")
        assert first.result(10).get("word") == b"heard"


def test_a_run_whose_rank_went_elsewhere_ends_with_who_came_instead():
    port = free_port()
    with waiting(process(0, 2, port), within_s=2 * WITHIN_S) as first:
        (stranger,) = together([1], 2, port=port, run=OTHER)
        said = str(first.exception(10))
    assert said == f"{stranger}; rank 1 never came; there were rank 0 on node0"


def test_a_rank_zero_that_comes_to_another_runs_store_is_refused_by_name():
    port = free_port()
    with waiting(process(0, 2, port)) as first:
        (error,) = together([0], 2, port=port, run=OTHER)
        assert (
            "rank 0 (process 2 on node0) has run.dir b, optim.lr 0.2, and rank 0 (process 1 on node0) run.dir a"
            in str(error)
        )
        together([1], 2, port=port)
        assert first.exception(10) is None


def test_runs_of_other_sizes_and_other_steps_and_starts_of_a_job_are_other_runs():
    info = process(1, 2, free_port())
    slurm = {"launcher": "srun", "job": "12", "step": "0"}
    infos = [
        info,
        info.model_copy(update={"world_size": 3}),
        *(info.model_copy(update=slurm | more) for more in ({}, {"job": "13"}, {"step": "1"}, {"restarts": 1})),
    ]
    runs = [meeting._Meeting(info, RUN, WITHIN_S).run for info in infos]
    assert all(first != second for first, second in itertools.combinations(runs, 2))
    assert runs[-1] == RUN | {"processes": "2", "SLURM step": "12.0", "start": "2"}


def test_a_run_that_was_started_twice_is_told_so_on_all_its_ranks():
    port = free_port()
    with waiting(process(0, 3, port)) as first, waiting(process(1, 3, port)) as second:
        (error,) = together([1], 3, port=port)
        assert str(error) == (
            f"each rank must come once to 127.0.0.1:{port}, but there are rank 1 (process 3 on node0) and rank 1 (process 2 on node0): the "
            "run was started twice, then end one of the two, or a process died and was started again, then start all again"
        )
        assert [str(future.exception(10)) for future in (first, second)] == [str(error)] * 2


def test_two_containers_with_one_host_name_and_one_process_number_are_two(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(meeting.os, "getpid", lambda: 1)
    port = free_port()
    with waiting(process(0, 3, port)), waiting(process(1, 3, port)):
        (error,) = together([1], 3, port=port)
        assert "there are rank 1 (process 1 on node0) and rank 1 (process 1 on node0)" in str(error)


def test_the_first_three_differences_are_named_and_what_one_run_alone_has():
    port, other = free_port(), {name: "1" for name in "abcd"}
    with waiting(process(0, 2, port)) as first:
        (error,) = together([1], 2, port=port, run=other)
        assert "has a 1, b 1, c 1, and rank 0 (process 1 on node0) a not there, b not there, c not there:" in str(error)
        (error,) = together([1], 2, port=port, run={})
        assert (
            "has run.dir not there, optim.lr not there, and rank 0 (process 1 on node0) run.dir a, optim.lr 0.1:"
            in str(error)
        )
        together([1], 2, port=port)
        assert first.exception(10) is None


def test_a_run_that_has_met_does_not_mind_that_it_is_started_again():
    port = free_port()
    stores = together(range(2), 2, port=port)
    (error,) = together([1], 2, port=port)
    assert "the run was started twice" in str(error)
    stores[1].set("word", "heard")
    assert stores[0].get("word") == b"heard"


class Wire:
    """What stands before a store and hands on what is sent both ways, until it is stopped: then it takes everything and is silent,
    as the machine of a stopped process does.
    """

    def __init__(self, port: int) -> None:
        self._to, self._ends, self._is_stopped = port, [], threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        self._is_stopped.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                self._ends.append(near)
                if self._is_stopped.is_set():
                    continue
                far = socket.create_connection(("127.0.0.1", self._to))
                self._ends.append(far)
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._hand_on, args=(source, sink), daemon=True).start()

    def _hand_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                if not self._is_stopped.is_set():
                    sink.sendall(data)
            sink.close()


@pytest.mark.parametrize("has_come", [True, False])
def test_a_rank_zero_that_is_stopped_is_named_by_who_waits(monkeypatch: pytest.MonkeyPatch, has_come: bool):
    monkeypatch.setattr(meeting, "LEAVE_S", 0.5)
    port, within_s = free_port(), 2.0 if has_come else 0.5
    rank_zero = TCPStore("127.0.0.1", port, 3, True, timedelta(seconds=5), wait_for_workers=False)
    rank_zero.set("meeting/keeper", card(0))
    rank_zero.set("meeting/run", said_of_run(3))
    wire = Wire(port)
    if not has_come:
        wire.stop()
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(meet, process(1, 3, wire.port), run=RUN, within_s=within_s)
        if has_come:
            wait_for(port, "meeting/rank/1")
            wire.stop()
        began = time.monotonic()
        said = str(future.exception(10))
    assert within_s - 0.5 < time.monotonic() - began < within_s + 2
    there, silent_s = f"127.0.0.1:{wire.port}{' (process 7 on node9)' if has_come else ''}", within_s + 0.5
    assert said == (
        f"all 3 ranks must meet, but rank 0, which keeps the store, at {there}, has not answered for {silent_s:g} s "
        "(parallel.meeting_s): it is stopped, its machine is gone, or another program has the port; end it and start all again"
    )
