"""launcher/main.py in new processes without the seconds of its imports: a process that has made them all and forks.

Owns the serving: each request is a JSON object through a pipe, each answer too. {"start": {...}} forks a process that becomes a rank (its
own session, log, variables, time limit, faults) and then runs a script as `__main__`, launcher/main.py or one that calls it;
{"poll": pid} gives its exit code, or null. Such a rank is killed like any other process. When the pipe closes, all of them are. Called by
warm.py.
"""

import ctypes
import json
import os
import resource
import runpy
import signal
import sys
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "launcher.main",
    "launcher.environment",
    "train.run",
    "train.checkpoint",
    "parallel.parallelize",
    "parallel.zero",
    "parallel.watchdog",
    "deepspeed",
    "megatron.core.parallel_state",
)


def main() -> None:
    sys.path[0] = str(ROOT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron.core warns of optional CUDA packages
        for module in MODULES:
            __import__(module)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, "a fork of a process with threads may hang"
    pipe = Connection(int(sys.argv[1]))
    pipe.send_bytes(b"{}")
    request = serve(pipe)
    if request is not None:
        become_rank(request)


def serve(pipe: Connection) -> dict[str, Any] | None:
    """Answers until the pipe closes; in a fork returns the request that it was made for."""
    children: set[int] = set()
    while True:
        try:
            request = json.loads(pipe.recv_bytes())
        except EOFError:
            for child in children:
                os.kill(child, signal.SIGKILL)
            return None
        if "start" in request:
            child = os.fork()
            if child == 0:
                pipe.close()
                return request["start"]
            children.add(child)
            answer = child
        else:
            answer = exit_code(request["poll"])
            if answer is not None:
                children.discard(request["poll"])
        pipe.send_bytes(json.dumps(answer).encode())


def exit_code(child: int) -> int | None:
    ended, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def become_rank(request: dict[str, Any]) -> None:
    """In the fork: from here on it is as if it had been started with this command."""
    os.setsid()
    signal.alarm(request["limit_s"])  # nobody handles SIGALRM: it ends the process
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    os.environ |= request["environment"]
    if request["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], resource.RLIM_INFINITY))
    if request["powerless"]:
        give_up_capabilities()
    if request["faults"] is not None:
        from tests.end_to_end.faults import install

        install(request["faults"])
    sys.argv = request["command"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def give_up_capabilities() -> None:
    """All of them: capset(2) with empty sets, in version 3 of its header."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, nothing) == 0


if __name__ == "__main__":
    main()
