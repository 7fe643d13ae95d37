"""Routed copies of hard shapes on any device, and how results are compared: what the tests of this folder share.

Everything runs on a CPU too, where SMOKE chooses shapes that Triton's interpreter can do in a moment.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

SMOKE = os.environ.get("SWITCHYARD_GPU_SMOKE") == "1"
# Of the largest element. bf16 keeps 8 bits and fp16 11: operands, hidden activations and results per copy are rounded, then summed.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = tuple(TOLERANCE) if not SMOKE else (torch.bfloat16,)
T = TypeVar("T")


def full_or_tiny(full: Sequence[T], tiny: Sequence[T]) -> Sequence[T]:
    return tiny if SMOKE else full


@dataclass(frozen=True)
class Case:
    """Copies of each group, two widths, rows R that they read, rows P that they add to. strided: rows and matrices with odd strides."""

    sizes: tuple[int, ...]
    width_in: int
    width_out: int
    num_rows: int
    num_outputs: int
    strided: bool = False

    def __str__(self) -> str:
        copies, groups = sum(self.sizes), len(self.sizes)
        return f"C{copies}_{self.width_in}x{self.width_out}_G{groups}_R{self.num_rows}_P{self.num_outputs}{'_strided' * self.strided}"


# The widths of the published models; odd ones; an empty group first, last and between; one group with everything; groups of one copy;
# no copies; no rows; several tiles of each kernel.
CASES = full_or_tiny(
    (
        Case((512,) * 16, 412, 128, 2048, 2048),
        Case((1000, 0, 24, 1, 511), 1024, 128, 700, 900),
        Case((0, 3, 130, 0), 412, 76, 67, 201, strided=True),
        Case((0, 0, 5000, 0), 512, 128, 1250, 1250),
        Case((1,) * 387, 1024, 128, 100, 50),
        Case((37,), 41, 132, 5, 40),
        Case((5, 7), 1, 1, 4, 4),
        Case((64, 64), 128, 64, 128, 1),
        Case((0, 0, 0), 412, 128, 8, 5),
        Case((0, 0), 64, 100, 0, 3),
    ),
    (Case((3, 0, 2), 12, 16, 4, 3, strided=True), Case((0, 0), 12, 16, 0, 3)),
)


@dataclass(frozen=True)
class Routed:
    """Inputs of a case, rows and matrices on a grid; gates with a zero and of both signs."""

    rows: Tensor
    weights: Tensor
    gates: Tensor
    row_index: Tensor
    output_index: Tensor
    offsets: Tensor


def normal(*shape: int, seed: int, device: torch.device) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def on_a_grid(values: Tensor) -> Tensor:
    """Rounded to quarters: products of such numbers are exact in any order, so relu lets the same ones through everywhere."""
    return (values * 4).round() / 4


def routed(case: Case, dtype: torch.dtype, device: torch.device) -> Routed:
    generator = torch.Generator().manual_seed(7)
    copies = sum(case.sizes)

    def index(size: int) -> Tensor:
        return torch.randint(0, max(1, size), (copies,), generator=generator).to(device)

    gates = normal(copies, seed=1, device=device)
    gates[1:2] = 0.0
    scale = 2 ** round(math.log2(case.width_in) / 2)
    rows = on_a_grid(normal(case.num_rows, case.width_in, seed=2, device=device)).to(dtype)
    matrices = normal(len(case.sizes), case.width_in, case.width_out, seed=3, device=device)
    weights = (on_a_grid(matrices) / scale).to(dtype)
    if case.strided:
        rows, weights = torch.stack([rows, rows], 1)[:, 1], weights.mT.contiguous().mT
    offsets = torch.tensor(list(accumulate(case.sizes)), dtype=torch.int32, device=device)
    return Routed(rows, weights, gates, index(case.num_rows), index(case.num_outputs), offsets)


def results(
    function: Callable[..., Tensor], leaves: Mapping[str, Tensor], *, gradient: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """The output and the gradient of each leaf, by name. gradient: of the output; the default draws it."""
    given = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    output = function(**given)
    drawn = normal(*output.shape, seed=9, device=output.device) if gradient is None else gradient(output)
    found = torch.autograd.grad(output, list(given.values()), drawn.to(output.dtype))
    return {"output": output.detach()} | {f"gradient of {name}": each for name, each in zip(given, found, strict=True)}


def wide(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.double() for name, leaf in leaves.items()}


def assert_close(found: Mapping[str, Any], wanted: Mapping[str, Any], tolerance: float) -> None:
    """Each tensor, of the largest element of what is wanted; NaN never passes. A tensor of zeros must be exactly so."""
    assert list(found) == list(wanted)
    for name, one in found.items():
        other = wanted[name]
        assert one.shape == other.shape, name
        error = float((one.double() - other.double()).abs().max()) if other.numel() else 0.0
        scale = float(other.double().abs().max()) if other.numel() else 0.0
        assert error <= tolerance * scale, f"{name}: off by {error:.2e}, allowed {tolerance:.0e} of {scale:.2e}"


def assert_equal(found: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> None:
    for name, one in found.items():
        assert torch.equal(one, again[name]), f"{name}: two runs differ"
