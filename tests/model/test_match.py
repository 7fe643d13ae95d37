"""Solving one size of a model for a number of parameters."""

from typing import Any

import pytest

from model.match import find_key, solve, with_size

VOCABULARY = 50
DENSE = {
    "d_model": 16,
    "num_layers": 3,
    "mixers": ["attention"],
    "feedforwards": ["dense_mlp"],
    "attention": {"num_heads": 2, "head_dim": 4},
    "dense_mlp": {},
}
SIGMA = DENSE | {
    "feedforwards": ["sigma_moe"],
    "sigma_moe": {"num_experts": 6, "expert_dim": 5, "top_k": 3},
    "dense_mlp": None,
}
HSM = DENSE | {"mixers": ["hsm"], "attention": None, "hsm": {"variant": "multihead", "num_heads": 3, "num_shifts": 2}}
PEER = DENSE | {
    "feedforwards": ["peer"],
    "dense_mlp": None,
    "peer": {"num_heads": 2, "top_k": 3, "key_dim": 4, "query_norm": "none"},
}


def outside(width: int) -> int:
    """Parameters of embeddings and norms."""
    return 2 * VOCABULARY * width + VOCABULARY + 2 * width + 3 * 4 * width


def dense(hidden: int, *, width: int = 16) -> int:
    return outside(width) + 3 * (4 * width * 8 + 2 * width * hidden + hidden + width)


def sigma(*, experts: int = 6, dim: int = 5, width: int = 16) -> int:
    return outside(width) + 3 * (4 * width * 8 + 2 * width * experts * dim + experts * width)


def hsm(hidden: int, *, width: int) -> int:
    return outside(width) + 3 * (2 * 3 + 2 * width * hidden + hidden + width)


def peer(experts: int) -> int:
    keys = round(experts**0.5)
    return outside(16) + 3 * (4 * 16 * 8 + 2 * 16 * experts + 16 * 2 * 4 + keys * 4)


def found(values: dict[str, Any], *, by: str, parameters: int) -> Any:
    solution = solve(values, key=find_key(values, by=by), parameters=parameters, vocab_size=VOCABULARY)
    assert solution is not None
    return solution


SOLVED = [
    (DENSE, "feedforward_dim", range(1, 400), dense),
    (DENSE, "dense_mlp.hidden_dim", range(1, 400), dense),
    (SIGMA, "expert_dim", range(1, 80), lambda size: sigma(dim=size)),
    (SIGMA, "feedforward_dim", range(1, 80), lambda size: sigma(dim=size)),
    (SIGMA, "experts", range(3, 80), lambda size: sigma(experts=size)),
    (SIGMA, "num_experts", range(3, 80), lambda size: sigma(experts=size)),
    (SIGMA, "d_model", range(1, 80), lambda size: sigma(width=size)),
    (with_size(HSM, "dense_mlp.hidden_dim", 7), "d_model", range(3, 90, 3), lambda size: hsm(7, width=size)),
    (PEER, "experts", [n * n for n in range(2, 30)], peer),
]


@pytest.mark.parametrize(("values", "by", "sizes", "count"), SOLVED)
def test_the_size_is_the_nearest_of_all_that_the_model_takes(values: Any, by: str, sizes: Any, count: Any):
    counts = {size: count(size) for size in sizes}
    targets = [
        counts[sizes[4]],
        counts[sizes[4]] + 1,
        counts[sizes[5]] - 1,
        (counts[sizes[-3]] + counts[sizes[-2]]) // 2,
    ]
    for target in targets:
        nearest = min(sizes, key=lambda size: abs(counts[size] - target))
        assert found(values, by=by, parameters=target).size == nearest


def test_a_dense_width_comes_within_a_thousandth():
    for parameters in range(50_000, 60_000, 999):
        size = found(DENSE, by="feedforward_dim", parameters=parameters).size
        assert abs(dense(size) - parameters) <= 1e-3 * parameters


def test_the_sentence_tells_the_size_the_parameters_and_the_error():
    exact = found(DENSE, by="feedforward_dim", parameters=dense(300)).sentence
    assert f"model.dense_mlp.hidden_dim is 300: {dense(300):,} parameters, exactly the {dense(300):,}" in exact
    above = found(
        with_size(DENSE, "dense_mlp.hidden_dim", 7), by="feedforward_dim", parameters=dense(300) - 20
    ).sentence
    assert "is 300 instead of 7: " in above
    assert f"{20 / (dense(300) - 20):.3%} above" in above
    assert "finer" not in exact + above
    assert "below" in found(DENSE, by="feedforward_dim", parameters=dense(300) + 1).sentence


