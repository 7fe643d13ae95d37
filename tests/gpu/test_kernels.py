"""Every kernel on a GPU, by real products in each dtype: output and each gradient against the reference in float64, and bit for bit twice.

Uninitialised memory holds NaN in one of the runs, so that an element that no program writes is seen. In bf16 the clock chooses the tiles of
the others, so that all are launched; in the other dtypes that would be three times the compilation.
"""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from kernels.expert_mlp import expert_mlp
from kernels.expert_mlp.reference import reference as expert_mlp_reference
from kernels.grouped_matmul import grouped_matmul
from kernels.sort_routes import sort_routes
from kernels.sum_copies import RowCopies, sum_copies
from kernels.switchhead_project import project_outputs, project_values
from kernels.switchhead_project import reference as project_reference
from kernels.tuning import measuring
from tests.gpu.cases import (
    CASES,
    DTYPES,
    SMOKE,
    TOLERANCE,
    Case,
    assert_close,
    assert_equal,
    full_or_tiny,
    normal,
    results,
    routed,
    wide,
)

pytestmark = pytest.mark.gpu
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], leaves: dict[str, Tensor], dtype: torch.dtype
) -> None:
    wanted = results(reference, wide(leaves))
    torch.use_deterministic_algorithms(True)  # torch.empty then holds NaN
    poisoned = results(function, leaves)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.use_deterministic_algorithms(dtype != torch.bfloat16)
    with measuring() if dtype == torch.bfloat16 else nullcontext():
        found, again = (results(function, leaves) for _ in range(2))
    assert_equal(found, again)
    for each in (poisoned, found):
        assert_close(each, wanted, TOLERANCE[dtype])


@every_dtype
@every_case
@pytest.mark.parametrize("kept", [False, True], ids=["", "hidden_kept"])
def test_expert_mlp_equals_its_reference(device: torch.device, case: Case, dtype: torch.dtype, kept: bool):
    given = routed(case, dtype, device)
    down = normal(len(case.sizes), case.width_out, case.width_in, seed=4, device=device).to(dtype) / case.width_out**0.5
    factors = normal(len(given.gates), case.width_out, seed=5, device=device).abs() if kept else None
    routes = {"row_index_C": given.row_index, "output_index_C": given.output_index, "offsets_L": given.offsets}
    sizes = {"num_outputs": case.num_outputs, "factors_CF": factors}
    leaves = {"rows": given.rows, "up": given.weights, "down": down, "gates": given.gates}
    check(
        lambda rows, up, down, gates: expert_mlp(
            rows, up, down, gates, **routes, **sizes, keep_hidden=kept, backend="triton"
        ),
        lambda rows, up, down, gates: expert_mlp_reference(rows, up, down, gates, **routes, **sizes),
        leaves,
        dtype,
    )


@every_dtype
@every_case
@pytest.mark.parametrize(("activation", "side"), [("none", "before"), ("relu", "after")])
def test_grouped_matmul_equals_a_loop(device: torch.device, case: Case, dtype: torch.dtype, activation: str, side: str):
    given = routed(case, dtype, device)

    def loop(rows: Tensor, weights: Tensor, gates: Tensor) -> Tensor:
        copies, ends = rows[given.row_index], given.offsets.tolist()
        copies = copies * gates[:, None] if side == "before" else copies
        parts = [copies[a:b] @ weights[g] for g, (a, b) in enumerate(zip([0, *ends], ends, strict=False))]
        found = torch.cat(parts)
        found = found.relu() if activation == "relu" else found
        found = found * gates[:, None] if side == "after" else found
        return rows.new_zeros(case.num_outputs, case.width_out).index_add(0, given.output_index, found)

    def kernels(rows: Tensor, weights: Tensor, gates: Tensor) -> Tensor:
        return grouped_matmul(
            rows, weights, offsets_G=given.offsets, backend="triton", row_index_C=given.row_index, activation=activation,
            gates_C=gates, gate_side=side, output_index_C=given.output_index, num_outputs=case.num_outputs,
        )  # fmt: skip

    check(kernels, loop, {"rows": given.rows, "weights": given.weights, "gates": given.gates}, dtype)


# T, H, E, K, C, D; "all": one expert for all tokens
HEADS = full_or_tiny(
    [
        (1000, 2, 5, 2, 76, 412, ""),
        (515, 4, 4, 2, 112, 1024, ""),
        (64, 2, 8, 4, 132, 1024, "all"),
        (33, 1, 3, 3, 41, 100, ""),
        (1, 2, 5, 1, 64, 412, ""),
        (0, 2, 5, 2, 76, 412, ""),
    ],
    [(5, 2, 3, 2, 12, 16, "")],
)


