"""What a drill does to a rank from inside: a journal of the rows it trains on, a wait at a named instant, a clock that jumps.

Owns POINTS, the instants at which a rank can be made to wait until somebody has killed it, and what is written about the rows: what the
model was given, not where the data position says they lie. Called by warm_main.py in the rank, before launcher/main.py runs.
"""

import datetime
import json
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# Name -> whether any rank gets there (else only rank 0), and how a call to the file system that is about to be made is known.
IN_A_SAVE = {
    "before a rank's file": (True, r"open new .*\.partial/rank_\d+\.safetensors"),
    "in the middle of a rank's file": (True, r"chunk .*\.partial/rank_\d+\.safetensors"),
    "between a rank's file and its fsync": (True, r"fsync .*\.partial/rank_\d+\.safetensors"),
    "between the ranks' files and the manifest": (False, r"open new .*\.partial/manifest\.json"),
    "between the manifest and its sum": (False, r"open new .*\.partial/manifest\.sha256"),
    "between the last fsync and the first rename": (False, r"open new .*/latest\.partial"),
    "between fsync and rename": (False, r"rename .*/step_\d+\.partial .*/step_\d+"),
    "between rename and latest": (False, r"rename .*/latest\.partial .*/latest"),
    "between latest and the removal of the old": (False, r"rename .*/step_\d+(\.old)? .*\.partial"),
    "in the removal of the old": (False, r"rmdir .*/step_\d+(\.old)?\.partial"),
}
AT_THE_START = {
    "while a checkpoint is read": (True, r"open old .*/step_\d+(\.old)?/rank_\d+\.safetensors"),
    "between config.yaml and its rename": (False, r"rename .*/config\.partial .*/config\.yaml"),
    "between metrics.jsonl and its rename": (False, r"rename .*/metrics\.partial .*/metrics\.jsonl"),
}
POINTS = IN_A_SAVE | AT_THE_START
WAIT_S = 150
YEAR_S = 365 * 24 * 3600


def install(faults: dict[str, Any]) -> None:
    """journal: a file for the rows. point, time, folder: wait when the rank gets to the point for the time-th time, from then until
    `folder`/go is there; `folder`/reached says that it waits. clock: a seed; the wall clock jumps."""
    if "journal" in faults:
        keep_journal(faults["journal"])
    if "point" in faults:
        wait_at(POINTS[faults["point"]][1], time_of=faults["time"], folder=Path(faults["folder"]))
    if "clock" in faults:
        jump(random.Random(faults["clock"]))


def keep_journal(path: str) -> None:
    """One line for each micro-step that is handed to the model in training."""
    from train import step as train_step

    file, forward = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), train_step.forward

    def noted(engine: Any, batch: Any, *args: Any, step: int, **options: Any) -> Any:
        if engine.model.training:
            rows = {"tokens": batch.tokens_BS, "targets": batch.targets_BS, "documents": batch.document_ids_BS}
            line = {"step": step + 1} | {name: tensor.tolist() for name, tensor in rows.items()}
            os.write(file, json.dumps(line).encode() + b"\n")  # one call: a kill leaves the whole line or nothing
        return forward(engine, batch, *args, step=step, **options)

    train_step.forward = noted


def wait_at(pattern: str, *, time_of: int, folder: Path) -> None:
    from train import storage

    wanted, lock = re.compile(pattern), threading.Lock()
    seen: list[str] = []

    def at(what: str) -> None:
        with lock:
            seen.append(what)
            reached = len(seen) == time_of
        if reached:
            (folder / "reached").touch()
            deadline = time.monotonic() + WAIT_S
            while not (folder / "go").exists() and time.monotonic() < deadline:
                time.sleep(0.002)

    def hear(event: str, args: tuple[Any, ...]) -> None:
        what = described(event, args)
        if what is not None and wanted.fullmatch(what):
            at(what)

    fsync, write_file = os.fsync, storage.write_file

    def noted_fsync(handle: int) -> None:
        hear("fsync", (os.readlink(f"/proc/self/fd/{handle}"),))
        fsync(handle)

    def noted_write(path: Path, chunks: Iterable[Any], *, size: int) -> Any:
        def pieces() -> Iterator[Any]:
            for number, chunk in enumerate(chunks):
                if number == 1:
                    hear("chunk", (path,))
                yield chunk

        return write_file(path, pieces(), size=size)

    os.fsync, storage.write_file = noted_fsync, noted_write
    sys.addaudithook(hear)


def described(event: str, args: tuple[Any, ...]) -> str | None:
    """A call as one line. Python tells an audit hook of it before it is made; fsync and chunks are not among those and are wrapped."""
    if event == "open":
        mode = args[1] or ""
        return f"open {'new' if set(mode) & set('xwa') else 'old'} {args[0]}"
    if event == "os.rename":
        return f"rename {args[0]} {args[1]}"
    if event == "os.rmdir":
        return f"rmdir {args[0]}"
    if event in ("fsync", "chunk"):
        return f"{event} {args[0]}"
    return None


def jump(draw: random.Random) -> None:
    """Each look at the wall clock finds it somewhere between 30 years ago and 40 years on. The monotonic clock goes on as it does."""

    def jumping(now: Callable[[], float]) -> Callable[[], float]:
        return lambda: now() + draw.choice([-30 * YEAR_S, -3600, 3600, 40 * YEAR_S])

    time.time = jumping(time.time)
    real_ns = time.time_ns
    time.time_ns = lambda: real_ns() + draw.choice([-30, 40]) * YEAR_S * 10**9

    class JumpingDatetime(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().fromtimestamp(time.time(), tz)

    ours = ("launcher.", "train.", "parallel.", "model.", "data.")
    for module in [module for name, module in sys.modules.items() if name.startswith(ours)]:
        if getattr(module, "datetime", None) is datetime.datetime:
            module.datetime = JumpingDatetime  # pyright: ignore[reportAttributeAccessIssue]
