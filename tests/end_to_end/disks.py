"""Disks that are full or cannot be written, for processes of any user: root included, whom permissions do not bind.

Owns where such a disk comes from. Mounted: a tmpfs in a mount namespace that a shell keeps open; everyone reaches it as
/proc/<the shell>/root/<folder>, and the rest of the machine sees no mount. Limited, where a container allows no namespaces: a limit
on the size of files, and a folder without write permission for a process without capabilities. Called by test_disks_and_clocks.py.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

DISK_BYTES = 8 * 2**20


class Disk(Protocol):
    """folder: on it. `full` and `read_only` give what `warm.start` must be told besides, while they last."""

    @property
    def folder(self) -> Path: ...
    def full(self, *, but_bytes: int) -> Any: ...
    def read_only(self) -> Any: ...


class Mounted:
    """A tmpfs of DISK_BYTES."""

    def __init__(self, shell: "subprocess.Popen[str]", place: Path) -> None:
        self._shell, self._place = shell, place
        self.folder = Path(f"/proc/{shell.pid}/root{place}")

    @contextmanager
    def full(self, *, but_bytes: int) -> Iterator[dict[str, Any]]:
        """Only so many bytes are free."""
        state = os.statvfs(self.folder)
        (self.folder / "ballast").write_bytes(bytes(state.f_bavail * state.f_frsize - but_bytes))
        yield {}
        (self.folder / "ballast").unlink()

    @contextmanager
    def read_only(self) -> Iterator[dict[str, Any]]:
        say(self._shell, f"mount -o remount,ro {self._place}")
        yield {}
        say(self._shell, f"mount -o remount,rw {self._place}")


class Limited:
    """An ordinary folder; what is full or read-only about it is so for the started processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def full(self, *, but_bytes: int) -> Iterator[dict[str, Any]]:
        """No file may be longer than so many bytes (of which the log needs some)."""
        yield {"file_bytes": max(but_bytes, 16 * 2**10)}

    @contextmanager
    def read_only(self) -> Iterator[dict[str, Any]]:
        folders = [self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())]
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        for path in (*folders, *files):
            path.chmod(0o555)
        yield {"powerless": True}
        for path in (*folders, *files):
            path.chmod(0o755)


@contextmanager
def open_disk(folder: Path, *, mounted: bool) -> Iterator[Disk]:
    folder.mkdir()
    if not mounted:
        yield Limited(folder)
        return
    shell = open_shell()
    assert shell is not None
    try:
        say(shell, f"mount -t tmpfs -o size={DISK_BYTES} none {folder}")
        yield Mounted(shell, folder)
    finally:
        shell.communicate("exit\n", timeout=20)  # the namespace and the disk go with it


def open_shell() -> "subprocess.Popen[str] | None":
    """In a mount namespace of its own; None where this user may not have one."""
    for options in (["--user", "--map-root-user"], []):  # the second: root in a container without user namespaces
        shell = subprocess.Popen(
            ["unshare", *options, "--mount", "sh"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            say(shell, "mount -t tmpfs none /mnt")
            return shell
        except (AssertionError, BrokenPipeError):
            shell.kill()
            shell.communicate()
    return None


def may_mount() -> bool:
    try:
        shell = open_shell()
    except FileNotFoundError:  # no unshare
        return False
    if shell is not None:
        shell.communicate("exit\n", timeout=20)
    return shell is not None


def say(shell: "subprocess.Popen[str]", command: str) -> None:
    """Fails if the command does."""
    assert shell.stdin is not None
    assert shell.stdout is not None
    shell.stdin.write(f"{command} && echo done || echo failed\n")
    shell.stdin.flush()
    said = ""
    while not said.endswith(("done\n", "failed\n")):
        line = shell.stdout.readline()
        assert line, f"{command}: {said}"
        said += line
    assert said.endswith("done\n"), f"{command}: {said}"
