"""What a folder can look like after a kill or a power cut, recorded while code writes into it.

Owns: Recorder, which keeps a copy of the folder at every call to the file system. Called by: tests/train/test_checkpoint_folder.py.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

Tree = dict[str, bytes | None]  # path under the folder -> contents, None for a folder
CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Recorder:
    """The states of a folder that a kill at any call to the file system could leave, in order.

    Python tells an audit hook of every such call before it is made, whoever makes it; `os.fsync` is wrapped because it is not
    among them. `torn` has each state once more as a power cut could leave it: what was not forced to disk is cut in half.
    """

    folder: Path
    states: list[Tree] = field(default_factory=list)
    torn: list[Tree] = field(default_factory=list)
    unsynced: set[str] = field(default_factory=set)  # files whose contents a power cut may take
    unnamed: set[str] = field(default_factory=set)  # files and folders whose names it may take
    busy: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)

    def heard(self, event: str, args: tuple) -> None:
        with self.lock:
            if self.busy or (event == "open" and not (isinstance(args[2], int) and args[2] & WRITES)):
                return
            self.snapshot()
            if event == "os.rename":
                self.renamed(str(args[0]), str(args[1]))
            elif event in ("open", "os.mkdir") and str(args[0]).startswith(str(self.folder)):
                self.unnamed.add(str(args[0]))
                self.unsynced |= {str(args[0])} if event == "open" else set()

    def renamed(self, source: str, target: str) -> None:
        """Notes the new name; what is made visible must be on disk already, with the names inside it."""
        if source.endswith(".partial"):
            late = {path for path in self.unsynced | self.unnamed if path.startswith(source)} - {source}
            if target.endswith("latest"):
                late = self.unsynced | self.unnamed
            assert not late, f"{source} becomes {target} before {late} is on disk"
        self.unnamed.discard(source)
        self.unnamed.add(target)

    def snapshot(self) -> None:
        self.busy = True
        tree: Tree = {}
        torn: Tree = {}
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            tree[name] = torn[name] = None if path.is_dir() else path.read_bytes()
            if str(path) in self.unsynced:
                torn[name] = (tree[name] or b"")[: path.stat().st_size // 2]
        if not self.states or self.states[-1] != tree:
            self.states.append(tree)
        if torn != tree:
            self.torn.append(torn)
        self.busy = False

    def fsync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def wrapped(handle: int) -> None:
            with self.lock:
                self.snapshot()
                real(handle)
                path = os.readlink(f"/proc/self/fd/{handle}")
                self.unsynced.discard(path)
                self.unnamed = {name for name in self.unnamed if os.path.dirname(name) != path}

        return wrapped


LISTENING: list[Recorder] = []


@cache
def listen() -> None:
    """An audit hook stays for the life of the process: one is enough."""
    sys.addaudithook(lambda event, args: LISTENING[0].heard(event, args) if LISTENING and event in CHANGES else None)


@contextmanager
def recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Records what the body does to `folder`, which must be an absolute path."""
    listen()
    recorder = Recorder(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", recorder.fsync(os.fsync))
        LISTENING.append(recorder)
        try:
            yield recorder
        finally:
            LISTENING.clear()
    recorder.snapshot()


def plant(tree: Tree, folder: Path) -> Path:
    """Makes `folder` with what `tree` says; returns it."""
    folder.mkdir()
    for name, contents in tree.items():
        if contents is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(contents)
    return folder
