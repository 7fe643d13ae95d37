"""Where the processes of a run meet: each says who it is and that it is there, and waits a limited time for the others.

Owns the store by which the process groups are made, and the sentences about who never came, who does not belong there and a rank 0 that
is stopped. Makes no group: parallel/mesh.py, the only caller, does, when all are there. torch alone would wait inside the making of the
store and could not say for whom, would take a process of another run for one of this, and waits without a limit for a stopped rank 0.
Not under torchrun: it has a rendezvous of its own, notices itself which of its processes died, and starts all again, each of its agents
with a count of its own for that; so nothing here could tell one such start from the next.
"""

import json
import logging
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from parallel.config import ProcessInfo

logger = logging.getLogger(__name__)

# The key that ends the waiting of all ranks. Its value is _MET, or the sentence of the first rank that has waited long enough: whoever is
# first decides for all.
_END, _MET = "end", "met"
# The card of rank 0 and what its run says of itself; the sentence about the first process of another run.
_KEEPER, _RUN, _STRANGER = "keeper", "run", "stranger"
LOOK_S = 1.0  # between two looks at most: 4,096 ranks ask the store 4,096 times a second
MOST_NAMED = 3  # differences in a sentence
LEAVE_S = 5.0  # how long who keeps the store stays for the others to hear the sentence


@dataclass(frozen=True)
class Card:
    """Who has come. key: drawn at random, because two containers may have one host name, and each a process 1."""

    rank: int
    host: str
    pid: int
    key: str

    @property
    def process(self) -> str:
        return f"process {self.pid} on {self.host}"

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.process})"


def meet(info: ProcessInfo, *, run: Mapping[str, str], within_s: float) -> Store:
    """The store of the run, when every rank has come to it.

    run: what all its processes, and none of another run, say of it before they have talked, by key. within_s: seconds that this rank
    waits for the others, and for an answer of the store.

    Raises:
        RuntimeError: on every rank that came: a rank is missing, names which; a rank is there twice; the store cannot be opened, reached,
            is gone or is silent. On a process of another run, which must not be here: names both and what differs; the run that is here
            goes on.
    """
    meeting = _Meeting(info, run, within_s)
    met: Future[Store] = Future()

    def hold() -> None:
        try:
            met.set_result(meeting.hold())
        except Exception as error:
            met.set_exception(error)

    # Of a stopped rank 0 the calls of the store wait without a limit, and nothing breaks them off: such a thread is left behind.
    thread = threading.Thread(target=hold, name="meeting", daemon=True)
    thread.start()
    while thread.is_alive() and (left := meeting.answered + within_s + LEAVE_S - time.monotonic()) > 0:
        thread.join(left)
    if thread.is_alive():
        raise RuntimeError(meeting.silence())
    return met.result()


