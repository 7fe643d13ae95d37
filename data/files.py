"""Small file habits of data/: whole-or-absent writes, checksums, and a lock between processes.

Knows nothing about shards. Used by data/shards.py, data/index.py and data/prepare.py.
"""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes (what `sha256sum` prints)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Writes `path` so that a reader sees the old file or the whole new one, whoever else writes it meanwhile."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that other users cannot read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds the lock file `path` for the body, after waiting for whoever holds it. A process that dies lets it go."""
    with ExitStack() as stack:
        while True:
            file = stack.enter_context(path.open("wb"))
            fcntl.flock(file, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
            # Whoever held the lock removed the file meanwhile: nobody else would meet us at this one.
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
