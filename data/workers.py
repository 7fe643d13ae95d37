"""Reader processes: each makes its share of an endless sequence ahead of time. Knows nothing of rows. Used by data/loader.py."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

Item = TypeVar("Item")
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


class _Share(IterableDataset[Any]):
    """What one reader process yields: its share, and the error that ended it, if one did."""

    def __init__(self, work: Callable[[int, int], Iterator[Any]]) -> None:
        self._work = work

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        assert worker is not None
        _end_when_the_parent_says()
        try:
            yield from self._work(worker.id, worker.num_workers)
        except (ValueError, RuntimeError, OSError) as error:
            yield error  # as a value, because the DataLoader would replace its one sentence by a traceback


def in_processes(work: Callable[[int, int], Iterator[Item]], *, num_workers: int) -> Iterator[Item]:
    """The items of a sequence of which `work(w, num_workers)` makes every `num_workers`-th from the w-th on, in order.

    `work` must be picklable. Raises what ended the process that should have made the next.
    """
    loader = DataLoader(
        _Share(work),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        multiprocessing_context=multiprocessing.get_context(
            "spawn"
        ),  # a fork of a process with threads (gloo, CUDA) may hang
        generator=torch.Generator(),  # else it draws from torch's global one, whose state then depends on num_workers
    )
    with _deaf_children():
        items = iter(loader)  # starts the processes
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes that are started inside are not ended by these signals. SLURM sends them to every process of a step, a terminal Ctrl-C; the
    training process answers them (train/preemption.py) and needs its rows until then. Blocked before they start: booting takes seconds."""
    resource_tracker.ensure_running()  # started inside, it would unblock SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_when_the_parent_says() -> None:
    """In a deaf child: a thread waits for the signals, and ends the process where the parent is who sent one. Python's multiprocessing
    does so when the parent ends, and then waits for the child."""
    parent = os.getppid()

    def listen() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=listen, name="signals of the parent", daemon=True).start()


def _unchanged(item: Any) -> Any:
    return item
