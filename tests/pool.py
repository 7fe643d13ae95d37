"""Warm pools of worker processes for distributed tests: a 4-process start costs 10 s with DeepSpeed, a job then 1 ms.

Owns: starting the workers of one gloo world, sending them a job, collecting or judging what comes back, killing them.
Does not own: what a worker does (tests/pool_worker.py), which pools a session has (tests/conftest.py).
Called by: the `pool` fixture, so by every test that says `pool(2).run(function, *args)`.

What travels, travels by value, as plain pickles: `Connection.send` would use torch's reductions, which hand tensors
over as shared memory and keep a file descriptor open for each. A view carries its whole storage along: clone it first.
"""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STACK_SIGNAL = signal.SIGRTMAX  # asks a worker for its stack; one that no code under test handles
START_TIMEOUT = 120.0  # seconds: four imports of torch on a busy two-core machine take 10
GRACE = 2.0  # seconds that the other ranks get to fail too, once one has
LOG_LINES = 40  # of a worker's own output in an error message

# Read once, at import: a pool that starts inside a test must not inherit what that test patched.
_ENVIRONMENT = dict(os.environ)


class RankError(RuntimeError):
    """A job that did not return on every rank. The message holds each rank's traceback, stack or exit code."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs to find and call a function: see tests/pool_worker.py for how it is loaded."""

    module: str
    file: str | None  # None: a built-in module
    name: str
    arguments: bytes  # pickled apart, to be read after the module is there

    @classmethod
    def of(cls, function: Callable[..., Any], arguments: tuple[Any, ...]) -> "Job":
        module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "<no name>")
        if module is None or module == "__main__" or "<" in name:
            raise ValueError(
                f"pool.run needs a function that its workers can find in a file, got {name} of {module}: "
                "no lambda, closure or function of a script; define it at module level"
            )
        file = getattr(sys.modules[module], "__file__", None)
        return cls(module=module, file=file, name=name, arguments=pickle.dumps(arguments))


@dataclass(kw_only=True)
class _Worker:
    rank: int
    process: subprocess.Popen
    connection: Connection
    log: Path
    stack: Path
    log_start: int = 0  # bytes in the log when the current job began


@dataclass(kw_only=True)
class _Outcome:
    """Each worker is in one of the four: it returned (result), raised (traceback), died (exit code), or is late."""

    results: dict[int, Any] = field(default_factory=dict)
    failures: list[tuple[_Worker, str]] = field(default_factory=list)
    deaths: list[tuple[_Worker, str]] = field(default_factory=list)
    late: list[_Worker] = field(default_factory=list)


class Pool:
    """`size` processes in one gloo world, started by the first job and again after every job that went wrong.

    `folder` receives a log per worker and the file through which they meet; `environment` is set in the workers before
    they import anything. Start it from the main thread: workers die with the thread that started them.
    """

    def __init__(self, size: int, *, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.size = size
        self._folder = folder
        self._environment = dict(environment or {})
        self._generation = 0
        self._workers: list[_Worker] = []

    @property
    def pids(self) -> list[int]:
        """Process ids in rank order; empty while the pool is not running."""
        return [worker.process.pid for worker in self._workers]

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """Call `function(*args)` on every rank of the initialised world and return the results in rank order.

        `function` sits at the top level of a file; arguments and results are pickled (tensors by value). Between jobs
        only torch's default dtype, threads, determinism, grad mode and seed are put back.

        Raises RankError when a rank raised, died, left a gloo group alive, or was still running after `timeout`
        seconds; the pool is then killed, and the next job starts a new one.
        """
        request = pickle.dumps(Job.of(function, args))
        label = f"{function.__module__}.{function.__qualname__}"
        try:
            if not self._workers:
                self._start()
            for worker in self._workers:
                worker.log_start = worker.log.stat().st_size
                _send(worker, request)
            return self._collect(label, timeout=timeout)
        except BaseException:  # also Ctrl-C: an answer left in a pipe would be taken for the next job's
            self.stop()
            raise

    def stop(self) -> None:
        """Kill the workers and what they started (each leads a process group), and wait until they are gone."""
        for worker in self._workers:
            if worker.process.poll() is None:  # else its id may belong to somebody else by now
                os.killpg(worker.process.pid, signal.SIGKILL)
        for worker in self._workers:
            worker.process.wait()
            worker.connection.close()
        self._workers = []

    def _start(self) -> None:
        self._generation += 1
        name = f"pool{self.size}_start{self._generation}"
        for rank in range(self.size):
            self._workers.append(self._spawn(rank, name=name))
        self._collect(f"the start of a pool of {self.size}", timeout=START_TIMEOUT)

    def _spawn(self, rank: int, *, name: str) -> _Worker:
        ours, theirs = Pipe()
        log, stack = self._folder / f"{name}_rank{rank}.log", self._folder / f"{name}_rank{rank}.stack"
        stack.touch()
        options = [
            f"--rank={rank}",
            f"--world-size={self.size}",
            f"--pipe={theirs.fileno()}",
            f"--parent={os.getpid()}",
            f"--rendezvous={self._folder / name}.rendezvous",
            f"--stack={stack}",
        ]
        # Not multiprocessing's spawn: it imports pytest's __main__ in the worker and starts a resource tracker.
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tests.pool_worker", *options],
                cwd=ROOT,
                env=_environment(rank, self.size) | self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )
        theirs.close()
        return _Worker(rank=rank, process=process, connection=ours, log=log, stack=stack)

    def _collect(self, label: str, *, timeout: float) -> list[Any]:
        outcome = _receive(self._workers, timeout=timeout)
        if len(outcome.results) < self.size:
            raise RankError(_report(f"{label} on {self.size} process(es)", outcome, timeout=timeout))
        return [outcome.results[rank] for rank in range(self.size)]


