"""The `exchange` of a metrics record: what the ranks sent and how long they waited, per step, made of every rank's Traffic.

Called by parallel/mesh.py at every logged step. Counting is parallel/ledger.py's.
"""

import json
import zlib
from typing import Any, Protocol

import torch
from torch import Tensor

from parallel.ledger import Sent, Traffic


class Ranks(Protocol):
    """What is asked of the mesh."""

    @property
    def world_size(self) -> int: ...
    def sum(self, values: Tensor) -> Tensor: ...
    def max(self, values: Tensor) -> Tensor: ...


def exchange_record(ranks: Ranks, traffic: Traffic, *, num_steps: int) -> dict[str, Any]:
    """Per step: bytes that a rank sends (mean over ranks), by verb and by bank, near and far; host seconds by verb.

    Keys of `bytes` are verbs, with "_backward" where gradients travel; keys of `banks` are the layers' labels, both directions and all
    depths together; collectives without a bank (plan, statistics, optimizer) are in `bytes` alone. Three all-reduces over all ranks of a
    few hundred bytes.

    Raises:
        RuntimeError: the ranks made different collectives, so that they could have waited for each other for ever; on every rank.
    """
    verbs: dict[str, Sent] = {}
    banks: dict[str, Sent] = {}
    for where, sent in traffic.sent.items():
        verb = where.verb + ("_backward" if where.backward else "")
        verbs[verb] = verbs.get(verb, Sent()) + sent
        if where.label:
            banks[where.label] = banks.get(where.label, Sent()) + sent
    names = sorted(verbs), sorted(banks), sorted(traffic.seconds)
    _check_same(ranks, names)
    verb_names, bank_names, second_names = names
    counts = [verbs[name] for name in verb_names] + [banks[name] for name in bank_names]
    seconds = torch.tensor([traffic.seconds[name] for name in second_names], dtype=torch.float64) / num_steps
    num_bytes = torch.tensor([[sent.near, sent.far] for sent in counts], dtype=torch.float64).view(-1) / num_steps
    means = (ranks.sum(torch.cat([num_bytes, seconds])) / ranks.world_size).tolist()
    longest = ranks.max(seconds).tolist()
    pairs = [
        {"near": near, "far": far}
        for near, far in zip(means[: 2 * len(counts) : 2], means[1 : 2 * len(counts) : 2], strict=True)
    ]
    waits = [{"mean": mean, "max": most} for mean, most in zip(means[2 * len(counts) :], longest, strict=True)]
    return {
        "bytes": dict(zip(verb_names, pairs, strict=False)),
        "banks": dict(zip(bank_names, pairs[len(verb_names) :], strict=True)),
        "seconds": dict(zip(second_names, waits, strict=True)),
    }


def _check_same(ranks: Ranks, names: tuple[list[str], ...]) -> None:
    mine = zlib.crc32(json.dumps(names).encode())
    highest, lowest = ranks.max(torch.tensor([mine, -mine])).tolist()
    if highest != -lowest:
        raise RuntimeError(
            f"every rank must make the same kinds of collectives, but the ranks made different ones; this rank's are {names[0]}: "
            "a layer asks for an exchange on some ranks only, depending on its routing"
        )
