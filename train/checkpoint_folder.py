"""The folder of a run's checkpoints: which one counts, how a new one takes its place, what is cleared away.

Owns the names (step_000100, .partial while it is written, .old while it is replaced), the file `latest`, and the order of renames
that leaves a whole checkpoint at every instant. Does not own what is inside a checkpoint. Called by train/checkpoint.py on rank 0, and by
train/inventory.py and checkpoint_tool.py, which look at the folder and remove old ones.
"""

import contextlib
import hashlib
import logging
import re
import shutil
from pathlib import Path

from train.manifest import MANIFEST, sum_line
from train.storage import sync_folder, write_file

logger = logging.getLogger(__name__)

LATEST = "latest"
PARTIAL = ".partial"
OLD = ".old"
LOOKS = 5  # at a folder in which a run goes on: it removes a checkpoint only when its successor is there, so the second look mostly does
STEP_FOLDER = re.compile(r"step_(\d{6,})(\.old)?")
LATEST_LINE = re.compile(rf"([0-9a-f]{{64}})  step_\d{{6,}}/{re.escape(MANIFEST)}\n")


def final_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def partial_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}{PARTIAL}"


def candidates(folder: Path) -> list[str]:
    """Names of the checkpoints in the order in which a resume tries them: what `latest` means, then the others, newest first.

    `latest` means the manifest with its checksum, whatever the folder is called: a save of the same step that was killed
    between its renames leaves it under the name with .old.

    Raises:
        RuntimeError: `latest` is there but no checkpoint is.
    """
    names = _names(folder)
    names.sort(key=lambda name: (step_of(name), not name.endswith(OLD)), reverse=True)
    latest = folder / LATEST
    if not names:
        if latest.exists():
            raise RuntimeError(
                f"{latest} names a checkpoint, but there is none in {folder}: bring it back, or remove {latest} to start anew"
            )
        return []
    named = meant(folder)
    if named is None:
        logger.warning("%s is damaged, or the checkpoint that it names is: taking the newest whole one", latest)
        return names
    return [named, *(name for name in names if name != named)]


def meant(folder: Path) -> str | None:
    """The name of the checkpoint that `latest` means; None if there is none, or `latest` is damaged."""
    for _ in range(LOOKS):
        digest = _latest_digest(folder)
        if digest is None:
            break
        found = next((name for name in sorted(_names(folder)) if _manifest_digest(folder / name) == digest), None)
        if found is not None or digest == _latest_digest(folder):
            return found
    return None


def latest_problem(folder: Path) -> str | None:
    """What is wrong with `latest`: a resume would go on without it, from the newest whole checkpoint, with a warning."""
    remedy = f"name one with `cd {folder} && sha256sum step_NNNNNN/{MANIFEST} > {LATEST}`, or let the next save do it"
    file = folder / LATEST
    if not file.exists():
        return f"{file} must name a checkpoint, but is missing: {remedy}"
    if _latest_digest(folder) is None:
        return f"{file} must be a line as sha256sum writes it, but is damaged: {remedy}"
    if meant(folder) is None:
        return f"{file} must have the checksum of a checkpoint's {MANIFEST}, but none here has it (it is gone or damaged): {remedy}"
    return None


def identity(path: Path) -> tuple[int, int] | None:
    """Which folder has this name now; None if none has. See `is_taken_away`."""
    with contextlib.suppress(OSError):
        found = path.lstat()
        return found.st_ino, found.st_ctime_ns  # a number alone is given again
    return None


def is_taken_away(path: Path, there: tuple[int, int] | None) -> bool:
    """The checkpoint that was `there` (its `identity`) is gone, or another has its name: a run beside the reader has gone on.

    So what the reader has met is no damage; it looks again.
    """
    return there is None or identity(path) != there


