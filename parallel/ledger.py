"""What this rank sends and how long it waits, for every collective of a run: the one place that counts bytes.

Every collective is made inside `Ledger.collective`, every wait for one that was started earlier inside `Ledger.waiting`. So one object
knows how many bytes went where (metrics), how many seconds were spent (metrics) and what the rank is doing at this moment (the
watchdog, parallel/watchdog.py). Does not own any communication.

Seconds are host seconds: how long the rank's main thread was held. On a CPU that is the exchange. On CUDA a collective only enters a
queue, so they show where the host waits for the device, not how long the links were busy.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Where:
    """What a collective is for. layer: path in the model ("layers.3.mixer"), or what else the run is doing ("optimizer").

    label: the bank within the layer ("value", "mlp"), perhaps empty. verb: plan, dispatch, reply, combine, weights, gather,
    statistics, ... backward: it carries gradients.
    """

    layer: str
    label: str
    verb: str
    backward: bool = False

    def __str__(self) -> str:
        """As the watchdog says it: "dispatch (value) of layers.3.mixer, backward"."""
        label = f" ({self.label})" if self.label else ""
        direction = "" if self.layer in ("run", "optimizer") else ", backward" if self.backward else ", forward"
        return f"{self.verb}{label} of {self.layer}{direction}"


@dataclass(frozen=True)
class Sent:
    """Bytes that leave this rank: to ranks on its own node, and to ranks on others. What stays on the rank is not sent."""

    near: int = 0
    far: int = 0

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.near + other.near, self.far + other.far)


@dataclass(frozen=True)
class Traffic:
    """Bytes by `Where` and host seconds by verb, of this rank, over some time."""

    sent: dict[Where, Sent] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __add__(self, other: "Traffic") -> "Traffic":
        sent = dict(self.sent)
        for where, more in other.sent.items():
            sent[where] = sent.get(where, Sent()) + more
        verbs = self.seconds | other.seconds
        return Traffic(sent, {verb: self.seconds.get(verb, 0.0) + other.seconds.get(verb, 0.0) for verb in verbs})


class Ledger:
    """Bytes by `Where` and seconds by verb since the last `take`, and where the rank is now.

    step, current, last and progress are what the watchdog's thread reads: plain attributes, so that the main thread never waits for
    it. progress: grows by one when a collective or a wait begins and when it ends; since all ranks make the same collectives in the
    same order, the rank with the smallest progress is the one the others wait for.
    """

    def __init__(self) -> None:
        self.sent: dict[Where, Sent] = {}
        self.seconds: dict[str, float] = {}
        self.waited = 0.0  # host seconds in all, those of a wait inside another one once
        self.current: Where | None = None  # inside a collective or a wait: which
        self.last: Where | None = None  # the one that was begun last
        self.failed: Where | None = None  # the one that ended with an exception
        self.progress = 0
        self.step = 0

    @contextlib.contextmanager
    def collective(self, where: Where, sent: Sent) -> Iterator[None]:
        """A collective is started (and, if it is blocking, done) inside."""
        self.sent[where] = self.sent.get(where, Sent()) + sent
        with self.waiting(where):
            yield

    @contextlib.contextmanager
    def waiting(self, where: Where) -> Iterator[None]:
        """The rank waits inside for a collective that was started earlier."""
        outer, self.current, self.last = self.current, where, where
        self.progress += 1
        began = time.perf_counter()
        try:
            yield
        except Exception:
            self.failed = where
            raise
        finally:
            seconds = time.perf_counter() - began
            self.seconds[where.verb] = self.seconds.get(where.verb, 0.0) + seconds
            self.waited += seconds if outer is None else 0.0
            self.progress += 1
            self.current = outer

    def take(self) -> Traffic:
        """What was counted since the last call; counting begins anew."""
        taken = Traffic(self.sent, self.seconds)
        self.sent, self.seconds = {}, {}
        return taken
