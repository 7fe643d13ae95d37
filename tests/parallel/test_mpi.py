"""The meeting under mpirun; tests/launcher/test_preflight.py has it with several processes."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_an_mpirun_of_another_mpi_is_told_from_one_process():
    """In a process of its own, because importing mpi4py starts MPI."""
    code = "from parallel.mpi import MpiMeeting; MpiMeeting(rank=1, size=2)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "mpirun and mpi4py must be of one MPI, but mpirun says rank 1 of 2 and MPICH says rank 0 of 1" in done.stderr
