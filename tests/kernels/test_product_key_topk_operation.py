"""product_key_topk as an operation: its bytes, what it saves, torch.compile, autocast, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.product_key_topk import candidates, product_key_topk, traffic
from kernels.product_key_topk.traffic import Shape
from tests.kernels.compare import assert_same
from tests.kernels.memory import assert_touched, bytes_saved, launches_of, recorded_launches
from tests.kernels.test_product_key_topk import LEAVES, NAMES, Case, Inputs, by_backend, loop, make_inputs

Run = Callable[..., Any]
# Two tiles of tokens, five blocks of the width in the product, two backward; every sub-key is chosen.
OWN = Case(20, 2, 4, 5, 70)
KEYS = Case(20, 2, 4, 5, 70, own=("keys",))
QUERIES = Case(20, 2, 4, 5, 70, own=("queries",))
TINY = Case(5, 2, 4, 3, 4)
KERNELS = ("choose_kernel", "queries_kernel", "keys_kernel")


def shape_of(case: Case) -> Shape:
    return Shape(
        tokens=case.tokens, heads=case.heads, picks=case.picks, num_keys=case.num_keys, width=case.width,
        shared_keys="keys" not in case.own, shared_query="queries" not in case.own,
    )  # fmt: skip


@pytest.mark.parametrize("case", [OWN, KEYS, QUERIES], ids=["own", "one_query", "one_set_of_keys"])
def test_the_byte_model_is_what_the_kernels_touch_and_nothing_is_written_twice(case: Case, interpreted: Run) -> None:
    found, shape = interpreted(launches_of, by_backend, make_inputs(case), "triton"), shape_of(case)
    wanted = [*traffic.forward(shape).values(), *traffic.backward(shape).values()]
    assert tuple(launch.kernel for launch in found) == KERNELS
    assert_touched(found, wanted)


def saved(inputs: Inputs, backend: str) -> int:
    """Without the sub-keys."""
    queries, keys = (inputs[name].requires_grad_() for name in LEAVES)
    top_k = inputs["gradient"].shape[2]
    return bytes_saved(lambda: product_key_topk(queries, keys, top_k=top_k, backend=backend).scores_THK, beside=[keys])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_only_queries_keys_and_ids_are_saved(backend: str, interpreted: Run) -> None:
    call = interpreted if backend == "triton" else lambda function, *args: function(*args)
    assert call(saved, make_inputs(OWN), backend) == traffic.saved(shape_of(OWN))


def test_the_kilobytes_that_the_traffic_tells() -> None:
    peer = traffic.SHAPES["PEER: 8 heads, K 16 of 1,024^2, C 64"]
    both = [*traffic.forward(peer).values(), *traffic.backward(peer).values()]
    assert traffic.sub_scores(peer) == 64 * 1024 * peer.tokens
    assert round(sum(each.total for each in both) / peer.tokens / 1000) == 19
    assert "64 KiB" in (traffic.__doc__ or "")
    assert "19 KB" in (traffic.__doc__ or "")


def compiled(inputs: Inputs) -> dict[str, Tensor]:
    """Under torch.compile with one graph, by its tracer without a code generator (which the interpreter would not survive)."""

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    def function(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        choice = product_key_topk(queries, keys, top_k=4, backend="triton")
        return choice.scores_THK * 2.0, choice.first_THK, choice.second_THK

    leaves = [inputs[name].requires_grad_() for name in LEAVES]
    scores, first, second = function(*leaves)
    found = torch.autograd.grad(scores, leaves, inputs["gradient"])
    return dict(zip(NAMES, (scores.detach(), first, second, *found), strict=True))


def test_compile_sees_one_graph_with_the_same_result(interpreted: Run) -> None:
    inputs = make_inputs(TINY)
    wanted = loop(inputs) | {name: 2.0 * loop(inputs)[name] for name in ("scores", *LEAVES)}
    assert_same(interpreted(compiled, inputs), wanted)


def checked_by_torch(inputs: Inputs) -> str:
    from kernels.product_key_topk.op import choose_op

    leaves = [inputs[name].requires_grad_() for name in LEAVES]
    return str(torch.library.opcheck(choose_op, (*leaves, 4), raise_exception=False))


@pytest.mark.parametrize("case", [TINY, Case(2, 2, 4, 3, 2, own=("keys",))], ids=["own", "one_query"])
def test_torch_finds_nothing_wrong_with_the_operation(case: Case, interpreted: Run) -> None:
    found = interpreted(checked_by_torch, make_inputs(case))
    assert found.count("'SUCCESS'") == 4, found


def under_autocast(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return by_backend(inputs, backend)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_autocast_changes_nothing_and_narrow_inputs_give_float32_scores(backend: str, interpreted: Run) -> None:
    call = interpreted if backend == "triton" else lambda function, *args: function(*args)
    inputs = make_inputs(TINY)
    plain, found = call(by_backend, inputs, backend), call(under_autocast, inputs, backend)
    forward = NAMES[:3]  # the reference's gradients are torch's, which here run under autocast themselves
    assert all(torch.equal(found[name], plain[name]) for name in (forward if backend == "reference" else NAMES))
    narrow = inputs | {name: inputs[name].bfloat16() for name in LEAVES}
    found, wanted = call(by_backend, narrow, backend), loop(narrow)
    assert {name: found[name].dtype for name in ("scores", *LEAVES)} == {
        "scores": torch.float32, "queries": torch.bfloat16, "keys": torch.bfloat16
    }  # fmt: skip
    assert_same({name: found[name] for name in forward}, {name: wanted[name] for name in forward})


def precisions(inputs: Inputs, allowed: bool) -> list[tuple[str, set[str]]]:
    """Of each launch of a forward and of a backward pass, by torch's switch."""
    try:
        torch.backends.cuda.matmul.allow_tf32 = allowed
        with recorded_launches() as launches:
            by_backend(inputs, "triton")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    return [(launch.kernel, launch.precisions) for launch in launches]


