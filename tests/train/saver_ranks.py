"""Ranks as threads, each with a saver whose thread has a world of its own; and disks that are slow or full.

Called by test_saver.py and test_saver_failures.py.
"""

import builtins
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.thread_mesh import STATE, ThreadMesh, World, draw, split
from train import checkpoint, storage
from train.checkpoint_config import CheckpointConfig
from train.saver import Saver, open_saver

RANKS = 2


class Rank(ThreadMesh):
    """A rank with a second world for its saver's thread. patience: how long its collectives were asked to wait."""

    patience: float | None = None

    def __init__(self, world: World, channel: World, rank: int) -> None:
        super().__init__(world, rank)
        self.channel, self.said = channel, list[str]()

    def agree(self, flag: bool) -> bool:
        return any(self._gather(flag))

    @contextlib.contextmanager
    def beside(self, *, timeout_s: float) -> Iterator[Any]:
        self.patience = timeout_s
        yield ThreadMesh(self.channel, self.rank)


@dataclasses.dataclass
class Held:
    """A rank's saver and what it saves."""

    rank: Rank
    saver: Saver
    fragments: list[Any]
    tensors: dict[str, torch.Tensor]

    def save(self, step: int) -> None:
        state = dataclasses.replace(STATE, step=step)
        self.saver.save(state, fragments=self.fragments, tensors=self.tensors)

    def fill(self, value: float) -> None:
        for view in [view for fragment in self.fragments for view in fragment.tensors.values()]:
            view.fill_(value)
        for tensor in self.tensors.values():
            tensor.fill_(value)

    def look_until_known(self) -> dict[str, Any]:
        """Steps without a save, until one of them tells what came of the last one."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            self.saver.look()
            record = self.saver.take_record().get("checkpoint", {})
            if "write_seconds" in record:
                return record
            time.sleep(0.01)
        raise AssertionError("the write never ended")


def on_ranks(
    folder: Path, work: Callable[[Held], Any], *, patience_s: float = 20.0, ranks: int = RANKS, **settings: Any
) -> tuple[list[Any], list[BaseException | None], list[list[str]]]:
    """`work` on every rank: what each returned, raised, and said."""
    world, channel = World(ranks), World(ranks)
    members = [Rank(world, channel, number) for number in range(ranks)]
    results: list[Any] = [None] * ranks
    errors: list[BaseException | None] = [None] * ranks
    parts = split(draw(1), ranks, seed=0)
    config = CheckpointConfig.model_validate(settings)

    def live(member: Rank) -> None:
        tensors = {"bias": torch.arange(5, dtype=torch.int64)} if member.rank == 0 else {}
        opened = open_saver(folder, member, config, patience_s=patience_s, say=member.said.append)  # pyright: ignore[reportArgumentType]
        try:
            with opened as saver:
                results[member.rank] = work(Held(member, saver, parts[member.rank], tensors))
        except BaseException as error:
            errors[member.rank] = error

    threads = [threading.Thread(target=live, args=(member,)) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank hangs"
    return results, errors, [member.said for member in members]


class Disk:
    """Stands before the writing of tensor files: may hold it up, and counts how many writes of a rank are on at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = threading.Event()
        self.free.set()
        self.delay_s = 0.0
        self.on: dict[str, int] = {}
        self.most = 0
        write, lock = checkpoint.write_tensors, threading.Lock()

        def slow(path: Path, parts: Any) -> Any:
            with lock:
                self.on[path.name] = self.on.get(path.name, 0) + 1
                self.most = max(self.most, self.on[path.name])
            assert self.free.wait(20)
            time.sleep(self.delay_s)
            written = write(path, parts)
            with lock:
                self.on[path.name] -= 1
            return written

        monkeypatch.setattr(checkpoint, "write_tensors", slow)


def fail_to_write(monkeypatch: pytest.MonkeyPatch, name: str, *, times: int = 10**9) -> None:
    """The disk is full whenever the file `name` is written, so many times."""
    left = [times]

    def open_on_a_full_disk(path: Path, mode: str) -> Any:
        if mode == "xb" and path.name == name and left[0] > 0:
            left[0] -= 1
            return builtins.open("/dev/full", "wb")
        return builtins.open(path, mode)

    monkeypatch.setattr(storage, "open", open_on_a_full_disk, raising=False)
