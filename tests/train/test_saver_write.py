"""train/saver.py: one write by itself. Who waits for it knows when it has ended, and how."""

import os
import signal
import threading
import time
from functools import partial

import pytest

from train.saver import Write


def test_who_has_waited_for_a_write_finds_nothing_left_of_it():
    """What the thread still held when it said that it had ended is gone: the process may end."""
    freed = threading.Event()

    class Slow:
        def __del__(self):
            time.sleep(0.3)
            freed.set()

    write = Write(4, 60.0)
    write.thread = threading.Thread(target=write.run, args=(partial(id, Slow()),), daemon=True)
    write.thread.start()
    write.wait(20)
    assert not write.is_on
    assert freed.is_set()


def test_an_interrupt_does_not_take_a_live_write_for_an_ended_one():
    """Thread.join that an exception breaks off forgets the thread (Python 3.11), and then the copy would be freed under it."""
    free, write = threading.Event(), Write(4, 60.0)
    write.thread = threading.Thread(target=write.run, args=(lambda: free.wait(20),), daemon=True)
    write.thread.start()
    interrupt = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    # ignored where a shell began this in the background
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        write.wait(20)
    signal.signal(signal.SIGINT, before)
    assert write.is_on
    free.set()
    write.wait(20)
    assert not write.is_on
    assert write.seconds > 0.2


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError(), "RuntimeError"),
        (RuntimeError("the disk is gone"), "the disk is gone"),
        (MemoryError(), "MemoryError"),
        (OSError(28, "full"), "OSError: [Errno 28] full"),
    ],
)
def test_an_error_without_text_still_says_what_it_was(error: Exception, sentence: str):
    write = Write(4, 60.0)

    def fail() -> None:
        raise error

    write.run(fail)
    assert write.failure == sentence
