"""Shards that a line comes to next, fetched before a row asks for them. Used by data/reader.py, where there is a cache with room.

Owns the thread and the order; data/cache.py fetches. It changes no row: what is not there in time is fetched by whoever reads it, and a
shard that cannot be fetched is told by its reader alone.
"""

import threading
from collections import deque
from contextlib import suppress

from data.cache import ShardCache
from data.shards import ShardInfo


class Ahead:
    """Fetches one shard after the other, behind the reading. The thread lives as long as there is something to do."""

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._lock = threading.Lock()
        self._wanted: deque[ShardInfo] = deque()
        self._is_on = False

    def want(self, shard: ShardInfo) -> None:
        """Returns at once."""
        with self._lock:
            self._wanted.append(shard)
            if self._is_on:
                return
            self._is_on = True
        # daemon: the end of the process does not wait for a transfer; what it leaves takes no room (data/cache.py)
        threading.Thread(target=self._work, name="shards ahead", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._is_on = False
                    return
                shard = self._wanted.popleft()
            with suppress(Exception), self._cache.hold(shard):  # else `_is_on` would stay true with no thread
                pass