def test_a_coarse_size_names_a_finer_one():
    halfway = (sigma(experts=20) + sigma(experts=21)) // 2
    sentence = found(SIGMA, by="experts", parameters=halfway).sentence
    # steps: an expert 3 * (2 * 16 * 5 + 16), a rotated head 3 * 4 * 16 * 4, its width 3 * 4 * 16 * 2; d_model and expert_dim more
    assert f"; model.attention.head_dim is finer, in steps of {3 * 4 * 16 * 2 / sigma(experts=20):.3%}" in sentence
    assert "finer" not in found(SIGMA, by="experts", parameters=sigma(experts=20)).sentence


def test_the_finest_size_says_so():
    only = {
        "d_model": 16,
        "num_layers": 1,
        "mixers": ["hsm"],
        "feedforwards": ["dense_mlp"],
        "hsm": {},
        "dense_mlp": {},
    }
    fixed = 2 * VOCABULARY * 16 + VOCABULARY + 2 * 16 + 4 * 16 + 2 + 16
    sentence = found(only, by="feedforward_dim", parameters=fixed + 33 * 5 + 15).sentence
    assert "is 5: " in sentence
    assert sentence.endswith("no other size of this model is finer")


@pytest.mark.parametrize(
    ("values", "by", "parameters", "parts"),
    [
        (DENSE, "feedforward_dim", dense(1) - 1, [f"{dense(1) - 1:,}", f"hidden_dim 1 there are {dense(1):,}", "ask for more"]),
        (PEER, "experts", peer(4) - 1, [f"num_experts 4 there are {peer(4):,}"]),
        (DENSE | {"dense_mlp": {"hidden_dim": 8}}, "num_kv_heads", 10**6, ["can grow", "num_kv_heads", "1,000,000", f"{dense(8):,}"]),
        (DENSE, "hidden", 10**6, ["but it is hidden", "feedforward_dim", "d_model", "dense_mlp.hidden_dim"]),
        (DENSE, "sigma_moe.num_experts", 10**6, ["but it is sigma_moe.num_experts"]),
        (DENSE, "attention.attend_top_k", 10**6, ["but it is attention.attend_top_k"]),
        (SIGMA | {"feedforwards": ["sigma_moe", "dense_mlp"], "dense_mlp": {}}, "feedforward_dim", 10**6,
         ["one size", "sigma_moe.expert_dim or dense_mlp.hidden_dim"]),
    ],
)  # fmt: skip
def test_a_match_without_a_solution_is_an_error_with_the_remedy(
    values: Any, by: str, parameters: int, parts: list[str]
):
    with pytest.raises(ValueError) as caught:
        found(values, by=by, parameters=parameters)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_model_that_is_refused_at_every_size_has_no_size():
    refused = DENSE | {"attention": {"num_heads": 2, "head_dim": 2}}  # nothing to rotate
    assert solve(refused, key="dense_mlp.hidden_dim", parameters=10**6, vocab_size=VOCABULARY) is None


def test_short_names_mean_the_feedforward_before_the_mixer():
    both = SIGMA | {"mixers": ["switchhead"], "attention": None, "switchhead": {"num_experts": 2}}
    assert find_key(both, by="num_experts") == find_key(both, by="experts") == "sigma_moe.num_experts"
    assert find_key(both, by="head_dim") == "switchhead.head_dim"
    assert find_key(DENSE | {"mixers": ["switchhead"]}, by="experts") == "switchhead.num_experts"


def test_a_size_is_set_where_its_key_says_and_the_match_is_gone():
    values = {"match": 1, "d_model": 2, "peer": None}
    assert with_size(values, "peer.num_heads", 3) == {"d_model": 2, "peer": {"num_heads": 3}}
    assert with_size(values, "d_model", 3) == {"d_model": 3, "peer": None}
    assert values == {"match": 1, "d_model": 2, "peer": None}


def test_the_depth_of_layers_that_are_used_again_is_no_size():
    with pytest.raises(ValueError, match="but it is num_layers: write one of feedforward_dim, d_model, "):
        find_key(DENSE | {"num_layers": 4, "distinct_layers": 2}, by="num_layers")


def test_a_size_that_may_be_0_is_tried_at_0():
    without = sigma()
    solution = found(SIGMA, by="sigma_moe.num_shared_experts", parameters=without)
    assert solution.size == 0
