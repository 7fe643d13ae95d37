"""Fetched shards on this node's disk: whole or absent, verified, shared by its processes, within a limit.

webdataset's FileCache was looked at and is not used: it gives a file its name before it looks at it, compares no checksum, takes no
lock (two processes fetch a shard twice), names files by the last part of their address (two sources meet), removes the files that were
made, not used, longest ago, open ones too, and reserves no space for what is being fetched. What is left would be a download in ten lines.

A shard's file has its checksum in its name, so that a changed shard is another file, and sources with a shard in common share it. Locks are
flock on local files, which the kernel drops with a process: a reader holds its file's for as long as it reads, a fetching process its
partial file's. Whoever makes room tries these locks, so nothing in use is removed, and what a killed process left behind is. One lock
for the folder is held while room is counted and made, never during a transfer. Used by data/reader.py; data/split.py makes it.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data.damage import NodeTrouble
from data.files import exclusive
from data.remote import fetch
from data.shards import SHARD_SUFFIX, ShardInfo

PARTIAL_SUFFIX = ".partial"
ROOM_WAIT_S = 300.0  # for others to stop using what is in the way; a transfer takes so long, a read milliseconds
POLL_S = 0.1
GB = 10**9


@dataclass(frozen=True)
class ShardCache:
    """The shards of one place in a folder that other caches may share. Small: it goes to reader processes."""

    folder: Path
    limit_bytes: int
    place: str

    @contextmanager
    def hold(self, shard: ShardInfo) -> Iterator[Path]:
        """The shard's file, fetched if it is not there, and kept there during the body.

        Raises RuntimeError if it cannot be fetched, NodeTrouble if there is no room for it or the folder cannot be used.
        """
        path = self._path(shard)
        while True:
            with self._told(shard):
                file = self._open(path)
            if file is None:
                self._fetch(shard, path)
                continue
            with file:
                yield path
            return

    def discard(self, shard: ShardInfo) -> None:
        """Removes a file that turned out to be damaged: the next `hold` fetches it anew."""
        with self._told(shard):
            self._path(shard).unlink(missing_ok=True)

    @contextmanager
    def _told(self, shard: ShardInfo) -> Iterator[None]:
        """Makes a sentence of what the disk says."""
        try:
            yield
        except OSError as error:
            raise NodeTrouble(
                f"{shard.name} cannot be kept in data.cache {self.folder} ({error.strerror or error}): free space there, or choose "
                "another folder"
            ) from error

    @staticmethod
    def _open(path: Path) -> BinaryIO | None:
        """The file, locked for reading; None if it is not there."""
        while True:
            try:
                file = path.open("rb")
            except FileNotFoundError:
                return None
            fcntl.flock(file, fcntl.LOCK_SH)
            if _is_at(file, path):
                with suppress(OSError):  # another user's file: it then counts as unused since they used it
                    os.utime(path)  # its last use, for whoever makes room
                return file
            file.close()  # it was removed between open and lock

    def _path(self, shard: ShardInfo) -> Path:
        return self.folder / f"{shard.name.removesuffix(SHARD_SUFFIX)}-{shard.sha256[:16]}{SHARD_SUFFIX}"

    def _fetch(self, shard: ShardInfo, path: Path) -> None:
        partial = path.with_suffix(PARTIAL_SUFFIX)
        with (
            self._told(shard),
            exclusive(path.with_suffix(".lock")),
        ):  # another process that wants this shard waits here
            if path.exists():
                return
            with self._reserved(partial, shard) as file:
                try:
                    fetch(self.place, shard.name, file, size=shard.bytes, sha256=shard.sha256)
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(partial, path)
                except BaseException:
                    partial.unlink(missing_ok=True)
                    raise

    @contextmanager
    def _reserved(self, partial: Path, shard: ShardInfo) -> Iterator[BinaryIO]:
        """The partial file, locked, and as long as the shard from the start, so that its room is counted."""
        deadline = time.monotonic() + ROOM_WAIT_S
        while True:
            with exclusive(self.folder / ".room.lock"):
                missing = self._make_room(shard.bytes)
                if missing <= 0:
                    file = partial.open("wb")
                    fcntl.flock(file, fcntl.LOCK_EX)
                    os.truncate(partial, shard.bytes)
                    break
            if shard.bytes > self.limit_bytes or time.monotonic() > deadline:
                raise NodeTrouble(
                    f"data.cache_gb must hold the shards that are in use at the same time, but it is {self.limit_bytes / GB:g} and "
                    f"{shard.name} of {shard.bytes / GB:g} GB needs {missing / GB:g} GB more: raise data.cache_gb"
                )
            time.sleep(POLL_S)
        with file:
            yield file

    def _make_room(self, needed: int) -> int:
        """Removes what nobody uses, first what was never finished, then the longest unused; returns the bytes still missing."""
        found = []
        for path in (*self.folder.glob(f"*{SHARD_SUFFIX}"), *self.folder.glob(f"*{PARTIAL_SUFFIX}")):
            with suppress(FileNotFoundError):  # a partial file that just got its name
                state = path.stat()
                found.append((path.suffix != PARTIAL_SUFFIX, state.st_mtime_ns, state.st_size, path))
        found.sort()
        missing = sum(size for _, _, size, _ in found) + needed - self.limit_bytes
        for _, _, size, path in found:
            if missing > 0 and _remove_unused(path):
                missing -= size
        return missing


def _remove_unused(path: Path) -> bool:
    with suppress(FileNotFoundError, PermissionError), path.open("rb") as file:  # another user's stays
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            return False
        path.unlink()
        return True
    return False


def _is_at(file: BinaryIO, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False
