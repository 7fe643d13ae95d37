"""Shards that were passed over: counted, and refused beyond `data.max_skipped_shards`; and what is never passed over.

What is damaged is found elsewhere: data/index.py when a folder is opened, data/reader.py when a document is read. Used by
data/split.py, data/loader.py (what this process met), train/run.py (what all processes met), data/cache.py and data/reader.py.
"""

from collections.abc import Mapping


class NodeTrouble(RuntimeError):
    """This node's disk, not a shard, is at fault: a full cache would make every shard look damaged. Always an error."""


def check_limit(found: Mapping[str, str], *, limit: int) -> None:
    """Raises RuntimeError, naming every one, if more shards than `limit` are in `found` (path -> problem)."""
    if len(found) <= limit:
        return
    if limit == 0:
        raise RuntimeError(next(iter(found.values())))
    raise RuntimeError(
        f"data.max_skipped_shards allows {limit} damaged shard{'s' if limit > 1 else ''}, but {len(found)} are: "
        f"{'; '.join(found[path] for path in sorted(found))}; restore them, or raise data.max_skipped_shards"
    )
