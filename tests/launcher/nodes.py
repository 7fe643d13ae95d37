"""Nodes for tests of the preflight: processes with srun's variables, most of them warm ones of the pool, which start together however busy
the machine is.

Called by the tests beside it.
"""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from launcher.preflight import main
from parallel.bandwidth import Link, Rate

ROOT = Path(__file__).resolve().parents[2]
PREFLIGHT = str(ROOT / "launcher" / "preflight.py")
TINY = str(ROOT / "configs" / "tiny_cpu.yaml")
STARTERS = ("SLURM", "OMPI_", "PMI", "MPI_", "MASTER_")
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CUDA_VISIBLE_DEVICES")
FOREVER_S = "90"  # a patience that no test waits for

Ended = tuple[int, str, str]  # exit code, stdout, stderr


def arguments(shards: Path, shared: Path, *more: str, patience: str = FOREVER_S, megabytes: str = "0") -> list[str]:
    values = {"data.shards": shards / "train", "data.heldout": shards / "heldout", "run.dir": shared / "run"}
    sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    return ["--config", TINY, *sets, "--patience-s", patience, "--bandwidth-mb", megabytes, *more]


def bare() -> dict[str, str]:
    """This process's environment without what any starter has put into it."""
    return {name: value for name, value in os.environ.items() if not name.startswith(STARTERS) and name not in NAMES}


def srun(rank: int, size: int, *, port: int = 1) -> dict[str, str]:
    """What srun --ntasks-per-node=1 sets on node `rank` of n1, n2, ..."""
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_RESTART_COUNT": "1",
        "SLURM_STEP_ID": "3",
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(rank),
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{size})",
        "SLURM_STEP_NODELIST": f"n[1-{size}]",
        "SLURMD_NODENAME": f"n{rank + 1}",
        "MASTER_ADDR": "127.0.0.1",  # n1 is a name of this test alone
        "MASTER_PORT": str(port),
    }


def in_this_process(argv: Sequence[str], environ: dict[str, str]) -> Ended:
    out, error = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, {**bare(), **environ}, clear=True),
        mock.patch.object(sys, "path", sys.path.copy()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
    ):
        return main(argv), out.getvalue(), error.getvalue()


def slow_third_node(link: Link) -> Rate:
    return Rate(0.1, 0.1) if 2 in link.ranks else Rate(2.0, 2.0)


def attend(nodes: list[list[str] | None], port: int, measure: Callable[[Link], Rate] | None = None) -> Ended | None:
    """This rank's node, by its command line; None: it never starts."""
    rank = dist.get_rank()
    argv = nodes[rank] if rank < len(nodes) else None
    if argv is None:
        return None
    if measure is None:
        return in_this_process(argv, srun(rank, len(nodes), port=port))
    with mock.patch.multiple("parallel.bandwidth", measure=measure, open_store=mock.Mock(return_value="a store")):
        return in_this_process(argv, srun(rank, len(nodes), port=port))


def start(*command: str, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env={**bare(), **environ}, capture_output=True, text=True, timeout=100)


def row(out: str, name: str) -> list[str]:
    """The cells of a node's row in the table."""
    (line,) = (line for line in out.splitlines() if line.startswith(f"│ {name}"))
    return [cell.strip() for cell in line.strip("│").split("│")]
