"""A signal that asks the run to end early: heard here, agreed by all ranks at the end of a step, answered by a checkpoint.

SIGTERM is what SLURM, torchrun and deepspeed send, SIGUSR1 what users ask for by hand. A rank that has heard one does nothing but remember
it: the step's own all-reduce tells the others (train/step.py), all save after the same step (train/run.py), and the program ends with
EXIT_CODE, by which a batch script knows that the same command goes on (slurm/train_1b.sh). A second signal changes nothing: the save is on.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 85


class Preemption:
    """Whether this rank was asked to end."""

    def __init__(self) -> None:
        self.is_asked = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Inside, the signals do not end the process. Python hears signals in its main thread only; in another nothing is changed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True
