"""One file of a remote shard set: over http(s), or what a command prints. Retries what may pass, and compares size and checksum.

A place is `http(s)://host/folder` (a query stays at the end of the address) or `pipe:COMMAND` with {} for the file's name. The standard
library fetches: webdataset's opener starts curl for http, reads an answer that was cut off as one that ended, and retries nothing. Knows no
folder and no limit of space: data/cache.py and data/split.py bring the open file. That commands are allowed is data/config.py's check.
"""

import hashlib
import http.client
import os
import select
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import IO, BinaryIO, TypeVar

from data.config import PIPE

ATTEMPTS = 5
FIRST_WAIT_S = 0.5  # doubled after each attempt: 7.5 s in all, longer than a restart of a proxy
TIMEOUT_S = 60.0  # without a byte from the server or the command
CHUNK_BYTES = 1 << 20
MAX_INDEX_BYTES = 1 << 30  # of a file whose size no index tells
# answers of a server that may be other ones soon; 501 and 505 say what it cannot do
PASSING = frozenset({408, 425, 429, *range(500, 600)} - {501, 505})


Result = TypeVar("Result")


class _MayPass(Exception):
    """An attempt failed, and the next one may succeed."""


def fetch(place: str, name: str, file: BinaryIO, *, size: int | None = None, sha256: str | None = None) -> None:
    """Writes the file `name` of `place` into `file`, from its start. size, sha256: what it must have; a command's output is compared too.

    Raises RuntimeError, one sentence, when it is not there, when ATTEMPTS attempts failed, or when what comes is not what it must be.
    """
    _try(place, name, lambda: _fetch_once(place, name, file, size=size, sha256=sha256))


def fetch_content(
    place: str, name: str, *, sha256: str | None = None, accept: Callable[[bytes], object] = lambda content: None
) -> bytes:
    """The content of a small file. accept: raises ValueError if it is not what it must be (a proxy's page, a file that was cut off);
    then it is fetched again. Raises RuntimeError as `fetch` does."""

    def attempt() -> bytes:
        file = BytesIO()
        _fetch_once(place, name, file, size=None, sha256=sha256)
        try:
            accept(file.getvalue())
        except ValueError as error:
            raise _MayPass(str(error)) from error
        return file.getvalue()

    return _try(place, name, attempt)


def _try(place: str, name: str, attempt: Callable[[], Result]) -> Result:
    began, reason = time.monotonic(), ""
    for number in range(ATTEMPTS):
        if number:
            time.sleep(FIRST_WAIT_S * 2 ** (number - 1))
        try:
            return attempt()
        except _MayPass as error:
            reason = " ".join(str(error).split())
    raise RuntimeError(
        f"{name} cannot be fetched from {place} ({reason}; {ATTEMPTS} attempts in {time.monotonic() - began:.0f} s): check that place, "
        "then start again"
    )


def _fetch_once(place: str, name: str, file: BinaryIO, *, size: int | None, sha256: str | None) -> None:
    digest, received = hashlib.sha256(), 0
    most = MAX_INDEX_BYTES if size is None else size
    file.seek(0)
    for chunk in _chunks(place, name):
        received += len(chunk)
        if received > most:
            raise _MayPass(f"it has more than {most} bytes")
        digest.update(chunk)
        file.write(chunk)  # a full disk is an OSError and no reason to try again
    file.truncate()
    if size is not None and received != size:
        raise _MayPass(f"it has {received} bytes and the index says {size}")
    if sha256 is not None and digest.hexdigest() != sha256:
        raise _MayPass("it has not the checksum that the index records")


def _chunks(place: str, name: str) -> Iterator[bytes]:
    opened = _command(place, name) if place.startswith(PIPE) else _answer(place, name)
    with opened as stream:
        while True:
            try:
                chunk = stream.read(CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise _MayPass(f"the connection broke: {error}") from error
            if not chunk:
                return
            yield chunk


@contextmanager
def _answer(place: str, name: str) -> Iterator[BinaryIO]:
    """A server's answer. One that is cut off is noticed by its length here, because a read by parts does not."""
    parts = urllib.parse.urlsplit(place)
    path = f"{parts.path.rstrip('/')}/{urllib.parse.quote(name)}"
    request = urllib.request.Request(
        urllib.parse.urlunsplit(parts._replace(path=path)), headers={"Accept-Encoding": "identity"}
    )
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            if error.code in PASSING:
                raise _MayPass(f"the server answers {error.code} {error.reason}") from error
            reason = " ".join(str(error.reason).split())
            raise RuntimeError(
                f"{name} cannot be fetched from {place} (the server answers {error.code} {reason}): put the file there, or correct "
                "the address"
            ) from error
    except (
        OSError,
        ValueError,
        http.client.HTTPException,
    ) as error:  # ValueError: a redirect to an address that is none
        raise _MayPass(f"no answer: {getattr(error, 'reason', None) or error}") from error
    with answer:
        yield answer
        if answer.length:
            raise _MayPass(f"the connection ended {answer.length} bytes too early")


@contextmanager
def _command(place: str, name: str) -> Iterator["_Printed"]:
    """What a command prints; it must end with status 0. `name` has no character that a shell would take for its own (data/split.py)."""
    command = place.removeprefix(PIPE).replace("{}", name)
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,  # a read gives what there is
            start_new_session=True,  # so that what the shell started can be ended with it
        ) as process,
    ):
        assert process.stdout is not None
        try:
            yield _Printed(process.stdout)
            _wait_for_end(process.pid)
        finally:  # what it started may go on when it has ended; until `wait` no other group can have its number
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        if status:
            errors.seek(0)
            said = errors.read()[-1000:].decode(errors="replace").strip().splitlines()
            raise _MayPass(f"the command ends with status {status}{f': {said[-1]}' if said else ''}")


def _wait_for_end(pid: int) -> None:
    """Leaves the process for `wait`."""
    deadline, pause = time.monotonic() + TIMEOUT_S, 0.0005
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline:
            raise _MayPass(f"the command has not ended {TIMEOUT_S:g} s after its last byte")
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


class _Printed:
    """A command's output, which is not waited for without end."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe

    def read(self, size: int) -> bytes:
        if not select.select([self._pipe], [], [], TIMEOUT_S)[0]:
            raise _MayPass(f"the command printed nothing for {TIMEOUT_S:g} s")
        return self._pipe.read(size)
