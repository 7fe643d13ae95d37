"""Where the processes of a run meet: each says that it is there, and waits a limited time for the others.

Owns the store by which the process groups are made, and the sentence about who never came. Makes no group: parallel/mesh.py, the only
caller, does, when all are there. torch alone would wait inside the making of the store and could not say for whom. Not under torchrun: it
has a rendezvous of its own, notices itself which of its processes died, and starts all again, each of its agents with a count of its own
for that; so nothing here could tell one such start from the next.
"""

import socket
import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from parallel.config import ProcessInfo

# The key that ends the waiting of all ranks. Its value is _MET, or the sentence of the first rank that has waited long enough: whoever is
# first decides for all.
_END, _MET = "end", "met"
LOOK_S = 1.0  # between two looks at most: 4,096 ranks ask the store 4,096 times a second
LEAVE_S = 5.0  # how long who keeps the store stays for the others to hear the sentence


def meet(info: ProcessInfo, *, within_s: float) -> Store:
    """The store of the run, when every rank has come to it. within_s: seconds that this rank waits for the others.

    Raises:
        RuntimeError: on every rank that came: a rank is missing, names which; or the store cannot be opened, reached, or is gone.
    """
    store = _open(info, within_s)
    table = PrefixStore("meeting", store)
    try:
        table.set(f"rank/{info.rank}", info.node or socket.gethostname())
        if table.add("arrived", 1) == info.world_size:
            table.compare_set(_END, "", _MET)
        end = _wait(table, within_s) or _give_up(table, info, within_s)
        if end != _MET:
            table.add("heard", 1)
        if end != _MET and info.rank == 0:
            _stay_for_others(table)
    except dist.DistNetworkError as error:
        raise RuntimeError(
            f"all {info.world_size} ranks must meet, but rank 0, which keeps the store, at {_place(info)}, went away before: see what it "
            "has printed"
        ) from error
    if end != _MET:
        raise RuntimeError(end)
    return PrefixStore("default_pg", store)


def _open(info: ProcessInfo, within_s: float) -> Store:
    """A connection to the store; on rank 0 the store itself."""
    try:
        if info.rank > 0:
            _reach(info.master_addr, info.master_port, within_s)
        return TCPStore(
            info.master_addr,
            info.master_port,
            info.world_size,
            is_master=info.rank == 0,
            timeout=timedelta(seconds=within_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (OSError, dist.DistError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        if info.rank == 0:
            raise RuntimeError(
                f"rank 0 must open the run's store at {_place(info)}, but cannot ({reason}): another run may have the port, set "
                "MASTER_PORT (deepspeed: --master_port) to a free one"
            ) from error
        raise RuntimeError(
            f"all {info.world_size} ranks must meet at {_place(info)} within {within_s:g} s (parallel.meeting_s), but rank 0, which keeps "
            f"the store, is not there ({reason}): see what it has printed, or raise parallel.meeting_s if it only starts slowly"
        ) from error


def _reach(address: str, port: int, within_s: float) -> None:
    """Returns when somebody listens there. OSError after so many seconds: TCPStore takes twice its limit, and prints stacks of C++."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            with socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic())) as tried:
                if tried.getsockname() != tried.getpeername():
                    return
            raise OSError(
                "nobody listens there"
            )  # by chance its own end has the port: TCP then connects it with itself
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _wait(table: Store, seconds: float) -> str | None:
    """What ended the waiting; None if nothing did in so many seconds."""
    began = time.monotonic()
    while not table.check([_END]):  # not Store.wait, which prints two lines of C++ at its limit and answers no signal
        waited = time.monotonic() - began
        if waited > seconds:
            return None
        time.sleep(min(max(waited / 10, 0.02), LOOK_S))
    return table.get(_END).decode()


def _give_up(table: Store, info: ProcessInfo, within_s: float) -> str:
    """Ends the waiting of all with a sentence, unless another rank has ended it meanwhile; gives what ended it."""
    if table.add("late", 1) > 1:  # one rank asks for all: 4,096 ranks would each look for 4,096
        end = _wait(table, LEAVE_S)
        if end is not None:
            return end
    there = {
        rank: table.get(f"rank/{rank}").decode() for rank in range(info.world_size) if table.check([f"rank/{rank}"])
    }
    ranks_of: dict[str, list[int]] = defaultdict(list)
    for rank, host in there.items():
        ranks_of[host].append(rank)
    hosts = ", ".join(f"{_named(ranks)} on {host}" for host, ranks in ranks_of.items())
    missing = set(range(info.world_size)) - there.keys()
    what = f"{_named(missing)} never came; there were" if missing else "the last came too late; there are now"
    sentence = (
        f"all {info.world_size} ranks must meet at {_place(info)} within {within_s:g} s (parallel.meeting_s), but {what} {hosts}: see what "
        "the missing have printed, or raise parallel.meeting_s if they only start slowly"
    )
    table.compare_set(_END, "", sentence)
    return table.get(_END).decode()


def _stay_for_others(table: Store) -> None:
    """The store ends with this process: first every rank that came has read why."""
    deadline = time.monotonic() + LEAVE_S
    while table.add("heard", 0) < table.add("arrived", 0) and time.monotonic() < deadline:
        time.sleep(0.05)


def _named(ranks: Iterable[int]) -> str:
    """rank 3; ranks 0 to 7, 9."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    texts = [" to ".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(texts) > 1 or 'to' in texts[0] else ''} {', '.join(texts)}"


def _place(info: ProcessInfo) -> str:
    return f"{info.master_addr}:{info.master_port}"
