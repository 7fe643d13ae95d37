"""No hang without a name, and no broken connection without its reason.

A thread of each rank looks at the ledger. A rank that has been in one collective longer than parallel.watchdog_s asks the side channel
where the others are, says in one sentence who is missing and where it was last seen, and tells all ranks to end: each writes the
stacks of its threads to <run folder>/hang/ and leaves with exit code 1. An error on one rank reaches the others as that rank's sentence
instead of the broken connection that follows from it. Started by train/build.py; the ledger and the collectives know nothing of it.

What must not trip it: a wait is a hang when it lasts longer than watchdog_s, whatever the missing rank does meanwhile. So writing a
checkpoint, an evaluation or a first compile may differ between ranks by less than that; raise parallel.watchdog_s where they do not.
On CUDA a rank waits where the host waits (plans, sums, norms), so that is what is named.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from parallel.ledger import Ledger
from parallel.mesh import Mesh
from parallel.side_channel import SILENT_S, End, Entry, SideChannel

LEAVE_S = 5.0  # how long a rank that ends waits for the others to have written their stacks, or heard its sentence
# After another rank's error, how long a wait may go on: gloo breaks it when that rank has ended, NCCL may not.
BREAK_S = 30.0
SHOWN = 8  # missing ranks that a sentence names one by one


@contextlib.contextmanager
def watch(
    mesh: Mesh, *, timeout_s: float, folder: Path, on_hang: Callable[[str], None] = lambda sentence: None
) -> Iterator[None]:
    """Inside, this rank is watched, and an error of any rank is heard by all.

    Every rank enters it; one process has nobody to wait for. timeout_s: seconds in one collective after which it is a hang; folder:
    where the stacks of the threads go, one file for each rank. on_hang: called with the sentence before this process is ended.

    Raises:
        RuntimeError: a collective failed because another rank did or is gone: that rank's sentence, or that it is gone.
    """
    if mesh.world_size == 1:
        yield
        return
    watchdog = Watchdog(mesh, timeout_s=timeout_s, folder=folder, on_hang=on_hang)
    try:
        yield
    except Exception as error:
        reason = watchdog.reason_of(error)
        if reason is None:
            raise
        raise RuntimeError(reason) from error
    finally:
        watchdog.stop()


class Watchdog:
    """The thread of one rank, and its end of the side channel."""

    def __init__(self, mesh: Mesh, *, timeout_s: float, folder: Path, on_hang: Callable[[str], None]) -> None:
        self.on_hang = on_hang
        self.ledger, self.rank, self.world_size = mesh.ledger, mesh.rank, mesh.world_size
        self.timeout_s, self.folder = timeout_s, folder
        store = dist.distributed_c10d._get_default_store()
        self.channel = SideChannel(
            store, rank=mesh.rank, world_size=mesh.world_size, here=lambda: entry_of(mesh.ledger)
        )
        mesh.barrier()  # every rank's first entry is there
        self.channel.start()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self.channel.ended.set()  # wakes the thread
        self._thread.join(LEAVE_S)
        self.channel.stop()

    def reason_of(self, error: Exception) -> str | None:
        """Called with what ended the run on this rank. The sentence to raise instead; None if the error is this rank's own.

        Its own error is told to the others first, and the rank stays until they have heard it: only then do connections break.
        """
        if traceback.extract_tb(error.__traceback__)[-1].name == "raise_together":
            return None  # all have heard it
        if _is_broken_collective(error, self.ledger):
            reason = self._reason_elsewhere()
            if reason is not None:
                return reason
        text = str(error) if type(error) in (RuntimeError, ValueError) else f"{type(error).__name__}: {error}"
        self.channel.tell(End("error", self.rank, f"{text} (rank {self.rank} of {self.world_size})"))
        self.channel.wait_for_all(LEAVE_S)
        return None

    def _reason_elsewhere(self) -> str | None:
        """Why a collective failed: what another rank tells within some seconds, or that one is gone. None: all are there and silent."""
        self.channel.ended.wait(LEAVE_S)
        if self.channel.end is None:
            gone = self._gone()
            if gone is None:
                return None
            sentence = f"at step {self.ledger.step}, {self.ledger.last} broke because a rank is gone: {gone}"
            self.channel.tell(End("error", self.rank, sentence))
            if self.channel.end is None:  # the store is gone too
                return sentence
        if self.channel.end.kind == "hang":
            self._thread.join()  # it ends this process
        return self.channel.end.sentence

    def _watch(self) -> None:
        tick = min(1.0, self.timeout_s / 10)
        seen, since = -1, time.monotonic()
        heard: float | None = None
        while not self._stopping.is_set():
            (self._stopping if heard is not None else self.channel.ended).wait(tick)
            now = time.monotonic()
            if self.ledger.current is None or self.ledger.progress != seen:
                seen, since = self.ledger.progress, now
            end = self.channel.end
            if end is not None and end.kind == "hang":
                self._leave(end)
            elif end is not None and heard is None:
                heard = now
                self.channel.confirm()
            elif end is not None and heard is not None:
                if now - max(since, heard) > BREAK_S:
                    self._leave(end)
            elif now - since > self.timeout_s and not self._stopping.is_set():
                named = self._name(seen, seconds=now - since)
                if named is not None:
                    self._leave(named)

    def _name(self, progress: int, *, seconds: float) -> End | None:
        """The hang that this rank is in, as told to all; None if it went on meanwhile."""
        mine = entry_of(self.ledger)
        if self.channel.is_first("hang") is False:  # one rank asks for all: 4,096 ranks would read 4,096 entries each
            self.channel.ended.wait(3 * SILENT_S)
            if self.channel.end is not None:
                return self.channel.end
        before = self.channel.entries()
        time.sleep(SILENT_S)
        entries = self.channel.entries()
        if self.ledger.progress != progress or self._stopping.is_set():
            return None
        if before is None or entries is None:
            missing = host_is_gone(self.channel.host)
        else:
            missing = missing_ranks(mine, entries, silent=silent_ranks(before, entries))
        sentence = f"rank {self.rank} of {self.world_size} has waited {seconds:.0f} s in {mine.current}, at step {mine.step}, for {missing}"
        end = End("hang", self.rank, sentence)
        self.channel.tell(end)
        return self.channel.end or end

    def _gone(self) -> str | None:
        """Names the ranks whose entries are no longer refreshed; None if all are."""
        before = self.channel.entries()
        time.sleep(0.0 if before is None else SILENT_S)
        entries = self.channel.entries()
        if before is None or entries is None:
            return host_is_gone(self.channel.host)
        silent = silent_ranks(before, entries)
        return None if not silent else _listed(silent, entries, silent=silent)

    def _leave(self, end: End) -> None:
        """Says why, after a hang with the stacks of all threads on disk; ends the process when the others have done so."""
        stacks = ""
        if end.kind == "hang":
            within(LEAVE_S, lambda: self.on_hang(end.sentence))
            path = self.folder / f"rank_{self.rank:05d}.txt"
            written = within(LEAVE_S, lambda: dump(path))
            stacks = f"; the stacks of this rank's threads are in {path}" if written else f"; {path} cannot be written"
        within(1.0, lambda: (sys.stdout.flush(), sys.stderr.flush()))
        rank = f" (rank {self.rank})" if self.rank else ""
        within(1.0, lambda: os.write(2, f"error{rank}: {end.sentence}{stacks}\n".encode()))
        self.channel.confirm()
        self.channel.wait_for_all(LEAVE_S)
        os._exit(1)


def entry_of(ledger: Ledger) -> Entry:
    current, last = ledger.current, ledger.last
    return Entry(ledger.step, ledger.progress, current and str(current), last and str(last))


def silent_ranks(before: list[Entry], after: list[Entry]) -> list[int]:
    """Ranks without a new entry between two readings that lie SILENT_S seconds apart: no process, or one that does not run."""
    return [rank for rank, (old, new) in enumerate(zip(before, after, strict=True)) if old.beat == new.beat]


def missing_ranks(mine: Entry, entries: list[Entry], *, silent: list[int]) -> str:
    """Who is not in the collective that `mine` is in, the furthest behind first.

    All ranks make the same collectives in the same order, so whoever has made less progress is what the others wait for; if nobody
    has, the order was not the same, and whoever is elsewhere is named.
    """
    behind = [rank for rank, entry in enumerate(entries) if entry.progress < mine.progress]
    elsewhere = [
        rank for rank, entry in enumerate(entries) if (entry.progress, entry.current) != (mine.progress, mine.current)
    ]
    missing = behind or elsewhere
    if not missing:
        return "nobody: every rank is in it, so the connection between them does not work"
    return _listed(sorted(missing, key=lambda rank: (entries[rank].progress, rank)), entries, silent=silent)


def host_is_gone(host: Entry | None) -> str:
    """Sentence part for a store that no longer answers. Under torchrun its agent keeps the store, otherwise rank 0."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return "the launcher on the first node, which keeps the store and no longer answers"
    seen = "" if host is None else f", last seen {host}"
    return f"rank 0, which keeps the store and no longer answers (dead or stopped{seen})"


def _listed(ranks: list[int], entries: list[Entry], *, silent: list[int]) -> str:
    texts = [
        f"rank {rank} ({'dead or stopped, last seen ' if rank in silent else ''}{entries[rank]})"
        for rank in ranks[:SHOWN]
    ]
    more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
    return " and ".join(texts) + more


def _is_broken_collective(error: Exception, ledger: Ledger) -> bool:
    """True for what torch raises in a collective whose other side is gone; running out of memory there has a type of its own."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    in_collective = ledger.failed is not None or "torch/distributed" in raised_in
    return in_collective and (type(error) is RuntimeError or isinstance(error, dist.DistError))


def dump(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)


def within(seconds: float, work: Callable[[], object]) -> bool:
    """True if `work`, on a thread of its own, is done in time: a disk or a pipe that hangs must not keep the process."""
    done: list[bool] = []

    def run() -> None:
        with contextlib.suppress(OSError):
            work()
            done.append(True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(done)
