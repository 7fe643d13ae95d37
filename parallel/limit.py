"""A limit for what waits in the C++ of torch without one, and cannot be broken off: the process is ended, with a sentence.

Called by train/build.py for the start: when the ranks have met (parallel/meeting.py has limits of its own) they make their groups, by way
of the store that rank 0 keeps. Of a rank 0 that is stopped in these tenths of a second the store's calls would wait for ever, and
no watchdog looks yet.
"""

import contextlib
import os
import threading
from collections.abc import Iterator

from parallel.config import ProcessInfo


@contextlib.contextmanager
def ended_after(seconds: float, info: ProcessInfo) -> Iterator[None]:
    """Ends this process with exit code 1 where the start, which is what is inside, takes longer than so many seconds."""
    has_started = threading.Event()

    def look() -> None:
        if has_started.wait(seconds):
            return
        sentence = (
            f"all {info.world_size} ranks must have joined in {seconds:g} s, but have not: rank 0, which keeps the store, at "
            f"{info.master_addr}:{info.master_port}, or another rank is stopped or gone; end all that are left and start again"
        )
        with contextlib.suppress(OSError):  # whoever has read it may have gone
            os.write(2, f"error{f' (rank {info.rank})' if info.rank else ''}: {sentence}\n".encode())
        os._exit(1)

    threading.Thread(target=look, name="limit", daemon=True).start()
    try:
        yield
    finally:
        has_started.set()
