"""PEER against the specification written out by hand (invariants 4, 5, 7, 9, 10, 12, 13, 14, 18 and 22 of specs of arXiv 2407.04153)."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.parameters import add_updates, count_parameters, logical_parameters, materialize
from model.product_key_config import PEERConfig
from tests.model.build import context, gradients_agree, model_config, normal, place, tokens, transformer
from tests.model.watch import assert_float32_throughout
from train.optimizer import parameter_groups

ACTIVATIONS = {"gelu": F.gelu, "relu": torch.relu}


def peer(*, d_model: int = 6, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """In evaluation mode, the running statistics and the gains of the queries' norm off their first values."""
    settings = {"num_experts": 16, "num_heads": 2, "top_k": 3, "key_dim": 4} | settings
    layer: Any = PEERConfig(**settings).build(place("switchhead", d_model=d_model))
    materialize(layer, seed=5, dtype=dtype)
    with torch.no_grad():
        for name, value in (*layer.router.named_parameters(), *layer.router.named_buffers()):
            if "norm" in name:
                value += 0.2 * normal(*value.shape, seed=len(name), dtype=dtype).abs()
    return layer.eval()


def row_of(layer: Any, expert: int) -> int:
    """Where expert a n + b lies in the tables."""
    n = layer.config.num_keys
    a, b = divmod(expert, n)
    return (a + b) % n * n + a


def query_of(layer: Any, x_D: Tensor, head: int) -> Tensor:
    router, width = layer.router, layer.config.key_dim
    rows = slice(head * width, (head + 1) * width)
    query = router.query.weight[rows] @ x_D
    if layer.config.query_norm == "batch":
        norm = router.batch_norm
        query = (query - norm.mean[rows]) / (norm.variance[rows] + 1e-5).sqrt() * norm.weight[rows] + norm.bias[rows]
    if layer.config.query_norm == "layer":
        query = F.layer_norm(query, (width,), router.layer_norm.weight, router.layer_norm.bias)
    return query


