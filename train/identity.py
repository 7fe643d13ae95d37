"""What a run says of itself before its processes have talked: by it they know each other. Called by train/build.py; compared by
parallel/meeting.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.config import Config

# What one process of a run may have otherwise than another: how its node calls a folder, what it has to itself, how long it waits.
_OF_A_PROCESS = (
    "run.dir",
    "run.init_from",
    "data.shards",  # train/resume.py compares their fingerprints
    "data.heldout",
    "data.num_workers",
    "data.cache",
    "data.allow_pipe",
    "parallel.meeting_s",
    "parallel.watchdog_s",
)


def in_common(config: Config) -> dict[str, str]:
    """What all processes of a run say alike before they have talked, by key; another run differs in some of it (parallel/meeting.py).

    Of run.dir only the last part: nodes may reach the folder by other ways.
    """
    values = {
        key: str(value) for key, value in _leaves(config.model_dump(mode="json")) if not key.startswith(_OF_A_PROCESS)
    }
    return {"run.dir": Path(config.run.dir).resolve().name} | values


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
