"""What the ranks tell each other beside the collectives: where each of them is, and why the job must end.

Goes through the process group's store, on a connection and a thread of its own, so that neither a rank that waits in a collective nor
a store that no longer answers can hold it up: whoever asks reads attributes and waits for a limited time. Knows nothing of ledgers
and decides nothing; parallel/watchdog.py does.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch._C._distributed_c10d import PrefixStore, Store

# Between two entries of a rank: one set, one check and one get, so 3 requests a second and rank at the store.
PERIOD_S = 1.0
SILENT_S = 4.0  # without a new entry in this time a rank is taken for dead: four periods


@dataclass(frozen=True)
class Entry:
    """Where a rank is. current: the collective it is in, or None; last: the one it was in last; beat: number of the entry."""

    step: int
    progress: int
    current: str | None
    last: str | None
    beat: int = 0

    def __str__(self) -> str:
        if self.current is not None:
            return f"in {self.current}, at step {self.step}"
        last = "before its first collective" if self.last is None else f"last in {self.last}"
        return f"outside any collective, {last}, at step {self.step}"


@dataclass(frozen=True)
class End:
    """Why the job ends: a hang (every rank dumps its stacks and leaves) or an error of one rank."""

    kind: Literal["hang", "error"]
    rank: int
    sentence: str


class SideChannel:
    """One rank's end of it. `here` is called on the channel's thread, once a second, and must not wait for anything."""

    def __init__(self, store: Store, *, rank: int, world_size: int, here: Callable[[], Entry]) -> None:
        self.rank, self.world_size = rank, world_size
        self.end: End | None = None
        self.ended = threading.Event()
        self.confirmed = 0  # ranks that have done what the end asks of them
        self.host: Entry | None = None  # the last entry of rank 0, which mostly keeps the store
        own: Any = store
        self._store = PrefixStore("side_channel", own.clone())  # a connection of its own
        self._here = here
        self._requests: list[Callable[[], None]] = []
        self._wake, self._stopping, self._broken = threading.Event(), False, False
        self._beat = 0
        self._last_reply = time.monotonic()
        self._publish()  # on this thread: once every rank is past its constructor, every entry is there
        self._thread = threading.Thread(target=self._run, name="side channel", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        self._thread.join(PERIOD_S)

    @property
    def is_lost(self) -> bool:
        """The store has not answered for some periods: the process that keeps it is dead or stopped."""
        return self._broken or time.monotonic() - self._last_reply > SILENT_S

    def ask(self, question: Callable[[Store], Any], *, timeout_s: float) -> Any:
        """The answer of `question(store)`, put on the channel's thread; None if it does not come in time."""
        if self.is_lost:
            return None
        answers: list[Any] = []
        done = threading.Event()

        def request() -> None:
            answers.append(question(self._store))
            done.set()

        self._requests.append(request)
        self._wake.set()
        done.wait(timeout_s)
        return answers[0] if answers else None

    def is_first(self, what: str) -> bool | None:
        """True on the first rank that asks this; None if the store does not answer."""
        number = self.ask(lambda store: store.add(what, 1), timeout_s=SILENT_S)
        return None if number is None else number == 1

    def entries(self) -> list[Entry] | None:
        """Every rank's newest entry, in rank order; None if the store does not answer."""
        keys = [f"rank/{rank}" for rank in range(self.world_size)]
        texts = self.ask(lambda store: store.multi_get(keys), timeout_s=SILENT_S)
        return None if texts is None else [Entry(**json.loads(text)) for text in texts]

    def tell(self, end: End) -> None:
        """Makes `end` the job's, unless another rank was faster; returns when this rank knows which, or the store is silent."""
        text = json.dumps(asdict(end))
        self.ask(lambda store: self._hear(store.compare_set("end", "", text)), timeout_s=SILENT_S)

    def confirm(self) -> None:
        """This rank has done what the end asks."""
        self.ask(lambda store: store.add("confirmed", 1), timeout_s=SILENT_S)

    def wait_for_all(self, timeout_s: float) -> None:
        """Until every rank has confirmed, at most `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        while self.confirmed < self.world_size and not self.is_lost and time.monotonic() < deadline:
            time.sleep(0.1)
            self._wake.set()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._publish()
                if self.end is None and self._store.check(["end"]):
                    self._hear(self._store.get("end"))
                if self.end is not None:
                    self.confirmed = self._store.add("confirmed", 0)
                while self._requests:
                    self._requests.pop(0)()
                self._last_reply = time.monotonic()
                self._wake.wait(PERIOD_S)
                self._wake.clear()
        except Exception:
            self._broken = True  # whatever is wrong with the connection, it does not come back: the rank goes on alone

    def _publish(self) -> None:
        self._beat += 1
        entry = asdict(self._here()) | {"beat": self._beat}
        self._store.set(f"rank/{self.rank}", json.dumps(entry))
        if self._beat > 1:  # the first is made before rank 0 may be there
            self.host = Entry(**json.loads(self._store.get("rank/0")))

    def _hear(self, text: bytes) -> None:
        self.end = End(**json.loads(text))
        self.ended.set()