def say_taken_away(path: Path) -> str:
    """The sentence of a reader that gives up; path: a checkpoint or the folder of all."""
    return (
        f"{path} must stay while it is read, but a run in that folder goes on and removes its old checkpoints: try again, wait for the "
        "end of the run, or raise its checkpoint.keep"
    )


def step_of(name: str) -> int:
    """The step of a checkpoint by the name of its folder."""
    found = STEP_FOLDER.fullmatch(name)
    assert found is not None, name
    return int(found.group(1))


def prepare(folder: Path, step: int) -> None:
    """Clears what a killed save left behind and makes the empty folder to write `step` into.

    Raises:
        RuntimeError: the folder cannot be made.
    """
    partial = partial_path(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _settle(folder)
        partial.mkdir()
        sync_folder(folder.parent)
    except OSError as error:
        raise RuntimeError(
            f"{partial} cannot be made ({error.strerror}): give this user a writable folder there or choose another "
            "run.dir, then start again"
        ) from error


def publish(folder: Path, step: int, *, keep: int) -> None:
    """Makes the written, checked checkpoint of `step` visible, names it in `latest`, then removes all but the last `keep`.

    What needs space on the disk comes first: after it there are only renames. Steps beyond `step` belong to a course that the
    run has left (it went back and came here again): they are removed too.

    Raises:
        RuntimeError: the disk is full or refuses a rename; `latest` then still names a whole checkpoint.
    """
    partial, final = partial_path(folder, step), final_path(folder, step)
    old = final.with_name(final.name + OLD)
    line = sum_line((partial / MANIFEST).read_bytes(), f"{final.name}/{MANIFEST}")
    write_file(folder / (LATEST + PARTIAL), [line], size=len(line))
    try:
        if final.exists():
            final.rename(old)
        partial.rename(final)
        sync_folder(folder)
        (folder / (LATEST + PARTIAL)).replace(folder / LATEST)
        sync_folder(folder)
    except OSError as error:
        raise RuntimeError(
            f"{final} is written but cannot be made visible ({error}): check the folder, then start again"
        ) from error
    _prune(folder, step, keep)


def discard(path: Path) -> bool:
    """Removes a file or folder if it is there, a folder's name before its files: true if it is gone. A failure is logged, not raised."""
    try:
        if path.is_dir() and not path.name.endswith(PARTIAL):
            path = path.rename(path.with_name(path.name + PARTIAL))
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s could not be removed (%s): the next save tries again", path, error)
        return False
    return True


def _names(folder: Path) -> list[str]:
    """Of the checkpoints. Empty beside a `latest` only if a second look says so too: a folder is not listed in one instant."""
    names: list[str] = []
    for _ in range(LOOKS):
        names = (
            [entry.name for entry in folder.iterdir() if STEP_FOLDER.fullmatch(entry.name)] if folder.is_dir() else []
        )
        if names or not (folder / LATEST).exists():
            break
    return names


def _latest_digest(folder: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = LATEST_LINE.fullmatch((folder / LATEST).read_text(encoding="ascii"))
        return found and found.group(1)
    return None


def _settle(folder: Path) -> None:
    """Removes what killed saves left; gives what `latest` means its plain name back if it was about to be replaced."""
    for leftover in folder.glob("*" + PARTIAL):
        discard(leftover)
    published = _latest_digest(folder)
    for old in folder.glob("step_*" + OLD):
        final = old.with_name(old.name.removesuffix(OLD))
        if not final.exists() or (published is not None and published == _manifest_digest(old)):
            discard(final)
            old.rename(final)
        else:
            discard(old)


def _manifest_digest(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
    return None


def _prune(folder: Path, step: int, keep: int) -> None:
    names = [entry.name for entry in folder.iterdir() if STEP_FOLDER.fullmatch(entry.name)]
    plain = sorted((name for name in names if not name.endswith(OLD) and step_of(name) <= step), key=step_of)
    for name in sorted(set(names) - set(plain[-keep:])):
        discard(folder / name)
