"""A progress bar on a terminal, a line now and then elsewhere. Used by data/prepare.py."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def progress_bar(description: str, *, total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """Yields the function to call with how much of `total` is done."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(description, total=total)
            yield lambda done: progress.update(task, completed=done)
            progress.update(task, completed=total)
        return
    last_line = time.monotonic()

    def print_line(done: int) -> None:
        nonlocal last_line
        if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            console.print(f"{description}: {100 * done // max(1, total)} %")

    yield print_line
