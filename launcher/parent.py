"""Whether what has started this process is still there; if not, the run is asked to end as by SIGTERM.

`deepspeed` on one machine is two processes (0.19.8): the command, and below it deepspeed.launcher.launch, which starts the ranks. Only the
second hands a signal on. The command dies of one without a word, and so does torchrun of kill -9: their ranks would train on, and hold the
run folder, where nobody looks. So a rank looks at its parent, and under `deepspeed` at that one's. A process whose parent ends has
another parent from that moment on: no number of a process that is used again can be mistaken.

Called by launcher/main.py before it imports what takes time, so nothing but Python's own library is imported here: only a launcher that
ends in the interpreter's own first tenth of a second goes unnoticed. Knows of neither ranks nor training.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Set by torchrun and by deepspeed's launcher, and not by hand: one of them has started this very process.
LAUNCHED = {"TORCHELASTIC_RUN_ID", "CROSS_SIZE"}
LOOK_S = 0.25  # 0.1 ms each


@dataclass(frozen=True)
class Launcher:
    """parent: the process that has started this one. command: its own parent, where that is the `deepspeed` command."""

    parent: int
    command: int | None

    @property
    def is_gone(self) -> bool:
        if os.getppid() != self.parent:
            return True
        with contextlib.suppress(OSError):  # the parent has ended since the line above: the next look sees it
            return self.command is not None and _parent_of(self.parent) != self.command
        return False


def watch_launcher(environ: Mapping[str, str], on_end: Callable[[], None]) -> None:
    """From now on a thread calls `on_end`, once, when the launcher of this process has ended. Without a launcher it does nothing: a
    shell that has started a run may end.
    """
    launcher = launcher_of(environ)
    if launcher is None:
        return

    def look() -> None:
        while not launcher.is_gone:
            time.sleep(LOOK_S)
        on_end()
        with contextlib.suppress(OSError):  # its output may have ended with it
            print(
                "the launcher has ended: so does the run, after this step and its checkpoint",
                file=sys.stderr,
                flush=True,
            )

    threading.Thread(target=look, name="launcher", daemon=True).start()


def launcher_of(environ: Mapping[str, str]) -> Launcher | None:
    """None where neither deepspeed nor torchrun has started this very process."""
    if not LAUNCHED & environ.keys():
        return None
    parent = os.getppid()
    command = None
    with contextlib.suppress(OSError):
        above = _parent_of(parent)
        if is_deepspeed(_command_line(parent), _command_line(above)):
            command = above
    return Launcher(parent, command)


def is_deepspeed(launch: Sequence[str], command: Sequence[str]) -> bool:
    """Of the command lines of a parent and of its own: python -m deepspeed.launcher.launch, started by python /some/where/deepspeed or
    python -m deepspeed.launcher.runner. A shell script of that name is none: it may end before its run.
    """
    if "deepspeed.launcher.launch" not in launch or not command or not Path(command[0]).name.startswith("python"):
        return False
    words = [word for word in command[1:] if not word.startswith("-")]
    return bool(words) and Path(words[0]).name in ("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")


def _parent_of(process: int) -> int:
    """OSError where there is no such process, or none that this one may see."""
    stat = Path(f"/proc/{process}/stat").read_text(errors="replace")  # 12 (a name (of any letters)) S 11 ...
    return int(stat.rpartition(")")[2].split()[1])


def _command_line(process: int) -> list[str]:
    return Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")[:-1]