@pytest.mark.parametrize(("allowed", "precision"), [(False, "IEEE"), (True, "TF32")])
def test_the_scores_round_to_tf32_only_where_torch_allows_it_and_gradients_never(
    allowed: bool, precision: str, interpreted: Run
) -> None:
    """The backward pass has no products: it adds rows."""
    wanted = [*zip(KERNELS, ({precision}, set(), set()), strict=True)]
    assert interpreted(precisions, make_inputs(TINY), allowed) == wanted


def asked_for(inputs: Inputs, name: str, backend: str) -> dict[str, Tensor]:
    leaves = [inputs[each].requires_grad_(each == name) for each in LEAVES]
    scores_THK = product_key_topk(*leaves, top_k=4, backend=backend).scores_THK
    scores_THK.backward(inputs["gradient"])
    return {each: leaf.grad for each, leaf in zip(LEAVES, leaves, strict=True) if leaf.grad is not None}


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", LEAVES)
def test_a_gradient_that_is_asked_for_alone_is_the_same(name: str, backend: str, interpreted: Run) -> None:
    call = interpreted if backend == "triton" else lambda function, *args: function(*args)
    found = call(asked_for, make_inputs(TINY), name, backend)
    assert_same(found, {name: loop(make_inputs(TINY))[name]})


def with_other_strides(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    strided = {name: inputs[name].mT.contiguous().mT for name in LEAVES}
    return by_backend(inputs | strided | {"gradient": inputs["gradient"].repeat_interleave(2, 2)[..., ::2]}, backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_strides_do_not_matter_and_two_runs_are_bit_equal(backend: str, interpreted: Run) -> None:
    call = interpreted if backend == "triton" else lambda function, *args: function(*args)
    found, wanted = call(with_other_strides, make_inputs(TINY), backend), call(by_backend, make_inputs(TINY), backend)
    assert all(torch.equal(found[name], wanted[name]) for name in NAMES)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_sub_keys_that_nobody_chose_get_exact_zeros(backend: str, interpreted: Run) -> None:
    call = interpreted if backend == "triton" else lambda function, *args: function(*args)
    inputs = make_inputs(Case(3, 2, 2, 9, 4))
    found = call(by_backend, inputs, backend)
    for head in range(2):
        for z, name in enumerate(("first", "second")):
            chosen = set(found[name][:, head].flatten().tolist())
            got = found["keys"][head, z].any(1)
            assert {j for j in range(9) if got[j]} == chosen


def refused(backend: str = "torch", top_k: int = 2, **changes: Tensor) -> str:
    leaves = {name: each for name, each in make_inputs(Case(3, 2, 2, 4, 6)).items() if name in LEAVES} | changes
    try:
        return str(product_key_topk(leaves["queries"], leaves["keys"], top_k=top_k, backend=backend))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"queries": torch.zeros(3, 2, 2, 5)}, ("[3, 2, 2, 5]", "[2, 2, 4, 6]", "reshape")),
        ({"queries": torch.zeros(3, 3, 2, 6)}, ("[3, 3, 2, 6]", "H or 1")),
        ({"keys": torch.zeros(2, 2, 0, 6)}, ("no size 0 but T", "[2, 2, 0, 6]")),
        ({"keys": torch.zeros(2, 2, 4, 6).double()}, ("one floating-point dtype", "torch.float64", "cast")),
        ({"keys": torch.zeros(2, 2, 4, 6, device="meta")}, ("one device", "meta", "move")),
        ({"top_k": 17}, ("top_k must be a whole number from 1", "got 17 and 4 sub-keys", "at most 16")),
        ({"top_k": True}, ("whole number", "got True")),
        ({"top_k": 2.0}, ("whole number", "got 2.0")),
        ({"queries": torch.zeros(3, 2, 2, 6).int(), "keys": torch.zeros(2, 2, 4, 6).int()}, ("floating-point", "torch.int32", "cast")),
        ({"top_k": 0}, ("got 0",)),
        ({"backend": "cuda"}, ("triton, torch, reference", "'cuda'")),
        ({"backend": "triton"}, ("product_key_topk: the triton backend computes on a GPU",)),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_both_values(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    message = refused(**changes)
    assert all(part in message for part in parts), message


def test_the_kernel_refuses_what_it_cannot_hold(interpreted: Run) -> None:
    wide = {name: make_inputs(Case(3, 2, 2, 4, 6))[name].double() for name in LEAVES}
    assert "computes in float32, got torch.float64" in interpreted(_refused_by_kernel, wide, 2)
    many = {name: make_inputs(Case(3, 2, 2, 9, 6))[name] for name in LEAVES}
    assert "top_k of at most 64" in interpreted(_refused_by_kernel, many, 65)


def _refused_by_kernel(leaves: dict[str, Tensor], top_k: int) -> str:
    return refused("triton", top_k, **leaves)


def test_the_candidates_are_those_that_can_serve() -> None:
    assert candidates("cpu", num_keys=1024, top_k=16) == ("torch",)
    assert candidates("cuda", num_keys=1024, top_k=16) == ("triton", "torch")
    assert candidates("cuda", num_keys=1024, top_k=65) == ("torch",)
    assert candidates("cuda", num_keys=50_000, top_k=16) == ("torch",)
