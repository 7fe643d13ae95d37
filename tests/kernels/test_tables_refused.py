"""What peer_experts, embedding_bag and their routes refuse, in one sentence each."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.peer_experts import peer_experts
from kernels.tables.routes import TableRoutes
from tests.kernels.tables import NAMES, make_inputs
from tests.kernels.test_tables_in_torch import WIDE

ROUTES = make_inputs(WIDE)["routes"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "best"}, "one of triton, torch, reference, got 'best'"),
        ({"backend": "triton"}, "computes on a GPU, got tensors on cpu"),
        ({"activation": "silu"}, "one of gelu, relu, got 'silu'"),
        ({"up": torch.zeros(10, 7)}, "one width D"),
        ({"down": torch.zeros(9, 8)}, "one length L"),
        (
            {name: torch.zeros(7 if name == "rows" else 10, 0) for name in ("rows", "up", "down")},
            "a width of at least 1",
        ),
        ({"rows": torch.zeros(6, 8)}, "got 6 rows for 7"),
        ({"gates": torch.zeros(25)}, r"gates of peer_experts must be \[26\]"),
        ({"gates": torch.zeros(26, dtype=torch.float64)}, "torch.float64 on cpu"),
        ({"rows": torch.zeros(7, 8, dtype=torch.int64)}, "the rows of peer_experts must be floats"),
        ({"up": torch.zeros(9, 8), "down": torch.zeros(9, 8)}, r"entry_C must be in \[0, 9\), got 0 to 9"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_what_does_not_fit_is_refused_in_one_sentence(change: dict[str, Any], words: str):
    given: dict[str, Any] = {name: make_inputs(WIDE)[name] for name in NAMES["experts"]}
    given |= {"activation": "gelu", "backend": "torch"} | change
    values = [given.pop(name) for name in NAMES["experts"]]
    with pytest.raises(ValueError, match=words):
        peer_experts(*values, routes=ROUTES, **given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row_C": ROUTES.row_C.flip(0)}, "row_C must ascend"),
        ({"output_C": ROUTES.output_C + 1}, r"output_C must be in \[0, 4\), got 1 to 4"),
        ({"row_C": ROUTES.row_C.int()}, "row_C must be"),
        ({"entry_C": ROUTES.entry_C.float()}, "entry_C must be"),
        ({"output_C": ROUTES.output_C[1:]}, r"output_C must be \[26\]"),
        ({"order_C": ROUTES.order_C.long()}, r"order_C must be \[26\] of torch.int32"),
        ({"order_C": ROUTES.order_C + 1}, r"order_C must be in \[0, 26\), got 1 to 26"),
        ({"order_C": ROUTES.order_C.flip(0)}, "order_C must hold each copy once, sorted stably by entry_C"),
        ({"order_C": ROUTES.order_C.clamp(min=1)}, "order_C must hold each copy once, sorted stably by entry_C"),
        (
            {"order_C": torch.zeros(26, dtype=torch.int32)},
            r"got the copies \[0, 0\] .* at the places 0 and 1: pass what",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_routes_that_do_not_fit_are_refused(change: dict[str, Tensor], words: str):
    given = {"entry_C": ROUTES.entry_C, "row_C": ROUTES.row_C, "output_C": ROUTES.output_C} | change
    with pytest.raises(ValueError, match=words):
        TableRoutes.of(**given, num_rows=7, num_outputs=4)


def test_an_order_that_is_sorted_but_not_stable_is_refused_and_the_right_one_taken():
    entry_C, row_C = torch.tensor([4, 2, 4, 2]), torch.arange(4)
    for order, right in (([1, 3, 0, 2], True), ([3, 1, 0, 2], False), ([1, 3, 2, 0], False), ([1, 1, 0, 2], False)):
        order_C = torch.tensor(order, dtype=torch.int32)
        if right:
            assert TableRoutes.of(entry_C, row_C, row_C, num_rows=4, num_outputs=4, order_C=order_C).order_C is order_C
            continue
        with pytest.raises(ValueError, match="sorted stably"):
            TableRoutes.of(entry_C, row_C, row_C, num_rows=4, num_outputs=4, order_C=order_C)


@pytest.mark.parametrize("name", ["num_rows", "num_outputs"])
@pytest.mark.parametrize("size", [True, 7.0, -1, torch.tensor(7)], ids=str)
def test_a_number_of_rows_that_is_no_whole_number_is_refused(name: str, size: Any):
    none, sizes = torch.empty(0, dtype=torch.int64), {"num_rows": 7, "num_outputs": 7, name: size}
    with pytest.raises(ValueError, match=rf"{name} of TableRoutes must be a whole number from 0, got .*{size}"):
        TableRoutes.of(none, none, none, num_rows=sizes["num_rows"], num_outputs=sizes["num_outputs"])


def test_as_many_copies_as_their_order_has_no_numbers_for_are_refused():
    """Tensors without memory; the kernels count places beyond the last copy."""
    ids_C = torch.empty(2**31 - 4096, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="fewer than 2147479552 copies, got 2147479552"):
        TableRoutes.of(ids_C, ids_C, ids_C, num_rows=7, num_outputs=4)