@every_dtype
@pytest.mark.parametrize("sizes", HEADS, ids=str)
@pytest.mark.parametrize("side", ["values", "outputs"])
def test_switchhead_project_equals_its_reference(device: torch.device, sizes: tuple, dtype: torch.dtype, side: str):
    tokens, heads, experts, choices, width, d_model, routing = sizes
    chosen = normal(tokens, heads, experts, seed=1, device=device).topk(choices).indices
    if routing == "all":
        chosen = torch.arange(choices, device=device).expand_as(chosen).contiguous()
    shape = (tokens, d_model) if side == "values" else (tokens, heads, width)
    matrix = (d_model, width) if side == "values" else (width, d_model)
    leaves = {
        "rows": normal(*shape, seed=2, device=device).to(dtype),
        "weights": (normal(heads * experts, *matrix, seed=3, device=device) / matrix[0] ** 0.5).to(dtype),
        "gates": normal(tokens, heads, choices, seed=4, device=device).sigmoid(),
    }
    project = project_values if side == "values" else project_outputs
    reference = project_reference.project_values if side == "values" else project_reference.project_outputs
    check(
        lambda rows, weights, gates: project(rows, weights, gates, experts_THK=chosen, backend="triton"),
        lambda rows, weights, gates: reference(rows, weights, gates, chosen),
        leaves,
        dtype,
    )


IDS = full_or_tiny(
    [(0, 3), (1, 7), (5, 1), (67, 5), (16384 * 4, 16), (16384 * 16, 387), (100_003, 2048), (4096, 64)],
    [(0, 3), (67, 5)],
)


@pytest.mark.parametrize(("count", "num_groups"), IDS)
@pytest.mark.parametrize("all_to_one", [False, True], ids=["", "all_to_one"])
def test_sort_routes_is_the_stable_sort(device: torch.device, count: int, num_groups: int, all_to_one: bool):
    ids = torch.randint(num_groups, (count,), generator=torch.Generator().manual_seed(1))
    ids = torch.full_like(ids, num_groups - 1) if all_to_one else ids
    found = sort_routes(ids.to(device), num_groups=num_groups, backend="triton")
    order = ids.sort(stable=True).indices
    assert torch.equal(found.order_C.cpu().long(), order)
    assert torch.equal(found.inverse_C.cpu().long(), order.sort().indices)
    assert torch.equal(found.offsets_G.cpu().long(), torch.bincount(ids, minlength=num_groups).cumsum(0))


@every_dtype
@pytest.mark.parametrize(
    ("copies", "rows", "width"), full_or_tiny([(4096, 1000, 412), (300, 1, 64), (0, 5, 16)], [(6, 3, 12)])
)
def test_sum_copies_is_a_sum(device: torch.device, copies: int, rows: int, width: int, dtype: torch.dtype):
    index = torch.randint(rows, (copies,), generator=torch.Generator().manual_seed(1)).to(device)
    values = normal(copies, width, seed=2, device=device).to(dtype)
    found = sum_copies(values, RowCopies.of(index, num_rows=rows))
    wanted = torch.zeros(rows, width, device=device, dtype=torch.float64).index_add(0, index, values.double())
    assert_close({"sums": found}, {"sums": wanted}, TOLERANCE[dtype])


@pytest.mark.parametrize("op", ["expert_mlp", "grouped_matmul", "switchhead_project"])
def test_a_compiled_function_gives_what_the_plain_one_gives(device: torch.device, op: str):
    """One graph; with the inductor on a GPU. Its own products may round otherwise, the kernels' may not."""
    case, dtype = full_or_tiny(CASES[:1], CASES[:1])[0], torch.float32
    given = routed(case, dtype, device)
    routes = {"row_index_C": given.row_index, "output_index_C": given.output_index, "num_outputs": case.num_outputs}
    tokens = torch.arange(case.num_rows, device=device)
    chosen = (tokens[:, None, None] + torch.arange(2, device=device)) % len(case.sizes)
    gates_THK = normal(*chosen.shape, seed=6, device=device).sigmoid()

    def function(rows: Tensor, weights: Tensor, gates: Tensor) -> Tensor:
        rows = rows * 2.0  # something for the inductor to fuse, exactly
        if op == "expert_mlp":
            found = expert_mlp(rows, weights, weights.mT, gates, **routes, offsets_L=given.offsets, backend="triton")
        elif op == "grouped_matmul":
            found = grouped_matmul(rows, weights, gates_C=gates, **routes, offsets_G=given.offsets, backend="triton")
        else:
            found = project_values(rows, weights, gates_THK * gates.sum(), experts_THK=chosen, backend="triton")
        return found * 2.0

    leaves = {"rows": given.rows, "weights": given.weights, "gates": given.gates}
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if SMOKE else "inductor")
    with measuring():
        plain = results(function, leaves)
    assert_close(results(compiled, leaves), plain, 1e-5)


def test_tf32_is_used_only_where_it_is_allowed(device: torch.device):
    if SMOKE:
        pytest.skip("gpu: the interpreter has no TF32")
    offsets = routed(CASES[0], torch.float32, device).offsets
    rows = normal(8192, 412, seed=8, device=device)  # on a grid they would be exact in TF32 too
    weights = normal(16, 412, 128, seed=9, device=device)
    products = [part.double() @ matrix.double() for part, matrix in zip(rows.chunk(16), weights, strict=True)]
    wanted = {"output": torch.cat(products)}
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, context in ((False, nullcontext()), (True, pytest.raises(AssertionError))):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            found = grouped_matmul(rows, weights, offsets_G=offsets, backend="triton")
            with context:
                assert_close({"output": found}, wanted, TOLERANCE[torch.float32])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
