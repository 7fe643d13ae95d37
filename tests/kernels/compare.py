"""Output and gradients by name against those that are wanted. Called by: the tests of the operations beside it."""

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
