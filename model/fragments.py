"""Fragments: the ranges of the logical parameters that a process holds, with its optimizer state, as a checkpoint sees them.

Both engines describe what they hold in these terms: train/engine.py (whole parameters) and parallel/zero.py (ZeRO partitions).
train/checkpoint.py writes and fills fragments and knows nothing else of engines.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.parameters import Box, LogicalParameter


@dataclass(frozen=True)
class Fragment:
    """A range of one logical parameter that this process holds: elements [start, start + numel) of the flat `box`.

    `box` is the part of the logical tensor that a rank of a table split by columns holds; None is the whole tensor.

    `tensors` maps "master", and with AdamW "exp_avg" and "exp_avg_sq", to 1-D float32 views of equal length into live storage: a
    checkpoint reads them when it saves and fills them in place when it loads.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]
    box: Box | None = None


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter of an AdamW its moments now, instead of at its first step, so that fragments can always be taken."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    for parameter in _parameters(optimizer):
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def set_step_count(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Sets the number of updates that AdamW's bias correction has seen, for every parameter."""
    for parameter in _parameters(optimizer):
        if "step" in optimizer.state[parameter]:
            optimizer.state[parameter]["step"].fill_(float(step))


@dataclass(frozen=True)
class Held:
    """What a process stores of a local tensor, padding included: its elements from `start` on, as 1-D views like those of `Fragment`."""

    start: int
    tensors: dict[str, Tensor]

    @property
    def numel(self) -> int:
        return self.tensors["master"].numel()

    def part(self, first: int, numel: int) -> dict[str, Tensor]:
        """Elements [first, first + numel) of the local tensor; all of them are here."""
        begin = first - self.start
        return {kind: view[begin : begin + numel] for kind, view in self.tensors.items()}


def held_in(storage: Tensor, optimizer: torch.optim.Optimizer, *, offset: int, local_start: int, numel: int) -> Held:
    """Elements [local_start, local_start + numel) of a local tensor lie at `offset` in `storage`, a parameter of `optimizer`."""
    state = {key: value for key, value in optimizer.state[storage].items() if key in ("exp_avg", "exp_avg_sq")}
    tensors = {
        key: value.detach().view(-1)[offset : offset + numel] for key, value in {"master": storage, **state}.items()
    }
    return Held(local_start, tensors)


def fragments_of(parameter: LogicalParameter, held: Held) -> list[Fragment]:
    """What is stored of a parameter, without padding: a fragment for each range of the logical tensor that is in one piece."""
    found = []
    for part in parameter.ranges:
        first, end = max(part.local, held.start), min(part.local + part.numel, held.start + held.numel)
        if first < end:
            start, tensors = part.start + first - part.local, held.part(first, end - first)
            found.append(Fragment(parameter.name, parameter.spec.shape, start, tensors, parameter.box))
    return found


def share(whole: Fragment, *, rank: int, size: int) -> Fragment | None:
    """The part of a replicated fragment that replica `rank` of `size` writes: together they write every element once."""
    numel = whole.tensors["master"].numel()
    first, end = numel * rank // size, numel * (rank + 1) // size
    if first == end:
        return None
    tensors = {key: value[first:end] for key, value in whole.tensors.items()}
    return Fragment(whole.name, whole.shape, whole.start + first, tensors, whole.box)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
