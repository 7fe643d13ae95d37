"""When a checkpoint is written: behind the steps or before the next, one at a time, and what a write that fails means for the run.

Owns the thread that writes, the waiting for it, the counting of failures and the sentences about them. Does not own how a checkpoint
is written (train/checkpoint.py) nor when one is due (train/run.py, the caller). All methods but `close` are called by all ranks at
the same place of the run. docs/decisions/0005-saving-behind-the-steps.md has the reasons.

The thread makes its collectives on a mesh of its own (`World.beside`), in one order on every rank because there is one write at a time;
the training's collectives stay the main thread's. What came of a write becomes known to all ranks together, in the main thread: so
all of them go on, or all stop, after the same step. With `checkpoint.asynchronous: false` the main thread does nothing but wait for
the thread, so that the limit is the same.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from model.fragments import Fragment
from train import checkpoint
from train.checkpoint import TrainState
from train.checkpoint_config import CheckpointConfig
from train.engine import World
from train.host_copy import HostCopy
from train.together import on_every_rank

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # in a row: what failed three times does not mend itself
QUIET_S = 1.0  # a wait at the run's end that is longer is said
LAST_BREATH_S = 10.0  # of a thread whose write has ended; milliseconds as a rule


@contextlib.contextmanager
def open_saver(
    folder: Path,
    world: World,
    settings: CheckpointConfig,
    *,
    patience_s: float,
    say: Callable[[str], None],
) -> Iterator["Saver"]:
    """Every rank enters it; leaving it waits for the write to end. See `Saver`."""
    with contextlib.ExitStack() as stack:
        channel = stack.enter_context(world.beside(timeout_s=settings.timeout_s))
        saver = Saver(folder, world, channel, settings, patience_s=patience_s, say=say)
        stack.push(saver.close)
        yield saver


@dataclass
class Write:
    """A checkpoint that is being written. failure and seconds are set by the thread before it says that it has ended.

    ended: an event, because Thread.join, broken off by an exception (Ctrl-C), takes a live thread for an ended one (Python 3.11).
    """

    step: int
    limit_s: float
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    failure: str | None = None
    thread: threading.Thread | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # whatever it was: it becomes the sentence of a failed save
            self.failure = _said(error)
            if not isinstance(error, RuntimeError | ValueError) and str(error):
                self.failure = f"{type(error).__name__}: {error}"
        finally:
            self.seconds = time.monotonic() - self.began
            self.ended.set()

    @property
    def is_on(self) -> bool:
        return self.thread is not None and not self.ended.is_set()

    @property
    def left_s(self) -> float:
        """Seconds that it may still take."""
        return self.began + self.limit_s - time.monotonic()

    @property
    def is_late(self) -> bool:
        """It takes, or took, longer than it may: a rank may have given up waiting for another, and then no collective works any more."""
        return self.thread is not None and (self.left_s <= 0 if self.is_on else self.seconds > self.limit_s)

    def wait(self, seconds: float) -> None:
        if self.thread is not None and self.ended.wait(max(0.0, seconds)):
            # It lets go of its tensors after it has said that it ended. A Python that ends meanwhile takes the process down with it
            # ("terminate called without an active exception").
            self.thread.join(LAST_BREATH_S)


class Saver:
    """The checkpoints of a run in `folder`. channel: a mesh for the thread alone.

    patience_s: how long the end of the run by an error waits for a write. say: prints a sentence, once for all ranks.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        channel: World,
        settings: CheckpointConfig,
        *,
        patience_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._world, self._channel, self._settings = folder, world, channel, settings
        self._patience_s, self._say = patience_s, say
        self._copy = HostCopy()
        self._write: Write | None = None
        self._failures = 0  # in a row
        self._failure = ""  # the last of them
        self._record: dict[str, Any] = {}

    def save(self, state: TrainState, *, fragments: Sequence[Fragment], tensors: Mapping[str, Tensor]) -> None:
        """Saves what `checkpoint.save` is given; when it returns, the tensors may change. Waits for the write before, if that is on.

        Raises:
            RuntimeError: on all ranks: a save failed and the config says stop, or it was the third in a row; or the write before has
                not ended in time.
        """
        began = time.monotonic()
        self.settle()
        write = self._write = Write(state.step, self._settings.timeout_s)
        try:
            fragments, tensors = list(fragments), dict(tensors)
            if self._settings.asynchronous:
                copied = on_every_rank(self._world, lambda: self._copy.take(fragments, tensors))
                fragments, tensors = copied.fragments, copied.tensors
        except (RuntimeError, ValueError) as error:  # on all ranks alike: no room for the copy
            write.failure = str(error)
        else:
            self._start(write, state, fragments, tensors)
        if write.thread is None or not self._settings.asynchronous:
            self.settle()
        self._count("wait_seconds", time.monotonic() - began)

    def look(self) -> None:
        """After a step: if a write has ended on all ranks, or is late, all learn what came of it. While there is one, an all-reduce of
        4 bytes.

        Raises:
            RuntimeError: see `save`.
        """
        write = self._write
        if write is not None and not self._world.agree(write.is_on and not write.is_late):
            self.settle()

    def settle(self) -> None:
        """Waits for the write that is on, if one is; what came of it is then the same on all ranks. Before a checkpoint is read.

        Raises:
            RuntimeError: see `save`.
        """
        write = self._write
        if write is None:
            return
        write.wait(write.left_s)
        told = self._world.all_gather_object([write.is_on, write.is_late, write.seconds, write.failure])
        for rank, (is_on, is_late, seconds, _) in enumerate(told):
            # its copy cannot be overwritten or its mesh does not work any more: there cannot be another save
            if is_on or is_late:
                found = "it is still not" if is_on else f"it took {seconds:.1f} s"
                raise RuntimeError(
                    f"the checkpoint of step {write.step} must be written in {write.limit_s:g} s, but on rank {rank} of {len(told)} "
                    f"{found}: check the disk of {self._folder}, or raise checkpoint.timeout_s; the checkpoints before it are untouched"
                )
        self._write = None
        self._record["write_seconds"] = write.seconds
        failure = next((failure for *_, failure in told if failure is not None), None)
        self._failures = 0 if failure is None else self._failures + 1
        self._record["failures"] = self._failures
        if failure is not None:
            self._failed(write.step, failure)

    def finish(self, *, goes_on: bool = False) -> bool:
        """At the end of the run: waits for the write, if one is on. goes_on: another start will, so that a save that failed costs what any
        other does. Whether the last save is whole.

        Raises:
            RuntimeError: see `save`; and without `goes_on` if the last save failed, whatever the config says: nothing comes after it that
                could repair it.
        """
        self.settle()
        if self._failures and not goes_on:
            raise RuntimeError(self._failure)
        return not self._failures

    def take_record(self) -> dict[str, Any]:
        """For metrics, about the saves since the last call; empty if there was none.

        checkpoint/wait_seconds: how long this rank's steps waited (for the write before and the copy, or for all of it).
        write_seconds: of the write that ended last. failures: in a row. failure: the last failed save's sentence.
        """
        record, self._record = self._record, {}
        return {"checkpoint": record} if record else {}

    def close(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Waits for the write, without a word to other ranks: they may be elsewhere. After an error at most `patience_s` seconds,
        after Ctrl-C one."""
        write, self._write = self._write, None
        if write is not None:
            write.wait(0.0)
            if write.is_on:
                self._wait_at_end(write, error)
        if write is None or not write.is_on:  # a thread that is given up still reads it
            self._copy.close()

    def _wait_at_end(self, write: Write, error: BaseException | None) -> None:
        limit = write.left_s
        if error is not None:
            # Ctrl-C: somebody waits; what is written stays aside, where the next start removes it
            limit = min(limit, self._patience_s if isinstance(error, Exception) else QUIET_S)
        write.wait(min(limit, QUIET_S))
        if write.is_on and limit > QUIET_S:
            # the reason first: should the process be ended while it waits, it is on the console
            reason = "the run ends" if error is None else f"the run ends because {_said(error)}"
            logger.warning(
                "%s; the checkpoint of step %d is being written, for at most %.0f s more", reason, write.step, limit
            )
            write.wait(limit - QUIET_S)
        if write.is_on:
            logger.warning(
                "the checkpoint of step %d was not written in time: those before it are untouched", write.step
            )
        elif write.failure is not None:
            logger.warning("the checkpoint of step %d was not written: %s", write.step, write.failure)

    def _start(self, write: Write, state: TrainState, fragments: list[Fragment], tensors: dict[str, Tensor]) -> None:
        def work() -> None:
            checkpoint.save(
                self._folder,
                state=state,
                fragments=fragments,
                tensors=tensors,
                mesh=self._channel,
                keep=self._settings.keep,
            )

        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()  # the thread has a current stream of its own
        # daemon: a disk that never answers must not keep the process
        thread = threading.Thread(target=write.run, args=(work,), name="checkpoint", daemon=True)
        thread.start()
        write.thread = thread

    def _failed(self, step: int, failure: str) -> None:
        self._failure = f"the checkpoint of step {step} was not written: {failure}"
        self._record["failure"] = self._failure
        if self._settings.on_failure == "stop":
            raise RuntimeError(self._failure)
        if self._failures >= MAX_FAILURES:
            raise RuntimeError(f"{self._failure}; it is failure {self._failures} in a row, after which a run stops")
        self._say(f"{self._failure}; failure {self._failures} in a row, after {MAX_FAILURES} the run stops")

    def _count(self, name: str, seconds: float) -> None:
        self._record[name] = self._record.get(name, 0.0) + seconds


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__
