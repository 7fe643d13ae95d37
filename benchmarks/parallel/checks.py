"""That a layer on ranks gives what one process gives: asked before anything is timed, and nothing is printed if not.

The first rank is the one process: it alone holds a whole layer (0.9 GB and as much of gradients at 1B) and computes every rank's rows.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.parallel.placing import alone, step_of
from benchmarks.parallel.subjects import Subject
from benchmarks.parallel.timing import Step
from model.parameters import ExpertBank, logical_parameters
from parallel.mesh import Mesh

TOLERANCE = 1e-4  # of the largest element of what one process gives


def check_close(found: Tensor, expected: Tensor, *, what: str) -> None:
    """Raises RuntimeError unless shapes are equal and the largest error is below TOLERANCE of the largest element."""
    error = float("nan")
    if found.shape == expected.shape:
        error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        raise RuntimeError(
            f"{what} must equal one process, or its time means nothing, but it is off by {error:.1e} of the largest element in shape "
            f"{list(found.shape)}, allowed is {TOLERANCE:.0e} in shape {list(expected.shape)}: run tests/parallel first"
        )


def check_step(step: Step, subject: Subject, mesh: Mesh, *, what: str) -> None:
    """Output, gradient of the rows and of every weight, against the same layer on one process. Every rank calls it."""
    outputs = _gathered(_run(step))
    gradients = {
        parameter.name: _whole_gradient(parameter.module, parameter.tensor)
        for parameter in logical_parameters(step.layer)
    }
    if mesh.rank == 0:
        whole = alone(subject)
        _check_rows(outputs, subject, lambda rank: step_of(whole, subject, rank=rank), what=what)
        for parameter in logical_parameters(whole):
            expected, found = parameter.tensor.grad, gradients[parameter.name]
            assert expected is not None
            check_close(found[: len(expected)], expected, what=f"{what}: gradient of {parameter.name}")


def check_rows(
    step: Step, subject: Subject, mesh: Mesh, *, expected: Callable[[Any, Tensor], Tensor], what: str
) -> None:
    """Output and gradient of the rows, against a function of the whole layer and one rank's rows. Every rank calls it."""
    outputs = _gathered(_run(step))
    if mesh.rank == 0:
        whole = alone(subject).requires_grad_(False)

        def by_hand(rank: int) -> Step:
            return replace(step_of(whole, subject, rank=rank), forward=lambda x: expected(whole, x))

        _check_rows(outputs, subject, by_hand, what=what)


def _check_rows(outputs: list[Tensor], subject: Subject, of_rank: Callable[[int], Step], *, what: str) -> None:
    """The gradients of the weights are left to add up over the ranks."""
    for rank, both in enumerate(outputs):
        expected = _run(of_rank(rank))
        for name, found, wanted in zip(("output", "gradient of the rows"), both, expected, strict=True):
            check_close(found, wanted, what=f"{what}: {name} of rank {rank}")


def _run(step: Step) -> Tensor:
    """Output and gradient of the rows, stacked. Gradients of the weights are added to what is there."""
    step.x.grad = None
    output = step.forward(step.x)
    output.backward(step.cotangent)
    assert step.x.grad is not None
    return torch.stack([output.detach(), step.x.grad])


def _whole_gradient(module: nn.Module, tensor: Tensor) -> Tensor:
    """On the first rank, the experts of all ranks with the padding at the end, or the sum over the ranks' rows."""
    assert tensor.grad is not None
    if isinstance(module, ExpertBank):
        parts = _gathered(tensor.grad)
        return torch.cat(parts) if parts else tensor.grad
    dist.reduce(tensor.grad, dst=0)
    return tensor.grad


def _gathered(part: Tensor) -> list[Tensor]:
    """On the first rank what all ranks have, elsewhere nothing."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(part.contiguous(), parts, dst=0)
    return parts or []
