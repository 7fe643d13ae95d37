"""The parts that the pass over the copies of one entry after the other allocates: how many, and that larger programs compute the same."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.peer_experts.traffic import layer
from kernels.tables import traffic
from tests.kernels.compare import assert_same
from tests.kernels.tables import Case, make_inputs

Run = Callable[..., Any]


def in_few_programs(inputs: dict[str, Any]) -> tuple[Tensor, set[torch.Size]]:
    """The gradient of a table, and the shapes of what is allocated with three axes: the parts."""
    from kernels.tables import by_entry

    found: set[torch.Size] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            found.update({made.shape} if isinstance(made, Tensor) and made.ndim == 3 else ())
            return made

    routes, out_LD = inputs["routes"], torch.zeros_like(inputs["up"])
    copies = (inputs["gates"], routes.entry_C, routes.order_C)
    with patch.object(traffic, "MAX_PROGRAMS", 5), patch.multiple(by_entry, PLACES=2, PARTS=2), Watch():
        by_entry.add_runs(inputs["rows"], routes.row_C, *copies, out_LD)
    return out_LD, found


def test_many_copies_take_larger_programs_and_no_more_memory_for_their_parts(interpreted: Run) -> None:
    """26 copies in programs of 2 places would be 13; of 8 they are 4."""
    inputs = make_inputs(Case([9, 0, 5, 12], 12, 10, rows=7, only=[0, 4, 5, 9]))
    found, parts = interpreted(in_few_programs, inputs)
    routes, wanted = inputs["routes"], torch.zeros_like(inputs["up"], dtype=torch.float64)
    for gate, entry, row in zip(inputs["gates"], routes.entry_C, routes.row_C, strict=True):
        wanted[entry] += gate.double() * inputs["rows"][row].double()
    assert_same({"up": found}, {"up": wanted})
    assert parts == {(4, 2, 12)}


def test_the_parts_of_a_table_take_at_most_half_a_gigabyte_at_width_1024() -> None:
    tokens = {2**power: traffic.scratch(layer(tokens=2**power)) for power in range(4, 24)}
    assert tokens[8192] == 8192 * 2 * 1024 * 4
    assert tokens[65536] == max(tokens.values()) == 65536 * 2 * 1024 * 4
    assert [traffic.places_for(copies) for copies in (1, 2**23, 2**23 + 1, 2**31 - 4096)] == [128, 128, 256, 32768]