class _Meeting:
    """One rank's part. answered: when somebody was last heard at the other end. keeper: rank 0, once its card was read."""

    def __init__(self, info: ProcessInfo, run: Mapping[str, str], within_s: float) -> None:
        self.info, self.within_s = info, within_s
        self.mine = Card(info.rank, info.node or socket.gethostname(), os.getpid(), uuid4().hex)
        self.run = dict(run) | {"processes": str(info.world_size)}
        if info.launcher == "srun":
            self.run |= {"SLURM step": f"{info.job}.{info.step}", "start": str(info.restarts + 1)}
        self.place = f"{info.master_addr}:{info.master_port}"
        self.answered = time.monotonic()
        self.keeper: Card | None = None

    def hold(self) -> Store:
        """See `meet`."""
        store = self._open()
        table = PrefixStore("meeting", store)
        try:
            self._enter(table)
            if table.add("arrived", 1) == self.info.world_size:
                table.compare_set(_END, "", _MET)
            end = self._wait(table, _END, self.within_s) or self._give_up(table)
            if end != _MET:
                table.add("heard", 1)
            if end != _MET and self.info.rank == 0:
                _stay_for_others(table)
        except dist.DistNetworkError as error:
            raise RuntimeError(
                f"all {self.info.world_size} ranks must meet, but {self._rank_zero()}, went away before: see what it has printed"
            ) from error
        if end != _MET:
            raise RuntimeError(end)
        return PrefixStore("default_pg", store)

    def silence(self) -> str:
        """The sentence about a store that does not answer."""
        return (
            f"all {self.info.world_size} ranks must meet, but {self._rank_zero()}, has not answered for {self.within_s + LEAVE_S:g} s "
            "(parallel.meeting_s): it is stopped, its machine is gone, or another program has the port; end it and start all again"
        )

    def _open(self) -> Store:
        """A connection to the store; on rank 0 the store itself."""
        info = self.info
        try:
            if info.rank > 0:
                _reach(info.master_addr, info.master_port, self.within_s)
                self.answered = time.monotonic()
            return TCPStore(
                info.master_addr,
                info.master_port,
                info.world_size,
                is_master=info.rank == 0,
                timeout=timedelta(seconds=self.within_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (OSError, dist.DistError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            if info.rank == 0:
                raise RuntimeError(
                    f"rank 0 must open the run's store at {self.place}, but cannot ({reason}): another run may have the port, set "
                    "MASTER_PORT (deepspeed: --master_port) to a free one"
                ) from error
            raise RuntimeError(self._nobody(reason)) from error

    def _enter(self, table: Store) -> None:
        """Leaves this rank's card; first it must be the run of rank 0, and the rank's place be empty. RuntimeError where it is not."""
        text = json.dumps(asdict(self.mine))
        if self.info.rank == 0 and table.compare_set(_KEEPER, "", text).decode() == text:
            table.set(_RUN, json.dumps(self.run))  # else a rank 0 elsewhere with this address was here first
        theirs = self._wait(table, _RUN, self.within_s)
        if theirs is None:
            raise RuntimeError(self._nobody("who listens there keeps no store of a run"))
        self.keeper = Card(**json.loads(table.get(_KEEPER)))
        theirs = json.loads(theirs)
        if keys := [key for key in {**self.run, **theirs} if self.run.get(key) != theirs.get(key)]:
            mine, its = (_said(run, keys[:MOST_NAMED]) for run in (self.run, theirs))
            sentence = (
                f"only processes of one run may meet at {self.place}, but {self.mine} has {mine}, and {self.keeper} {its}: if these are "
                "two runs, set MASTER_PORT (deepspeed: --master_port) to another port for one of them, else give both the same values"
            )
            table.compare_set(_STRANGER, "", sentence)
            raise RuntimeError(sentence)
        other = table.compare_set(f"rank/{self.info.rank}", "", text).decode()
        if other != text:
            sentence = (
                f"each rank must come once to {self.place}, but there are {self.mine} and {Card(**json.loads(other))}: the run was started "
                "twice, then end one of the two, or a process died and was started again, then start all again"
            )
            # nobody can know which of the two belongs to the others; a run that has met goes on
            table.compare_set(_END, "", sentence)
            raise RuntimeError(sentence)

    def _wait(self, table: Store, key: str, seconds: float) -> str | None:
        """The value of the key, once it is there; None if it does not come in so many seconds. Rank 0 tells of strangers meanwhile."""
        began, has_told = time.monotonic(), False
        # not Store.wait, which prints two lines of C++ at its limit and answers no signal
        while not table.check([key]):
            self.answered = time.monotonic()
            if self.info.rank == 0 and not has_told and table.check([_STRANGER]):
                logger.warning("%s; this run goes on waiting for its own", table.get(_STRANGER).decode())
                has_told = True
            waited = time.monotonic() - began
            if waited > seconds:
                return None
            time.sleep(min(max(waited / 10, 0.02), LOOK_S))
        return table.get(key).decode()

    def _give_up(self, table: Store) -> str:
        """Ends the waiting of all with a sentence, unless another rank has ended it meanwhile; gives what ended it."""
        if table.add("late", 1) > 1:  # one rank asks for all: 4,096 ranks would each look for 4,096
            end = self._wait(table, _END, LEAVE_S)
            if end is not None:
                return end
        size = self.info.world_size
        cards = {rank: table.get(f"rank/{rank}") for rank in range(size) if table.check([f"rank/{rank}"])}
        ranks_of: dict[str, list[int]] = defaultdict(list)
        for rank, card in cards.items():
            ranks_of[Card(**json.loads(card)).host].append(rank)
        hosts = ", ".join(f"{_named(ranks)} on {host}" for host, ranks in ranks_of.items())
        missing = set(range(size)) - cards.keys()
        what = f"{_named(missing)} never came; there were" if missing else "the last came too late; there are now"
        sentence = (
            f"all {size} ranks must meet at {self.place} within {self.within_s:g} s (parallel.meeting_s), but {what} {hosts}: "
            "see what the missing have printed, or raise parallel.meeting_s if they only start slowly"
        )
        if table.check([_STRANGER]):  # likely why
            sentence = f"{table.get(_STRANGER).decode()}; {what} {hosts}"
        table.compare_set(_END, "", sentence)
        return table.get(_END).decode()

    def _nobody(self, reason: str) -> str:
        return (
            f"all {self.info.world_size} ranks must meet at {self.place} within {self.within_s:g} s (parallel.meeting_s), but rank 0, "
            f"which keeps the store, is not there ({reason}): see what it has printed, or raise parallel.meeting_s if it only starts slowly"
        )

    def _rank_zero(self) -> str:
        host = "" if self.keeper is None else f" ({self.keeper.process})"
        return f"rank 0, which keeps the store, at {self.place}{host}"


def _reach(address: str, port: int, within_s: float) -> None:
    """Returns when somebody listens there. OSError after so many seconds: TCPStore takes twice its limit, and prints stacks of C++."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            with socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic())) as tried:
                if tried.getsockname() != tried.getpeername():
                    return
            # by chance its own end has the port: TCP then connects it with itself
            raise OSError("nobody listens there")
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _said(run: Mapping[str, str], keys: Iterable[str]) -> str:
    return ", ".join(f"{key} {run.get(key, 'not there')}" for key in keys)


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
