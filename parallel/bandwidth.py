"""The bandwidth between two nodes: all-reduce and all-to-all of one pair, in a process of its own.

Owns the ring of pairs, the child process that measures one pair (`python -m parallel.bandwidth JSON`), and the store at which children
meet. A child, because a hanging NCCL can only be killed, and because its watchdog ends the process that it is in. Which figure is too
small is train/node_verdict.py's. Called by launcher/preflight.py.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
WARMUPS = 2  # the first opens the connections
REPEATS = 5


@dataclass(frozen=True)
class Link:
    """What a child must know. ranks: the pair, ascending, of which it is `rank`. megabytes (1e6 bytes): what each sends to the other.

    address, port: of the store. seconds: all that may be waited for.
    """

    ranks: tuple[int, int]
    rank: int
    backend: Literal["gloo", "nccl"]
    local_rank: int
    megabytes: float
    address: str
    port: int
    seconds: float


@dataclass(frozen=True)
class Rate:
    """GB/s (1e9 bytes) that each of two nodes sends to the other, the median of REPEATS. problem: a sentence, where there is no figure."""

    all_reduce_gb: float | None = None
    all_to_all_gb: float | None = None
    problem: str | None = None


def ring_rounds(size: int) -> list[list[tuple[int, int]]]:
    """Neighbours in a ring of `size` nodes, in rounds in which each node has one pair at most: (0,1),(2,3).. then (1,2),(0,3)..

    An odd ring needs a third round for the pair that closes it.
    """
    if size < 2:
        return []
    pairs = [(rank, rank + 1) for rank in range(size - 1)]
    closing = [(0, size - 1)] if size > 2 else []
    rounds = [pairs[0::2], pairs[1::2] + (closing if size % 2 == 0 else []), closing if size % 2 else []]
    return [pairs for pairs in rounds if pairs]


def open_store(address: str, port: int, *, seconds: float) -> Any:
    """The store of all pairs, which lives as long as what is returned. RuntimeError where the port is taken."""
    from torch._C._distributed_c10d import TCPStore  # takes seconds: only where bandwidth is measured
    from torch.distributed import DistError

    try:
        return TCPStore(address, port, None, True, timedelta(seconds=seconds), wait_for_workers=False)
    except DistError as error:
        raise RuntimeError(
            f"port {port} of {address} must be free for the job, but it cannot be opened ({_first_line(error)}): end what listens there, "
            "or set MASTER_PORT"
        ) from error


def measure(link: Link) -> Rate:
    """Measures one pair in a child process, while the other node of the pair does the same."""
    command = [sys.executable, "-m", "parallel.bandwidth", json.dumps(asdict(link))]
    try:
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=link.seconds)
    except subprocess.TimeoutExpired:
        return Rate(problem=f"it has not ended within {link.seconds:.0f} s")
    lines = child.stdout.splitlines()
    if child.returncode == 0 and lines:
        return Rate(**json.loads(lines[-1]))
    said = (child.stderr.strip().splitlines() or [f"the process ended with status {child.returncode}"])[-1]
    return Rate(problem=said)


def exchange(link: Link) -> Rate:
    """The figures of one pair. Joins a group of two and leaves it: 2 (WARMUPS + REPEATS) collectives of `megabytes` each way."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    left = timedelta(seconds=link.seconds)
    store = TCPStore(link.address, link.port, None, False, left)
    if link.backend == "nccl":
        torch.cuda.set_device(link.local_rank)
    name = "{}-{}".format(*link.ranks)
    dist.init_process_group(
        link.backend,
        store=PrefixStore(name, store),
        rank=link.ranks.index(link.rank),
        world_size=2,
        timeout=left,
    )
    device = "cuda" if link.backend == "nccl" else "cpu"
    num_floats = max(1, int(link.megabytes * 1e6 / 4))
    # Of an all-reduce of n bytes a ring of two sends n each way; of an all-to-all of n bytes, n/2.
    reduced = torch.zeros(num_floats, device=device)
    sent = torch.zeros(2 * num_floats, device=device)
    received = torch.empty_like(sent)
    all_reduce_s = _median(lambda: dist.all_reduce(reduced), device)
    all_to_all_s = _median(lambda: dist.all_to_all_single(received, sent), device)
    dist.destroy_process_group()
    gigabytes = 4 * num_floats / 1e9
    return Rate(round(gigabytes / all_reduce_s, 4), round(gigabytes / all_to_all_s, 4))


def _median(collective: Any, device: str) -> float:
    """Seconds of one collective, both nodes having begun together."""
    import torch
    import torch.distributed as dist

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    taken: list[float] = []
    for _ in range(WARMUPS + REPEATS):
        dist.barrier()
        wait()
        began = time.perf_counter()
        collective()
        wait()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[WARMUPS:])


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def main(text: str) -> int:
    """What the child does: prints a Rate."""
    values = json.loads(text)
    link = Link(**{**values, "ranks": tuple(values["ranks"])})
    try:
        rate = exchange(link)
    except RuntimeError as error:  # torch's errors of a store, of a group and of CUDA are all of this kind
        rate = Rate(problem=_first_line(error))
    print(json.dumps(asdict(rate)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