def _environment(rank: int, size: int) -> dict[str, str]:
    return _ENVIRONMENT | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), _ENVIRONMENT.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",  # the log of a killed worker is whole
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",  # the workers share a machine; its host name need not resolve
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
    }


def _send(worker: _Worker, request: bytes) -> None:
    with suppress(OSError):  # it is dead: _receive says so, with its exit code
        worker.connection.send_bytes(request)


def _receive(workers: list[_Worker], *, timeout: float) -> _Outcome:
    """Wait until every rank has answered, `timeout` seconds are over, or one has failed GRACE seconds ago."""
    outcome = _Outcome(late=list(workers))
    deadline = time.monotonic() + timeout
    while outcome.late and (remaining := deadline - time.monotonic()) > 0:
        wait([worker.connection for worker in outcome.late], timeout=min(0.1, remaining))
        for worker in list(outcome.late):
            exited = worker.process.poll() is not None  # asked first: what it sent before is then in the pipe
            if worker.connection.poll():
                _take_answer(worker, outcome)
            elif exited:
                _take_death(worker, outcome)
        if outcome.failures or outcome.deaths:  # the others may wait for this rank in a collective, for ever
            deadline = min(deadline, time.monotonic() + GRACE)
    return outcome


def _take_answer(worker: _Worker, outcome: _Outcome) -> None:
    try:
        succeeded, value = pickle.loads(worker.connection.recv_bytes())
    except (EOFError, OSError):
        _take_death(worker, outcome)
        return
    outcome.late.remove(worker)
    if succeeded:
        outcome.results[worker.rank] = value
    else:
        outcome.failures.append((worker, value))


def _take_death(worker: _Worker, outcome: _Outcome) -> None:
    code = worker.process.wait(timeout=10)
    cause = f" ({signal.Signals(-code).name})" if code < 0 else ""
    outcome.late.remove(worker)
    outcome.deaths.append((worker, f"died in this job or just before it with exit code {code}{cause}"))


def _report(label: str, outcome: _Outcome, *, timeout: float) -> str:
    """One line that names every rank without a result, then the details: deaths first, they may explain the rest."""
    deaths, failures = _by_rank(outcome.deaths), _by_rank(outcome.failures)
    headlines = [f"rank {worker.rank} {text}" for worker, text in deaths]
    if failures:
        headlines.append(f"failed on {_ranks(worker for worker, _ in failures)}")
    if outcome.late:
        when = f"{GRACE:g} s later" if headlines else f"after {timeout:g} s"
        headlines.append(f"{_ranks(outcome.late)} still running {when}")
    parts = [f"{label}: {', '.join(headlines)}."]
    for worker, text in [*deaths, *failures, *zip(outcome.late, _stacks(outcome.late), strict=True)]:
        parts.append(f"--- rank {worker.rank} ---\n{text.rstrip()}")
        if output := _tail(worker):
            parts.append(f"--- output of rank {worker.rank}, last {LOG_LINES} lines of {worker.log} ---\n{output}")
    return "\n".join(parts)


def _by_rank(reports: list[tuple[_Worker, str]]) -> list[tuple[_Worker, str]]:
    return sorted(reports, key=lambda report: report[0].rank)


def _ranks(workers: Iterable[_Worker]) -> str:
    return "rank(s) " + ", ".join(str(worker.rank) for worker in workers)


def _stacks(late: list[_Worker]) -> list[str]:
    """Ask each late worker for the Python stacks of all its threads; faulthandler writes them to the worker's file."""
    for worker in late:
        worker.process.send_signal(STACK_SIGNAL)
    deadline = time.monotonic() + 5
    while not all(worker.stack.stat().st_size for worker in late) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.1 if late else 0)  # for the rest of the lines
    return [worker.stack.read_text() or "No stack: the process does not answer to signals." for worker in late]


def _tail(worker: _Worker) -> str:
    with worker.log.open("rb") as log:
        log.seek(worker.log_start)
        return b"\n".join(log.read().splitlines()[-LOG_LINES:]).decode(errors="replace")
