"""What a layer did: outputs of its parts, calls of its dispatcher, the dtypes that it ended with. Called by: the tests of this folder."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.dispatch import Compute, LocalDispatcher, LocalPlan, Routing


def assert_float32_throughout(module: nn.Module) -> None:
    """Every weight and its gradient, which is finite: autocast has left them alone."""
    for name, value in module.named_parameters():
        assert value.dtype == torch.float32, name
        assert value.grad is not None, name
        assert value.grad.dtype == torch.float32, name
        assert value.grad.isfinite().all(), name


class Recorded:
    """The outputs of a module's forward passes, or the `part` of each that is asked for, kept with their gradients."""

    def __init__(self, module: nn.Module, part: Callable[[Any], Tensor] = lambda output: output) -> None:
        self.outputs: list[Tensor] = []
        self.part = part
        module.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: tuple[Any, ...], result: Any) -> None:
        output = self.part(result)
        if output.requires_grad:
            output.retain_grad()
        self.outputs.append(output)

    @property
    def last(self) -> Tensor:
        return self.outputs[-1]

    @property
    def last_gradient(self) -> Tensor:
        gradient = self.last.grad
        assert gradient is not None
        return gradient


class Watched(LocalDispatcher):
    """Writes down the calls of a layer, and answers them."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.expert_ids: list[Tensor] = []

    def plan(self, *routings: Routing) -> Any:
        self.calls.append(("plan", len(routings)))
        self.expert_ids = [routing.expert_ids_NK for routing in routings]
        return super().plan(*routings)

    def dispatch(self, exchange: Any, rows: Tensor, *, label: str) -> Any:
        self.calls.append(("dispatch", label, tuple(rows.shape)))
        return super().dispatch(exchange, rows, label=label)

    def combine(self, arriving: Any, compute: Compute, *, label: str, gates_NK: Tensor | None = None) -> Any:
        def watched(rows: Tensor, plan: LocalPlan) -> Tensor:
            partials = compute(rows, plan)
            self.calls.append(("combine", label, tuple(partials.shape)))
            return partials

        return super().combine(arriving, watched, label=label, gates_NK=gates_NK)

    def weights(self, exchange: Any, *, label: str) -> Any:
        self.calls.append("weights")
        return super().weights(exchange, label=label)
