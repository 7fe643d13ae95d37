"""Cases of grouped_matmul with routes: inputs, the call that is tested, and the definition as a loop over copies in float64.

Called by: tests/kernels, also inside functions that the `interpreted` fixture runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kernels.grouped_matmul import grouped_matmul

ALL: dict[str, Any] = {"num_rows": 9, "num_outputs": 7}
Inputs = dict[str, Any]  # tensors by name, None for one that is not given


@dataclass(frozen=True)
class Case:
    """sizes of the groups in copies, width in, width out, and what is asked for."""

    sizes: tuple[int, ...]
    width_in: int
    width_out: int
    num_rows: int | None = None  # None: the copies are the rows
    num_outputs: int | None = None
    activation: str = "none"
    gate_side: str | None = None
    dtype: str = "float32"

    @property
    def num_copies(self) -> int:
        return sum(self.sizes)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def indices(count: int, size: int, *, seed: int) -> Tensor:
    return torch.randint(size, (count,), generator=torch.Generator().manual_seed(seed))


def inputs_of(case: Case, seed: int = 0) -> Inputs:
    """All in one dtype but the gates, with gates of both signs and a zero."""
    C, dtype = case.num_copies, getattr(torch, case.dtype)
    gates = normal(C, seed=seed + 2)
    gates[1:2] = 0.0
    outputs = C if case.num_outputs is None else case.num_outputs
    return {
        "rows": normal(C if case.num_rows is None else case.num_rows, case.width_in, seed=seed).to(dtype),
        "weights": (normal(len(case.sizes), case.width_in, case.width_out, seed=seed + 1) / 4).to(dtype),
        "gates": gates if case.gate_side else None,
        "gradient": normal(outputs, case.width_out, seed=seed + 3).to(dtype),
        "row_index": None if case.num_rows is None else indices(C, max(1, case.num_rows), seed=seed + 4),
        "output_index": None if case.num_outputs is None else indices(C, max(1, case.num_outputs), seed=seed + 5),
    }


def compute_in_small_tiles(
    case: Case, inputs: Inputs, backend: str, columns: tuple[int, ...] = (16,)
) -> dict[str, Tensor]:
    """The same with tiles of 16 x 16, so that a small shape has many. columns: of each tile there is; the first one is taken."""
    import kernels.grouped_matmul.kernel as kernel

    before = kernel.tiles_for
    kernel.tiles_for = lambda dtype: tuple(kernel.Tiles(16, each, 16, 4, 2) for each in columns)
    try:
        return compute(case, inputs, backend)
    finally:
        kernel.tiles_for = before


def compute(
    case: Case, inputs: Inputs, backend: str, matmul: Callable[..., Tensor] = grouped_matmul
) -> dict[str, Tensor]:
    """Output and gradients by name; "triton" only in the interpreter's process, which puts torch's switches back."""
    torch.use_deterministic_algorithms(backend == "triton")  # torch.empty then holds NaN
    leaves = {name: inputs[name] for name in ("rows", "weights", "gates")}
    given = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    output = matmul(
        given["rows"],
        given["weights"],
        offsets_G=torch.tensor(list(accumulate(case.sizes)), dtype=torch.int32),
        backend=backend,
        row_index_C=inputs["row_index"],
        activation=case.activation,
        gates_C=given.get("gates"),
        gate_side=case.gate_side or "after",
        output_index_C=inputs["output_index"],
        num_outputs=case.num_outputs,
    )
    found = torch.autograd.grad(output, list(given.values()), inputs["gradient"])
    return {"output": output.detach()} | {f"gradient of {name}": each for name, each in zip(given, found, strict=True)}


def loop(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The definition, copy after copy in float64."""
    given = {name: inputs[name] for name in ("rows", "weights", "gates")}
    given = {name: leaf.detach().double().requires_grad_() for name, leaf in given.items() if leaf is not None}
    groups = [group for group, size in enumerate(case.sizes) for _ in range(size)]
    outputs = [torch.zeros(case.width_out).double() for _ in range(len(inputs["gradient"]))]
    for copy, group in enumerate(groups):
        row = copy if inputs["row_index"] is None else int(inputs["row_index"][copy])
        gate = given["gates"][copy] if "gates" in given else torch.ones(()).double()
        y = (given["rows"][row] * (gate if case.gate_side == "before" else 1.0)) @ given["weights"][group]
        y = (y.relu() if case.activation == "relu" else y) * (gate if case.gate_side == "after" else 1.0)
        place = copy if inputs["output_index"] is None else int(inputs["output_index"][copy])
        outputs[place] = outputs[place] + y
    output = torch.stack(outputs) if outputs else torch.zeros(0, case.width_out).double()
    total = (output * inputs["gradient"]).sum() + sum(0.0 * leaf.sum() for leaf in given.values())
    found = torch.autograd.grad(total, list(given.values()))
    return {"output": output.detach()} | {f"gradient of {name}": each for name, each in zip(given, found, strict=True)}
