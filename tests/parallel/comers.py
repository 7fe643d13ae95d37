"""Ranks that come to a meeting, as threads. For the tests of parallel/meeting.py."""

import json
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch._C._distributed_c10d import Store

from parallel.config import ProcessInfo
from parallel.meeting import meet

WITHIN_S = 1.0
RUN = {"run.dir": "a", "optim.lr": "0.1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def process(rank: int, size: int, port: int) -> ProcessInfo:
    return ProcessInfo(
        rank=rank,
        world_size=size,
        local_rank=0,
        local_world_size=1,
        master_addr="127.0.0.1",
        master_port=port,
        launcher="test",
        node=f"node{rank // 2}",
    )


def card(rank: int) -> str:
    """What a rank leaves in the store."""
    return json.dumps({"rank": rank, "host": "node9", "pid": 7, "key": "drawn"})


def said_of_run(size: int) -> str:
    """What rank 0 leaves beside its card."""
    return json.dumps(RUN | {"processes": str(size)})


def together(
    ranks: Sequence[int],
    size: int,
    *,
    port: int | None = None,
    run: Mapping[str, str] = RUN,
    within_s: float = WITHIN_S,
) -> list[Any]:
    """What `meet` gave or raised on each of these ranks of so many, which come at once."""
    port = port or free_port()
    with ThreadPoolExecutor(len(ranks)) as threads:
        futures: list[Future[Store]] = [
            threads.submit(meet, process(rank, size, port), run=run, within_s=within_s) for rank in ranks
        ]
    return [future.exception() or future.result() for future in futures]
