"""top_k_attention as an operation: its bytes, what it saves, torch.compile, autocast, TF32, what it refuses; and the search in torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.top_k_attention import candidates, top_k_attention, traffic
from kernels.top_k_attention.selection import select_top_k
from kernels.top_k_attention.traffic import Shape
from tests.kernels.compare import assert_same, compiled
from tests.kernels.memory import assert_touched, bytes_saved, launches_of, recorded_launches
from tests.kernels.test_top_k_attention import SCALE, Case, by_kernel, by_loop, make_inputs

Run = Callable[..., Any]
INPUTS = ("q", "k", "v")
SMALL = Case((1, 2, 20, 24, 6, 5), 4)
ALL = Case((1, 2, 20, 24, 6, 5), 24)
SHARED = Case((1, 2, 20, 24, 6, 5), 4, sharing=2)


def shape_of(case: Case) -> Shape:
    return Shape(*case.sizes, itemsize=4, selects=case.top_k < case.sizes[3], sharing=case.sharing)


@pytest.mark.parametrize("case", [SMALL, ALL, SHARED], ids=["selects", "all_keys", "shared"])
def test_the_byte_model_is_what_the_kernels_touch_and_nothing_is_written_twice(case: Case, interpreted: Run) -> None:
    found = interpreted(launches_of, by_kernel, make_inputs(case))
    wanted = [*traffic.forward(shape_of(case)).values(), *traffic.backward(shape_of(case)).values()]
    assert_touched(found, wanted)


def test_the_flops_are_those_of_the_pairs_that_a_loop_counts() -> None:
    pairs = sum(24 - 20 + i + 1 for i in range(20)) * 2
    assert traffic.flops(shape_of(SMALL), backward=False) == 2 * pairs * (6 + 5)
    assert traffic.flops(shape_of(SMALL), backward=True) == 2 * pairs * (4 * 6 + 3 * 5)


def saved(inputs: dict[str, Any]) -> int:
    """Beside q, k and v."""
    leaves = [inputs[name].requires_grad_() for name in INPUTS]
    return bytes_saved(
        lambda: top_k_attention(*leaves, top_k=inputs["top_k"], scale=SCALE, backend="triton"), beside=leaves
    )


def test_three_numbers_per_query_are_saved_and_the_output(interpreted: Run) -> None:
    assert interpreted(saved, make_inputs(SMALL)) == traffic.saved(shape_of(SMALL)) == 2 * 20 * (3 * 4 + 5 * 4)


def in_one_graph(inputs: dict[str, Any]) -> dict[str, Tensor]:
    options: dict[str, Any] = {"top_k": inputs["top_k"], "scale": SCALE, "backend": "triton"}
    leaves = {name: inputs[name] for name in INPUTS}
    return compiled(lambda *tensors: top_k_attention(*tensors, **options), leaves, inputs["gradient"])


def test_compile_sees_one_graph_with_the_same_result(interpreted: Run) -> None:
    found, wanted = interpreted(in_one_graph, make_inputs(SMALL)), by_loop(make_inputs(SMALL))
    assert_same(found, {name: 2.0 * tensor for name, tensor in wanted.items()}, tolerance=4e-6)


def checked_by_torch(inputs: dict[str, Any], first: bool) -> str:
    from kernels.top_k_attention.op import forward_op

    leaves = [inputs[name].requires_grad_() for name in INPUTS]
    first_BS = torch.zeros(1, 20, dtype=torch.int32) if first else None
    arguments = (*leaves, first_BS, inputs["top_k"], SCALE, "ieee")
    return str(torch.library.opcheck(forward_op, arguments, raise_exception=False))


@pytest.mark.parametrize("case", [SHARED, ALL], ids=["selects", "all_keys"])
def test_torch_finds_nothing_wrong_with_the_operation(case: Case, interpreted: Run) -> None:
    found = interpreted(checked_by_torch, make_inputs(case), case is SHARED)
    assert found.count("'SUCCESS'") == 4, found


def under_autocast(inputs: dict[str, Any]) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.float16):
        return by_kernel(inputs)


def test_autocast_computes_in_its_dtype_with_fp32_gradients_at_fp32_leaves(interpreted: Run) -> None:
    inputs = make_inputs(Case(SMALL.sizes, 4, values="tied"))  # their scores are the same in both dtypes
    found = interpreted(under_autocast, inputs | {"gradient": inputs["gradient"].half()})
    assert found["output"].dtype == torch.float16
    assert all(found[name].dtype == torch.float32 for name in INPUTS)
    assert_same(found, by_loop(inputs), tolerance=5e-3)


def asked_for(inputs: dict[str, Any], name: str) -> Tensor:
    leaves = [inputs[each].requires_grad_(each == name) for each in INPUTS]
    output = top_k_attention(*leaves, top_k=inputs["top_k"], scale=SCALE, backend="triton")
    return torch.autograd.grad(output, [inputs[name]], inputs["gradient"])[0]


@pytest.mark.parametrize("name", INPUTS)
def test_one_gradient_alone_is_the_same(name: str, interpreted: Run) -> None:
    inputs = make_inputs(SMALL)
    torch.testing.assert_close(
        interpreted(asked_for, inputs, name).double(), by_loop(inputs)[name], rtol=1e-5, atol=1e-5
    )


def precisions(inputs: dict[str, Any], allowed: bool) -> list[tuple[str, set[str]]]:
    """Of each launch of a forward and of a backward pass, between which torch's switch is turned."""
    leaves = [inputs[name].requires_grad_() for name in INPUTS]
    matmul = torch.backends.cuda.matmul
    try:
        with recorded_launches() as launches:
            matmul.allow_tf32 = allowed
            output = top_k_attention(*leaves, top_k=4, scale=SCALE, backend="triton")
            matmul.allow_tf32 = not allowed
            output.backward(inputs["gradient"])
    finally:
        matmul.allow_tf32 = False
    return [(launch.kernel, launch.precisions) for launch in launches]


