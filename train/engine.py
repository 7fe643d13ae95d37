"""What the training loop asks of an engine, and the slow, correct engine of one process that every parity test compares with.

PlainEngine is torch's optimizer on whole parameters: no DeepSpeed, no process group. parallel/zero.py has the engine for many
processes. Owns clipping and the update; does not own the loss (step.py) nor the schedule (optimizer.py).
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from model.context import BatchContext
from model.fragments import Fragment, create_state, fragments_of, held_in, set_step_count
from model.parameters import logical_parameters
from model.transformer import ModelOutput, Transformer


class World(Protocol):
    """The processes of a run: parallel.mesh.Mesh, or LocalMesh for one."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def barrier(self) -> None: ...
    def sum(self, values: Tensor) -> Tensor: ...
    def agree(self, flag: bool) -> bool: ...
    def all_gather_object(self, value: Any) -> list[Any]: ...
    def raise_together(self, error: Exception | None) -> None: ...
    def begin_step(self, step: int) -> None: ...
    def end_step(self) -> None: ...
    def waited(self) -> float: ...
    def exchange(self) -> dict[str, Any]: ...
    def beside(self, *, timeout_s: float) -> contextlib.AbstractContextManager["World"]: ...


class LocalMesh:
    """World of one process."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def barrier(self) -> None:
        pass

    def sum(self, values: Tensor) -> Tensor:
        return values.detach().clone()

    def agree(self, flag: bool) -> bool:
        return flag

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def raise_together(self, error: Exception | None) -> None:
        if error is not None:
            raise error

    def begin_step(self, step: int) -> None:
        pass

    def end_step(self) -> None:
        pass

    def waited(self) -> float:
        return 0.0

    def exchange(self) -> dict[str, Any]:
        return {}

    def beside(self, *, timeout_s: float) -> contextlib.AbstractContextManager["LocalMesh"]:
        return contextlib.nullcontext(self)


class Placed(Protocol):
    """A bank that was looked at. before, after: the busiest rank's load over the mean. num_moved: groups with another place."""

    @property
    def path(self) -> str: ...
    @property
    def before(self) -> float: ...
    @property
    def after(self) -> float: ...
    @property
    def num_moved(self) -> int: ...


class Placement(Protocol):
    """Which expert sits on which rank: parallel/placement.py. Every rank makes the same calls."""

    @property
    def banks(self) -> list[str]: ...
    def loads(self) -> dict[str, list[int]]: ...
    def tables(self) -> dict[str, list[int]]: ...
    def restore(self, tables: Mapping[str, Sequence[int]], loads: Mapping[str, Sequence[int]]) -> None: ...
    def move(self) -> Sequence[Placed]: ...


class Engine(Protocol):
    """Holds the model and its optimizer. A step is, for each micro-step, forward and backward, then one `step`."""

    model: Transformer

    @property
    def placement(self) -> Placement | None:
        """None where every expert is on every rank."""
        ...

    def forward(self, tokens_BS: Tensor, context: BatchContext) -> ModelOutput:
        """The model in the run's precision; training mode or not is the caller's choice (model.train(), model.eval())."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds to the gradients those of `loss` / accumulation_steps, averaged over ranks; `last`: of the step's micro-steps."""
        ...

    def step(self, lr: float, *, accept: Callable[[float], bool]) -> float:
        """Clips, updates, forgets the gradients. Gives the global gradient norm before clipping, every expert counted once.

        accept: is given that norm before the update; where it says no, weights, moments and the count of updates stay as they are.
        It must say the same on every rank, and may make collectives.
        """
        ...

    def fragments(self) -> list[Fragment]:
        """All ranges that this process holds: what it must read to go on."""
        ...

    def owned_fragments(self) -> list[Fragment]:
        """The ranges that this process writes: over all ranks, every element of every logical parameter once."""
        ...

    def restored(self, *, step: int) -> None:
        """To be called after `fragments` were filled from a checkpoint taken after `step` updates (skipped steps made none)."""
        ...


class PlainEngine:
    """One process, whole parameters, torch's own optimizer. bf16 means autocast: weights and router stay float32."""

    placement = None

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        *,
        clip_grad_norm: float,
        accumulation_steps: int,
        dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.clip_grad_norm = clip_grad_norm
        self.accumulation_steps = accumulation_steps
        self.dtype = dtype
        create_state(optimizer)

    def forward(self, tokens_BS: Tensor, context: BatchContext) -> ModelOutput:
        with autocast(tokens_BS.device, self.dtype):
            return self.model(tokens_BS, context)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        (loss / self.accumulation_steps).backward()

    def step(self, lr: float, *, accept: Callable[[float], bool]) -> float:
        max_norm = self.clip_grad_norm if self.clip_grad_norm > 0 else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm))
        if accept(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def fragments(self) -> list[Fragment]:
        parts = []
        for parameter in logical_parameters(self.model):
            numel = parameter.tensor.numel()
            held = held_in(parameter.tensor, self.optimizer, offset=0, local_start=0, numel=numel)
            parts += fragments_of(parameter, held)
        return parts

    def owned_fragments(self) -> list[Fragment]:
        return self.fragments()

    def restored(self, *, step: int) -> None:
        set_step_count(self.optimizer, step)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """torch.autocast for a narrow dtype, nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