def by_hand(layer: Any, x_D: Tensor) -> Tensor:
    """One token: every expert of every head is scored, the best are kept, one expert after another is added."""
    config, total = layer.config, torch.zeros_like(x_D)
    n, half = config.num_keys, config.key_dim // 2
    for head in range(config.num_heads):
        query = query_of(layer, x_D, head)
        keys = layer.router.keys[0 if config.shared_keys else head]
        scores = torch.stack([keys[0, e // n] @ query[:half] + keys[1, e % n] @ query[half:] for e in range(n * n)])
        best = scores.sort(descending=True, stable=True).indices[: config.top_k]
        gates = {"softmax": scores[best].softmax(0), "sigmoid": scores[best].sigmoid(), "relu": scores[best].relu()}
        for gate, expert in zip(gates[config.scores], best.tolist(), strict=True):
            row = row_of(layer, expert)
            hidden = ACTIVATIONS[config.activation](layer.experts.up[row] @ x_D)
            total = total + gate * hidden * layer.experts.down[row]
    return total


FORMS = [
    {},
    {"shared_keys": False, "query_norm": "layer"},
    {"scores": "sigmoid", "activation": "relu", "query_norm": "none"},
    {"scores": "relu", "top_k": 16, "num_heads": 3},
    {"num_experts": 9, "top_k": 1, "key_dim": 2},
    {"num_experts": 1, "top_k": 1},
]


@pytest.mark.parametrize("form", FORMS)
def test_the_forward_equals_the_specification_token_by_token(form: dict[str, Any]):
    layer, x = peer(**form), normal(2, 5, 6)
    expected = torch.stack([torch.stack([by_hand(layer, token) for token in row]) for row in x])
    torch.testing.assert_close(layer(x, context(2)).y_BSD, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_every_gradient_agrees_with_finite_differences(form: dict[str, Any]):
    """Of the input, both tables, queries, keys and norms, in evaluation; steps of 1e-6 do not change the choice."""
    assert gradients_agree(peer(**form), normal(2, 3, 6), context(2))


def test_gradients_agree_with_finite_differences_through_the_statistics_of_training():
    assert gradients_agree(peer().train(), normal(2, 3, 6), context(2))


def test_one_head_that_picks_all_experts_is_a_dense_mlp_gated_by_the_softmax_of_all_scores():
    layer, x = peer(num_heads=1, top_k=16, query_norm="none"), normal(1, 7, 6)
    query, keys = x[0] @ layer.router.query.weight.T, layer.router.keys[0]
    scores = (query[:, :2] @ keys[0].T)[:, :, None] + (query[:, 2:] @ keys[1].T)[:, None, :]
    order = [row_of(layer, expert) for expert in range(16)]
    up, down = layer.experts.up[order], layer.experts.down[order]
    expected = (scores.flatten(1).softmax(1) * F.gelu(x[0] @ up.T)) @ down
    torch.testing.assert_close(layer(x, context(1)).y_BSD[0], expected, rtol=0, atol=1e-13)


def test_one_pick_under_softmax_is_a_plain_mlp_of_the_retrieved_rows_and_teaches_the_router_nothing():
    layer, x = peer(top_k=1), normal(2, 5, 6)
    result = layer(x, context(2))
    result.y_BSD.square().sum().backward()
    expected = torch.stack([torch.stack([by_hand(layer, token) for token in row]) for row in x])
    torch.testing.assert_close(result.y_BSD, expected, rtol=0, atol=1e-13)
    assert all(not parameter.grad.any() for parameter in layer.router.parameters())
    assert layer.experts.up.grad.any()


def test_an_expert_that_two_heads_pick_adds_twice_and_so_do_its_gradients():
    """Two heads with one query between them, so with the same picks, are one head counted twice."""
    twin, alone, x = peer(query_norm="none"), peer(num_heads=1, query_norm="none"), normal(2, 5, 6)
    with torch.no_grad():
        twin.router.query.weight[4:] = twin.router.query.weight[:4]
        alone.router.query.weight.copy_(twin.router.query.weight[:4])
        for name in ("up", "down"):
            getattr(alone.experts, name).copy_(getattr(twin.experts, name))
        alone.router.keys.copy_(twin.router.keys)
    results = [layer(x, context(2)).y_BSD for layer in (twin, alone)]
    torch.testing.assert_close(results[0], 2 * results[1], rtol=0, atol=1e-13)
    for result in results:
        (result * normal(*result.shape, seed=3)).sum().backward()
    for name in ("up", "down"):
        gradients = [getattr(layer.experts, name).grad for layer in (twin, alone)]
        torch.testing.assert_close(gradients[0], 2 * gradients[1], rtol=0, atol=1e-13)


def test_experts_that_nobody_picks_get_exactly_zero_gradients():
    layer, x = peer(num_experts=64, num_heads=1), normal(1, 4, 6)
    result = layer(x, context(1))
    result.y_BSD.square().sum().backward()
    picked = layer.experts.up.grad.any(dim=1)
    assert 3 <= picked.sum() <= 12
    assert not layer.experts.down.grad[~picked].any()


def test_permuting_the_sub_keys_with_their_rows_of_the_tables_changes_nothing():
    layer, x, n = peer(), normal(2, 5, 6), 4
    before = layer(x, context(2)).y_BSD
    first, second = [2, 0, 3, 1], [1, 3, 2, 0]
    with torch.no_grad():
        old, new = [], []
        for a in range(n):
            for b in range(n):
                old.append(row_of(layer, first[a] * n + second[b]))
                new.append(row_of(layer, a * n + b))
        for name in ("up", "down"):
            rows = getattr(layer.experts, name)
            rows[new] = rows[old]
        assert not torch.allclose(layer(x, context(2)).y_BSD, before)
        layer.router.keys.copy_(torch.stack([layer.router.keys[:, 0, first], layer.router.keys[:, 1, second]], dim=1))
    torch.testing.assert_close(layer(x, context(2)).y_BSD, before, rtol=0, atol=1e-13)


def test_in_evaluation_a_token_depends_on_nothing_but_itself():
    layer, x = peer(), normal(4, 5, 6)
    together = layer(x, context(4)).y_BSD
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = layer(x.flatten(0, 1)[order][None], context(1)).y_BSD[0]
    torch.testing.assert_close(shuffled, together.flatten(0, 1)[order], rtol=0, atol=1e-13)
    changed = x.clone()
    changed[:, 3:] = normal(4, 2, 6, seed=8)
    torch.testing.assert_close(layer(changed, context(4)).y_BSD[:, :3], together[:, :3], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("query_norm", "others_matter"), [("batch", True), ("layer", False), ("none", False)])
def test_in_training_batch_normed_queries_and_only_they_see_later_tokens(query_norm: str, others_matter: bool):
    layer, x = peer(query_norm=query_norm).train(), normal(2, 5, 6)
    changed = x.clone()
    changed[:, 4] += 1
    before, after = layer(x, context(2)).y_BSD[:, :4], layer(changed, context(2)).y_BSD[:, :4]
    assert torch.allclose(before, after, rtol=0, atol=1e-12) != others_matter


def test_training_follows_the_statistics_that_evaluation_uses():
    layer, x = peer().train(), normal(2, 40, 6)
    for _ in range(200):
        add_updates(layer, layer(x, context(2)).updates)
    trained = layer(x, context(2)).y_BSD
    torch.testing.assert_close(layer.eval()(x, context(2)).y_BSD, trained, rtol=0, atol=1e-6)


def test_equal_tokens_that_all_take_one_expert_get_equal_outputs_and_its_gradient_is_their_sum():
    layer = peer(num_heads=1, top_k=1, query_norm="none")
    x = normal(1, 1, 6).expand(4, 25, 6)
    y = layer(x, context(4)).y_BSD
    assert torch.equal(y, y[:1, :1].expand_as(y))
    y.sum().backward()
    (row,) = layer.experts.down.grad.any(dim=1).nonzero().flatten().tolist()
    hidden = F.gelu(layer.experts.up[row] @ x[0, 0]).item()
    torch.testing.assert_close(
        layer.experts.down.grad[row], torch.full((6,), 100 * hidden, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_the_last_expert_is_reached():
    layer, x = peer(num_heads=1, top_k=1, query_norm="none"), normal(1, 3, 6)
    with torch.no_grad():
        layer.router.query.weight.zero_()
        layer.router.query.weight[:, 0] = 1.0
        layer.router.keys.zero_()
        layer.router.keys[:, :, -1] = x[0, 0, 0].sign()
    reports = layer(x[:, :1], context(1)).reports
    assert reports["keys"].count_G.tolist() == [0, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("training", [False, True])
def test_a_rank_without_rows_takes_part_and_gives_none(training: bool):
    layer, x = peer().train(training), torch.zeros(0, 5, 6, dtype=torch.float64, requires_grad=True)
    result = layer(x, context([]))
    result.y_BSD.sum().backward()
    assert result.y_BSD.shape == (0, 5, 6)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in layer.parameters())


def test_under_bfloat16_autocast_choice_and_gates_stay_float32_and_so_do_all_gradients():
    layer, x = peer(dtype=torch.float32), normal(2, 6, 6, dtype=torch.float32)
    plain = layer(x, context(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = layer(x, context(2))
    assert narrow.y_BSD.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.y_BSD.float(), plain.y_BSD, rtol=0, atol=0.02 * plain.y_BSD.abs().max().item())
    for name, report in plain.reports.items():
        assert all(torch.equal(left, right) for left, right in zip(report, narrow.reports[name], strict=True))
    narrow.y_BSD.float().square().sum().backward()
    assert_float32_throughout(layer)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize(("scores", "low", "high"), [("softmax", 0.9, 1.15), ("sigmoid", 0.6, 1.1), ("relu", 0.4, 1.1)])
def test_the_first_outputs_have_variance_one_over_twice_the_depth(
    activation: str, scores: str, low: float, high: float
):
    sizes = {"num_experts": 64**2, "num_heads": 8, "top_k": 8, "key_dim": 32}
    config = PEERConfig.model_validate(sizes | {"scores": scores, "activation": activation})
    layer: Any = config.build(place("switchhead", d_model=64, num_layers=6))
    materialize(layer, seed=5)
    y = layer(normal(4, 64, 64, dtype=torch.float32), context(4)).y_BSD
    assert low < y.var().item() * 2 * 6 < high
    assert layer.experts.up.std().item() == pytest.approx(1 / 8, rel=0.01)


def shared_model(*, shared: bool) -> Any:
    section = {"num_experts": 16, "num_heads": 2, "top_k": 3, "key_dim": 4, "shared_experts": shared}
    return transformer(model_config(num_layers=3, feedforwards=["peer"], sigma_moe=None, dense_mlp=None, peer=section))


def test_one_pool_for_all_layers_is_held_once_and_queries_and_keys_are_each_layers_own():
    own, shared = shared_model(shared=False), shared_model(shared=True)
    assert count_parameters(own) - count_parameters(shared) == 2 * (2 * 16 * 8)
    pools = {id(block.feedforward.experts) for block in shared.layers}
    assert len(pools) == 1
    names = [parameter.name for parameter in logical_parameters(shared)]
    assert [name for name in names if name.endswith("experts.up")] == ["layers.0.feedforward.experts.up"]
    assert sum(name.endswith("router.keys") for name in names) == 3


def test_the_pool_gets_the_gradients_of_all_layers():
    shared, own = shared_model(shared=True), shared_model(shared=False)
    with torch.no_grad():
        theirs = dict(shared.named_parameters(remove_duplicate=False))
        for name, value in own.named_parameters():
            value.copy_(theirs[name])
    for model in (shared, own):
        model(tokens(2, 7), context(2, depth=-1)).logits_BSV.square().sum().backward()
    for name in ("up", "down"):
        parts = sum(getattr(block.feedforward.experts, name).grad for block in own.layers)
        found = getattr(shared.layers[0].feedforward.experts, name).grad
        torch.testing.assert_close(found, parts, rtol=0, atol=1e-12)


def test_neither_tables_nor_keys_decay_and_queries_do():
    layer = peer()
    decaying, others = (group["params"] for group in parameter_groups(layer, weight_decay=0.1))
    assert [id(p) for p in decaying] == [id(layer.router.query.weight)]
    assert {id(p) for p in others} >= {id(layer.router.keys), id(layer.experts.up), id(layer.experts.down)}