@pytest.mark.parametrize(("allowed", "precision"), [(False, "IEEE"), (True, "TF32")])
def test_products_round_as_torch_allowed_at_the_call_also_in_a_later_backward(
    allowed: bool, precision: str, interpreted: Run
) -> None:
    kernels = ("threshold_kernel", "_forward_kernel", "_query_gradient_kernel", "_key_gradient_kernel")
    assert interpreted(precisions, make_inputs(SMALL), allowed) == [(kernel, {precision}) for kernel in kernels]


def strided(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Heads beside each other, as a projection gives them, and a gradient that is one number expanded."""
    moved = {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in INPUTS}
    return by_kernel(inputs | moved | {"gradient": torch.ones(()).expand_as(inputs["gradient"])})


def test_other_strides_give_the_same(interpreted: Run) -> None:
    inputs = make_inputs(SMALL)
    found = interpreted(strided, inputs)
    assert_same(found, by_loop(inputs | {"gradient": torch.ones_like(inputs["gradient"])}), tolerance=4e-6)


ON_GPU = {"top_k": 64, "num_keys": 1000, "widths": (64, 64)}


@pytest.mark.parametrize(
    ("device", "change", "wanted"),
    [
        ("cpu", {}, ("torch",)),
        ("cuda", {}, ("triton", "torch")),
        ("cuda", {"top_k": None}, ("triton", "torch")),
        ("cuda", {"top_k": 1000}, ("torch",)),  # all keys of the row, and in decoding one of them too many
        ("cuda", {"top_k": 257}, ("torch",)),
        ("cuda", {"widths": (64, 129)}, ("torch",)),
        ("cuda", {"extras": True}, ("torch",)),
    ],
    ids=str,
)
def test_the_candidates_are_those_that_serve_the_call(
    device: str, change: dict[str, Any], wanted: tuple[str, ...]
) -> None:
    assert candidates(device, **(ON_GPU | change)) == wanted


def refused(inputs: dict[str, Any], options: dict[str, Any]) -> str:
    options = {"top_k": 3, "scale": 1.0, "backend": "triton"} | options
    try:
        top_k_attention(*(inputs[name] for name in INPUTS), **options)
    except ValueError as error:
        return str(error)
    return "nothing"


WIDE = make_inputs(Case((1, 1, 5, 5, 129, 4), 3))
LONG = make_inputs(Case((1, 1, 5, 300, 4, 4), 3))
MIXED = make_inputs(SMALL) | {"v": make_inputs(SMALL)["v"].half()}
RELATIVE = (make_inputs(SMALL)["q"], make_inputs(SMALL)["k"][0])


@pytest.mark.parametrize(
    ("inputs", "options", "words"),
    [
        (WIDE, {}, "heads up to 128 wide, got 129"),
        (LONG, {"top_k": 257}, "top_k up to 256, or all keys, got 257 of 300"),
        (MIXED, {}, "q torch.float32, k torch.float32 and v torch.float16: cast them"),
        (make_inputs(SMALL, torch.float64), {}, "got q torch.float64"),
        (make_inputs(SMALL), {"relative": RELATIVE}, "no relative positions and no dropout: choose the torch backend"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_kernel_does_not_serve_is_refused(
    inputs: dict[str, Any], options: dict[str, Any], words: str, interpreted: Run
) -> None:
    assert words in interpreted(refused, inputs, options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "cuda"}, "must be one of triton, torch, reference, got 'cuda'"),
        (
            {"backend": "torch", "top_k": True},
            "top_k must be a whole number of kept keys >= 1, or None or 0 for all keys, not True",
        ),
        ({"backend": "torch", "top_k": 2.5}, "not 2.5"),
        ({"backend": "torch", "top_k": -1}, "not -1"),
        ({"backend": "triton"}, "the triton backend computes on a GPU, got tensors on cpu"),
        (
            {"backend": "reference", "relative": RELATIVE},
            "reference backend of top_k_attention has no relative positions",
        ),
        (
            {"backend": "torch", "first_BS": torch.zeros(1, 19).int()},
            "first must be (1, 20) of torch.int32 or torch.int64",
        ),
        ({"backend": "torch", "first_BS": torch.arange(20, 0, -1)[None]}, "first must not decrease along the queries"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_sentence_with_the_remedy(options: dict[str, Any], words: str) -> None:
    assert words in refused(make_inputs(SMALL), options)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_whole_numbers_are_no_queries_keys_or_values(name: str, backend: str) -> None:
    inputs = make_inputs(SMALL)
    message = refused(inputs | {name: (9 * inputs[name]).int()}, {"backend": backend})
    assert "must have floating-point dtypes" in message
    assert "torch.int32" in message


@pytest.mark.parametrize("length", [20, 150, 1003])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_the_selection_in_groups_is_that_of_a_stable_sort(length: int, tied: bool) -> None:
    scores = torch.randn(3, 17, length, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scores = (2 * scores).round() if tied else scores
    scores[1, :, 8:] = -torch.inf
    scores[2, 4, length - 1] = torch.nan
    for top_k in (1, 6):
        found = select_top_k(scores, top_k)
        order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        assert torch.equal(found.keys.long().sort(-1).values, order.sort(-1).values)
        torch.testing.assert_close(found.scores, scores.gather(-1, found.keys.long()), rtol=0, atol=0, equal_nan=True)
