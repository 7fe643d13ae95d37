"""What one machine finds out about itself before a job: versions, GPUs, memory, shards, and the clock.

Owns the looking; what must hold is train/node_verdict.py's. Nothing here waits for another machine, and nothing waits without end: a
check that hangs (a dead mount, a lost GPU) becomes a problem of its own. Called by launcher/preflight.py on every node.
"""

import contextlib
import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from pydantic import TypeAdapter, ValidationError

from data.config import DataConfig
from data.split import look_at
from parallel.config import ProcessInfo
from train.config import Config
from train.node_gpus import Gpu, read_gpus
from train.run_folder import ROOT, describe_environment

GIT_LIMIT_S = 10.0


@dataclass(frozen=True)
class NodeFacts:
    """What a node tells of itself.

    commit: None where the program lies in no git clone. versions: by package. promised: GPUs that the starter granted, None if unknown.
    host_gb: GB of host memory that a new program can have. clock_s: seconds by which the clock of the shared folder is ahead of this
    machine's, known to within clock_error_s. shards: a fingerprint by config key. problems: sentences by check, of what failed here.
    """

    rank: int
    node: str
    promised: int | None
    commit: str | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    gpus: tuple[Gpu, ...] = ()
    host_gb: float | None = None
    clock_s: float | None = None
    clock_error_s: float = 0.0
    shards: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def from_json(told: Mapping[int, Any]) -> tuple[dict[int, NodeFacts], list[int]]:
    """By rank the facts that `to_json` wrote on the nodes, and the ranks whose words are no facts: their program is another."""
    facts: dict[int, NodeFacts] = {}
    for rank, values in sorted(told.items()):
        with contextlib.suppress(ValidationError):
            facts[rank] = TypeAdapter(NodeFacts).validate_python(values)
    return facts, sorted(told.keys() - facts.keys())


def find_facts(
    config: Config, info: ProcessInfo, *, mark: Path, visible: Sequence[str] | None, limit_s: float
) -> NodeFacts:
    """Looks at this machine.

    mark: file in the shared folder that says this node was there. visible: the GPUs that count (None: all; empty: nvidia-smi is not
    asked). limit_s: seconds after which a check is taken for hanging; they run side by side.
    """
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        "commit": _versions,
        "GPUs": lambda: {"gpus": read_gpus(visible)},
        "host memory": lambda: {"host_gb": round(psutil.virtual_memory().available / 1e9, 2)},
        "folder": lambda: measure_clock(mark),
        "shards": lambda: {"shards": _shards(config.data)},
    }
    found, problems = run_each(checks, limit_s=limit_s)
    return NodeFacts(rank=info.rank, node=info.node, promised=info.gpus, **found, problems=problems)


def run_each(
    checks: Mapping[str, Callable[[], dict[str, Any]]], *, limit_s: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """All that the checks found, and a sentence for each one that raised or has not ended after `limit_s` seconds."""
    found: dict[str, dict[str, Any]] = {}
    problems: dict[str, str] = {}

    def run(name: str, check: Callable[[], dict[str, Any]]) -> None:
        try:
            found[name] = check()
        except Exception as error:  # a library's own errors too: what fails here is a fact about this node
            told = isinstance(error, (ValueError, RuntimeError))
            problems[name] = str(error) if told and str(error) else f"{type(error).__name__}: {error}"

    # Daemons, because one that hangs must not keep the process from ending.
    threads = {name: threading.Thread(target=run, args=(name, checks[name]), daemon=True) for name in checks}
    for thread in threads.values():
        thread.start()
    deadline = time.monotonic() + limit_s
    for name, thread in threads.items():
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            problems[name] = f"it must end within {limit_s:g} s, but it hangs: look for a dead mount or device"
    # One that ended after it was called hanging does not count.
    in_time = [found[name] for name in threads if name in found and name not in problems]
    return {key: value for part in in_time for key, value in part.items()}, dict(problems)


def measure_clock(mark: Path, *, clock: Callable[[], float] = time.time) -> dict[str, float]:
    """Writes `mark` and compares the time that the folder's own clock gave it with this machine's.

    Machines are compared through the folder, so that no time between writing and reading counts. A file system whose clients stamp the
    files themselves (Lustre, and every local disk) shows no difference.
    """
    mark.parent.mkdir(parents=True, exist_ok=True)
    began = clock()
    with mark.open("wb", buffering=0) as file:
        file.write(b"here\n")
        os.fsync(file.fileno())
        stamped = os.fstat(file.fileno()).st_mtime
    ended = clock()
    return {"clock_s": stamped - (began + ended) / 2, "clock_error_s": (ended - began) / 2}


def _versions() -> dict[str, Any]:
    environment = describe_environment()
    commit = environment["git_commit"]
    if commit is not None and commit.endswith("+changes"):
        changes = subprocess.run(
            ["git", "-C", str(ROOT), "diff", "HEAD"], capture_output=True, check=True, timeout=GIT_LIMIT_S
        )
        commit += "-" + hashlib.sha256(changes.stdout).hexdigest()[:8]  # two clones may be changed differently
    return {"commit": commit, "versions": {"python": environment["python"], **environment["packages"]}}


def _shards(data: DataConfig) -> dict[str, str]:
    """A fingerprint of each set that the config names; the first bytes of some shards are read on the way."""
    named = {f"data.shards{f' ({source.name})' if source.name else ''}": source.shards for source in data.sources}
    tolerant = data.max_skipped_shards > 0
    found = {key: look_at(place, tolerant=tolerant) for key, place in named.items()}
    return found | {"data.heldout": look_at(data.heldout)}
