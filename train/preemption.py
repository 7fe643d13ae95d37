"""A signal that asks the run to end early: heard here, agreed by all ranks at the end of a step, answered by a checkpoint.

SIGTERM is what SLURM, torchrun and deepspeed send, SIGUSR1 what users ask for by hand; a launcher that has ended asks too
(launcher/parent.py). A rank that has heard one does nothing but remember it: the step's own all-reduce tells the others (train/step.py),
all save after the same step (train/run.py), and the program ends with EXIT_CODE, by which a batch script knows that the same command goes
on (slurm/train_1b.sh). A second signal changes nothing: the save is on.
"""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 85


class Preemption:
    """Whether this rank was asked to end."""

    def __init__(self) -> None:
        self.is_asked = False

    def listen(self) -> None:
        """From now on the signals do not end the process. To be called in the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def ignore(self) -> None:
        """From now on they are not even heard, which lasts to the very end: where there is a handler, Python restores what was before it.

        srun sends SIGTERM to the other ranks as soon as the first has ended with EXIT_CODE; the job's exit code would be that of a rank
        that died of it.
        """
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def ask(self) -> None:
        """Does what a signal does."""
        self.is_asked = True

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True
