"""How nodes tell each other what they found without a collective: files in a folder that all of them should see.

Owns that folder, who may speak for all, and how long is waited. A node that is broken does not join a collective, and everyone else would
hang in it; a file that is missing is a fact. parallel/mpi.py has a meeting of the same form for mpirun. Called by launcher/preflight.py.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from data.files import write_whole

POLL_S = 0.1
LEAVE_S = 10.0  # for the others to read the last word


class Meeting(Protocol):
    """A meeting of `size` nodes, each of which makes the same calls in the same order. Values are JSON."""

    rank: int
    size: int

    def gather(
        self, topic: str, value: Any, *, patience_s: float, ranks: Iterable[int] | None = None
    ) -> dict[int, Any]:
        """Tells `value`; returns by rank what `ranks` (None: all nodes) have told when all have, or after `patience_s` seconds."""
        ...

    def leads(self, arrived: Iterable[int]) -> bool:
        """Whether this node decides for all, if it is `arrived` whom it sees. RuntimeError where it sees too few to know."""
        ...

    def settle(self, topic: str, value: Any, *, patience_s: float) -> Any:
        """The one decision about `topic`: the leader gives it as `value`, the others None. RuntimeError if none comes in time."""
        ...

    def leave(self) -> None:
        """Ends the meeting."""
        ...


def seen_marks(folder: Path, ranks: Iterable[int], *, patience_s: float) -> list[int]:
    """Which of `ranks` have left their mark in `folder`; waits at most `patience_s` seconds for all (NFS shows a new name late)."""
    wanted = {f"mark-{rank}": rank for rank in ranks}
    deadline = time.monotonic() + patience_s
    while True:
        listed = _listed(folder)
        if wanted.keys() <= listed or time.monotonic() > deadline:
            return sorted(rank for name, rank in wanted.items() if name in listed)
        time.sleep(POLL_S)


class FolderMeeting:
    """Meets in `folder`, which every node makes if it is missing. Its name must be of this start alone: what lies there is taken for told.

    Raises:
        RuntimeError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, *, rank: int, size: int) -> None:
        self.folder, self.rank, self.size = folder, rank, size
        self._arrived = {rank}
        self._decided = False

    def gather(
        self, topic: str, value: Any, *, patience_s: float, ranks: Iterable[int] | None = None
    ) -> dict[int, Any]:
        wanted = set(range(self.size) if ranks is None else ranks)
        self._write(f"{topic}-{self.rank}.json", value)
        deadline = time.monotonic() + patience_s
        told: dict[int, Any] = {}
        while True:
            listed = _listed(self.folder)
            for rank in wanted - told.keys():
                name = f"{topic}-{rank}.json"
                if name in listed:
                    told[rank] = json.loads((self.folder / name).read_text(encoding="utf-8"))
            if told.keys() == wanted or time.monotonic() > deadline:
                self._arrived |= told.keys()
                return told
            time.sleep(POLL_S)

    def leads(self, arrived: Iterable[int]) -> bool:
        """The lowest rank among more than half of the nodes, or among half of them with rank 0: of two groups that do not see each other
        only one can decide, and it is not the node with a folder of its own."""
        seen = set(arrived)
        if self.rank != min(seen):
            return False
        if 2 * len(seen) + (self.rank == 0) <= self.size:
            raise RuntimeError(
                f"most nodes must meet in {self.folder}, but only {len(seen)} of {self.size} are seen from here: mount the shared folder "
                "on this node, or start the others; they decide without this one"
            )
        return True

    def settle(self, topic: str, value: Any, *, patience_s: float) -> Any:
        path = self.folder / f"{topic}.json"
        if value is not None:
            with contextlib.suppress(FileExistsError):  # a node that waited less has decided already: that one counts
                with path.open("x", encoding="utf-8") as file:
                    file.write(json.dumps(value))
                self._decided = True
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if path.name in _listed(self.folder):
                with contextlib.suppress(ValueError):  # it is being written
                    return json.loads(path.read_text(encoding="utf-8"))
            time.sleep(POLL_S)
        raise RuntimeError(
            f"the nodes must decide within {patience_s:g} s, but {path} is not there: mount the shared folder on this node, or look for "
            "what the first node says"
        )

    def leave(self) -> None:
        """Who has decided removes the folder when the others have read it; a node that sees nobody removes its own files."""
        with contextlib.suppress(OSError):
            if self._decided:
                self._write(f"left-{self.rank}.json", True)
                deadline = time.monotonic() + LEAVE_S
                waiting = {f"left-{rank}.json" for rank in self._arrived}
                while waiting - _listed(self.folder) and time.monotonic() < deadline:
                    time.sleep(POLL_S)
                if not waiting - _listed(self.folder):
                    shutil.rmtree(self.folder)
            elif self._arrived == {self.rank}:
                for name in _listed(self.folder):
                    if name.rsplit(".", 1)[0].endswith(f"-{self.rank}"):
                        (self.folder / name).unlink()
                self.folder.rmdir()
            else:
                self._write(f"left-{self.rank}.json", True)

    def _write(self, name: str, value: Any) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / name, json.dumps(value).encode())
        except OSError as error:
            raise RuntimeError(
                f"{self.folder} must be a folder that this node can write, but it cannot ({error.strerror or error}): mount the shared "
                "folder, or choose another run.dir"
            ) from error


def _listed(folder: Path) -> set[str]:
    """A listing, because NFS remembers of a single name that it was absent."""
    with contextlib.suppress(FileNotFoundError):
        return set(os.listdir(folder))
    return set()
