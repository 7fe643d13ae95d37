"""A start that takes too long is ended with a sentence, and one that is done in time is left alone."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
START = """
import sys, time
from parallel.config import ProcessInfo
from parallel.limit import ended_after
place = {"rank": 1, "world_size": 4, "local_rank": 1, "local_world_size": 4, "master_addr": "node0", "master_port": 29500}
inside, after = map(float, sys.argv[1:])
with ended_after(0.5, ProcessInfo(**place, launcher="test")):
    time.sleep(inside)
time.sleep(after)
print("joined")
"""


@pytest.mark.parametrize(
    ("inside", "after", "code", "printed", "said"),
    [
        (0.0, 1.0, 0, "joined\n", ""),
        (
            20.0,
            0.0,
            1,
            "",
            "error (rank 1): all 4 ranks must have joined in 0.5 s, but have not: rank 0, which keeps the store, at node0:29500, or "
            "another rank is stopped or gone; end all that are left and start again\n",
        ),
    ],
)
def test_a_start_without_an_end_is_ended(inside: float, after: float, code: int, printed: str, said: str):
    ended = subprocess.run(
        [sys.executable, "-c", START, str(inside), str(after)], cwd=ROOT, capture_output=True, text=True, timeout=15
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, printed, said)
