"""PKM and Memory+ against the specification written out by hand (specs of arXiv 2310.10837, sections 3 and 13.6; 2407.04153, section 2)."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model.parameters import count_parameters, materialize
from model.pkm import MemoryGate
from model.product_key_config import PKMConfig
from tests.model.build import context, gradients_agree, model_config, normal, place, transformer
from tests.model.watch import Watched, assert_float32_throughout
from train.optimizer import parameter_groups


def pkm(*, d_model: int = 6, dtype: torch.dtype = torch.float64, num_layers: int = 2, **settings: Any) -> Any:
    """In evaluation mode; biases moved off zero."""
    settings = {"num_keys": 4, "num_heads": 2, "top_k": 3} | settings
    layer: Any = PKMConfig(**settings).build(place("switchhead", d_model=d_model, num_layers=num_layers))
    materialize(layer, seed=5, dtype=dtype)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(layer.named_parameters()):
            if name.endswith("bias"):
                parameter += 0.3 * normal(*parameter.shape, seed=number, dtype=dtype)
    return layer.eval()


def row_of(a: int, b: int, *, num_keys: int) -> int:
    return (a + b) % num_keys * num_keys + a


def values_of(layer: Any) -> Tensor:
    """All values (G, D) in the order of a n + b."""
    n = layer.config.num_keys
    if hasattr(layer, "values"):
        return layer.values
    return layer.table.values[[row_of(a, b, num_keys=n) for a in range(n) for b in range(n)]]


def scores_of(layer: Any, x_D: Tensor, head: int) -> Tensor:
    """Of all values (G,), in the order of a n + b."""
    router, config = layer.router, layer.config
    query = x_D
    if config.key_dim is not None:
        rows = slice(head * config.key_dim, (head + 1) * config.key_dim)
        query = router.query.weight[rows] @ x_D
        if router.query.bias is not None:
            query = query + router.query.bias[rows]
    if config.query_norm == "batch":  # the first running statistics are 0 and 1
        features = slice(head * config.key_dim, (head + 1) * config.key_dim) if config.key_dim else slice(None)
        norm = router.batch_norm
        query = query / math.sqrt(1 + 1e-5) * norm.weight[features] + norm.bias[features]
    keys = router.keys[0 if config.shared_keys else head]
    first, second = keys[0] @ query[: len(query) // 2], keys[1] @ query[len(query) // 2 :]
    return torch.stack([s + t for s in first for t in second])


def gated(layer: Any, y_D: Tensor, x_D: Tensor) -> Tensor:
    if layer.gate is None:
        return y_D
    opening = layer.gate.opening.weight @ x_D + layer.gate.opening.bias
    return layer.gate.output.weight @ (y_D * opening * opening.sigmoid()) + layer.gate.output.bias


def by_hand(layer: Any, x_D: Tensor) -> Tensor:
    """One token: every value of every head is scored, the best are kept and added, one after another."""
    total, values = torch.zeros_like(x_D), values_of(layer)
    for head in range(layer.config.num_heads):
        scores = scores_of(layer, x_D, head)
        best = scores.sort(descending=True, stable=True).indices[: layer.config.top_k]
        gates = scores[best].softmax(0) if layer.config.scores == "softmax" else scores[best].relu()
        for gate, value in zip(gates, best.tolist(), strict=True):
            total = total + gate * values[value]
    return gated(layer, total, x_D)


def dense_by_hand(layer: Any, x_D: Tensor) -> Tensor:
    total = sum(scores_of(layer, x_D, head) for head in range(layer.config.num_heads))
    assert isinstance(total, Tensor)
    gates = total.exp() / total.exp().sum() if layer.config.scores == "softmax" else total.relu()
    return gated(layer, gates @ values_of(layer), x_D)


FORMS = [
    {},
    {"scores": "relu", "top_k": 7},
    {"key_dim": 4, "shared_keys": True, "query_norm": "batch"},
    {"key_dim": 2, "gated": True, "top_k": 16, "query_norm": "none"},
    {"query_norm": "batch", "scores": "relu", "num_keys": 3, "top_k": 1, "num_heads": 3},
]


def over_tokens(function: Any, layer: Any, x_BSD: Tensor) -> Tensor:
    return torch.stack([torch.stack([function(layer, token) for token in row]) for row in x_BSD])


@pytest.mark.parametrize("form", FORMS)
def test_the_forward_equals_the_specification_token_by_token(form: dict[str, Any]):
    layer, x = pkm(**form), normal(2, 5, 6)
    torch.testing.assert_close(layer(x, context(2)).y_BSD, over_tokens(by_hand, layer, x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_the_dense_form_equals_its_specification_token_by_token(form: dict[str, Any]):
    settings: dict[str, Any] = form | {"top_k": None}
    layer, x = pkm(**settings), normal(2, 5, 6)
    torch.testing.assert_close(layer(x, context(2)).y_BSD, over_tokens(dense_by_hand, layer, x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("scores", ["softmax", "relu"])
def test_with_one_head_the_dense_form_is_the_choice_of_all_values(scores: str):
    dense, chosen, x = (
        pkm(num_heads=1, top_k=None, scores=scores),
        pkm(num_heads=1, top_k=16, scores=scores),
        normal(2, 5, 6),
    )
    with torch.no_grad():
        dense.router.keys.copy_(chosen.router.keys)
        dense.values.copy_(values_of(chosen))
    torch.testing.assert_close(dense(x, context(2)).y_BSD, chosen(x, context(2)).y_BSD, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scores", ["softmax", "relu"])
def test_in_the_dense_form_heads_on_one_query_are_one_head_with_the_sum_of_their_keys(scores: str):
    four, one, x = (
        pkm(num_heads=4, top_k=None, scores=scores),
        pkm(num_heads=1, top_k=16, scores=scores),
        normal(2, 5, 6),
    )
    with torch.no_grad():
        one.router.keys.copy_(four.router.keys.sum(0, keepdim=True))
        order = [row_of(a, b, num_keys=4) for a in range(4) for b in range(4)]
        one.table.values[order] = four.values
    torch.testing.assert_close(four(x, context(2)).y_BSD, one(x, context(2)).y_BSD, rtol=0, atol=1e-13)


@pytest.mark.parametrize("top_k", [3, None])
@pytest.mark.parametrize(
    "form", [{}, {"scores": "relu"}, {"key_dim": 4, "gated": True, "query_norm": "layer", "num_keys": 3}]
)
def test_every_gradient_agrees_with_finite_differences(form: dict[str, Any], top_k: int | None):
    """Steps of 1e-6 do not change the choice."""
    assert gradients_agree(pkm(top_k=top_k, **form), normal(2, 3, 6), context(2))


def test_only_ids_and_gates_go_to_the_owners_and_no_hidden_state():
    layer, x = pkm(), normal(2, 5, 6)
    layer.dispatcher = Watched()
    layer(x, context(2))
    assert layer.dispatcher.calls[1] == ("dispatch", "pkm", (10, 0))
    assert layer.dispatcher.calls[-1] == ("combine", "pkm", (10, 6))


def test_queries_have_a_bias_unless_a_batch_norm_takes_it_out_again():
    assert pkm(key_dim=4).router.query.bias is not None
    assert pkm(key_dim=4, query_norm="batch").router.query.bias is None


def test_values_that_nobody_picks_get_exactly_zero_gradients():
    layer, x = pkm(num_keys=8, num_heads=1, top_k=2), normal(1, 4, 6)
    layer(x, context(1)).y_BSD.square().sum().backward()
    assert 2 <= layer.table.values.grad.any(dim=1).sum() <= 8


@pytest.mark.parametrize("form", [{}, {"top_k": None}, {"gated": True, "key_dim": 4, "query_norm": "batch"}])
def test_a_rank_without_rows_takes_part_and_gives_none(form: dict[str, Any]):
    layer, x = pkm(**form).train(), torch.zeros(0, 5, 6, dtype=torch.float64, requires_grad=True)
    result = layer(x, context([]))
    result.y_BSD.sum().backward()
    assert result.y_BSD.shape == (0, 5, 6)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in layer.parameters())


def test_in_evaluation_a_token_depends_on_nothing_but_itself():
    layer, x = pkm(key_dim=4, query_norm="batch"), normal(4, 5, 6)
    together = layer(x, context(4)).y_BSD
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = layer(x.flatten(0, 1)[order][None], context(1)).y_BSD[0]
    torch.testing.assert_close(shuffled, together.flatten(0, 1)[order], rtol=0, atol=1e-13)


@pytest.mark.parametrize("form", [{}, {"top_k": None}, {"gated": True}])
def test_under_bfloat16_autocast_the_result_is_near_and_the_gradients_are_float32(form: dict[str, Any]):
    layer, x = pkm(dtype=torch.float32, **form), normal(2, 6, 6, dtype=torch.float32)
    plain = layer(x, context(2)).y_BSD
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = layer(x, context(2)).y_BSD
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), plain, rtol=0, atol=0.02 * plain.abs().max().item())
    narrow.float().square().sum().backward()
    assert_float32_throughout(layer)


UNIFORM = 1 / math.sqrt(3)  # the standard deviation of a uniform draw in [-1, 1]


@pytest.mark.parametrize("top_k", [4, None])
@pytest.mark.parametrize(
    ("initialisation", "key_std", "value_std"),
    [
        ("standard", math.sqrt(2 / 8 / 64), math.sqrt(2 / 8 / 64)),
        ("dense_equivalent", math.sqrt(2 / 8 / 64), math.sqrt(2 / 8 / 40**2)),
        ("lample", UNIFORM / math.sqrt(32), 1 / 8),
        ("memory_layers", UNIFORM / math.sqrt(64), 1 / 8),
    ],
)
def test_the_initialisations_have_the_papers_standard_deviations(initialisation, key_std, value_std, top_k):
    layer = pkm(d_model=64, num_layers=8, num_keys=40, top_k=top_k, initialisation=initialisation)
    assert layer.router.keys.std().item() == pytest.approx(key_std, rel=0.03)
    assert values_of(layer).std().item() == pytest.approx(value_std, rel=0.03)


def test_one_table_for_all_layers_is_held_once():
    def build(shared: bool) -> Any:
        section = {"num_keys": 4, "num_heads": 2, "top_k": 3, "shared_values": shared}
        return transformer(
            model_config(num_layers=3, feedforwards=["pkm"], sigma_moe=None, dense_mlp=None, pkm=section)
        )

    assert count_parameters(build(False)) - count_parameters(build(True)) == 2 * 16 * 8
    assert len({id(block.feedforward.table) for block in build(True).layers}) == 1


@pytest.mark.parametrize("top_k", [3, None])
def test_neither_values_nor_keys_decay_and_all_other_matrices_do(top_k: int | None):
    layer = pkm(key_dim=4, gated=True, top_k=top_k)
    decaying = next(group["params"] for group in parameter_groups(layer, weight_decay=0.1) if group["name"] == "decay")
    gate = layer.gate
    assert [id(p) for p in decaying] == [id(m.weight) for m in (layer.router.query, gate.opening, gate.output)]


def test_the_gate_of_memory_plus_starts_with_the_standard_deviation_of_its_width():
    gate = MemoryGate(256)
    materialize(gate, seed=1)
    for linear in (gate.opening, gate.output):
        assert linear.weight.std().item() == pytest.approx(1 / 16, rel=0.02)
