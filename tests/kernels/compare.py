"""Output and gradients by name: under torch.compile, and against those that are wanted. Called by: the tests of operations beside it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def assert_same(actual: dict[str, Tensor], wanted: dict[str, Tensor], *, tolerance: float = 2e-6) -> None:
    """Within `tolerance` of the largest element; 2e-6: 20 roundings of fp32."""
    assert actual.keys() == wanted.keys()
    for name in wanted:
        scale = wanted[name].abs().max().item() if wanted[name].numel() else 1.0
        torch.testing.assert_close(
            actual[name].double(),
            wanted[name].double(),
            rtol=0.0,
            atol=tolerance * max(scale, 1.0),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def compiled(function: Callable[..., Tensor], leaves: Mapping[str, Tensor], gradient: Tensor) -> dict[str, Tensor]:
    """Twice the function's output and gradients, under torch.compile in one graph.

    By its tracer without a code generator, which the interpreter would not survive.
    """

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    def twice(*tensors: Tensor) -> Tensor:
        return function(*tensors) * 2.0

    tensors = [leaf.requires_grad_() for leaf in leaves.values()]
    output = twice(*tensors)
    found = torch.autograd.grad(output, tensors, gradient)
    return {"output": output.detach(), **dict(zip(leaves, found, strict=True))}
