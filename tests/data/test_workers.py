"""Reader processes outlive the signals of a scheduler and not the process that reads from them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.workers import in_processes

ROOT = Path(__file__).resolve().parents[2]
HELD = """
import sys
from tests.data.test_workers import numbers
from data.workers import in_processes

if __name__ == "__main__":
    sys.held = in_processes(numbers, num_workers=2)  # as a traceback may hold it: nobody ends the readers before Python does
    print([next(sys.held) for _ in range(4)], flush=True)
"""


def numbers(worker: int, num_workers: int):
    yield from range(worker, 10**6, num_workers)


def children() -> list[int]:
    """This process's readers; the tracker of resources, which multiprocessing starts, is none."""
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_readers_go_on_when_another_process_signals_them(number: int):
    before = set(children())
    items = in_processes(numbers, num_workers=2)
    assert next(items) == 0
    readers = [pid for pid in children() if pid not in before]
    assert len(readers) == 2
    for pid in readers:
        subprocess.run(
            ["kill", f"-{signal.Signals(number).name.removeprefix('SIG')}", str(pid)], check=True, timeout=30
        )
    assert [next(items) for _ in range(20)] == list(range(1, 21))  # more than is read ahead


def test_a_process_that_still_holds_its_readers_ends_with_them(tmp_path: Path):
    script = tmp_path / "held.py"
    script.write_text(HELD)
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(script)], env=environ, timeout=100, check=True, text=True, stdout=subprocess.PIPE
    )
    assert done.stdout == "[0, 1, 2, 3]\n"
    assert time.monotonic() - began < 90
