"""Promise 1: any number of processes, ep_size and ZeRO stage gives what one process gives on the same rows."""

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from tests.parallel.two_steps import (
    DENSE,
    STEPS,
    Case,
    Seen,
    gradients_of,
    many_processes,
    one_process,
    weights_of,
)

LAYOUTS = [(2, 1), (2, 2), (4, 2), (4, 4)]
reference = cache(one_process)


def assert_same(seen: list[Seen], expected: Seen, *, rtol: float, atol: float) -> None:
    for rank in seen:
        np.testing.assert_allclose(
            rank.scalars, expected.scalars, rtol=rtol, err_msg="loss, auxiliary loss, gradient norm"
        )
    compared = [
        (f"gradient at step {i}", gradients_of(seen, step=i), gradients_of([expected], step=i)) for i in range(STEPS)
    ]
    for what, found, wanted in [*compared, ("weight", weights_of(seen), weights_of([expected]))]:
        assert found.keys() == wanted.keys()
        for name in wanted:
            scale = float(np.abs(wanted[name]).max())
            np.testing.assert_allclose(
                found[name], wanted[name], rtol=rtol, atol=atol * scale, err_msg=f"{what} of {name}"
            )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(("processes", "ep_size"), LAYOUTS)
def test_float32_layouts_equal_one_process(pool, processes, ep_size, stage, accumulation_steps, optimizer):
    case = Case(ep_size=ep_size, stage=stage, accumulation_steps=accumulation_steps, optimizer=optimizer)
    expected = reference(Case(accumulation_steps=accumulation_steps, optimizer=optimizer))
    assert expected.scalars[0][2] > case.clip_grad_norm, "clipping must act in this test"
    assert_same(pool(processes).run(many_processes, case), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(("processes", "ep_size"), LAYOUTS)
def test_bfloat16_layouts_equal_one_process_at_its_precision(pool, processes, ep_size, stage, optimizer):
    """A layout must be about as near to the float32 result as bf16 on one process is.

    About, because what is summed on one rank is rounded before it travels: one rounding more than on one process.

    Every expert is chosen here: a rounding could flip a near-tie between two, and then a layout is right with other numbers.
    """
    exact = Case(optimizer=optimizer).with_model(switchhead={"top_k": 3}, sigma_moe={"top_k": 5})
    truth, alone = reference(exact), reference(replace(exact, dtype="bfloat16"))
    seen = pool(processes).run(many_processes, replace(exact, dtype="bfloat16", ep_size=ep_size, stage=stage))
    for rank in seen:
        np.testing.assert_allclose(rank.scalars[0], truth.scalars[0], rtol=4e-3)
        np.testing.assert_allclose(rank.scalars[1], truth.scalars[1], rtol=3e-2)  # AdamW's first update is sign-like
    found, alone_at_0 = gradients_of(seen, step=0), gradients_of([alone], step=0)
    big = "output.weight"
    exact_big = gradients_of([truth], step=0)[big]
    error, usual = np.linalg.norm(found[big] - exact_big), np.linalg.norm(alone_at_0[big] - exact_big)
    assert error > 0.5 * usual, "bf16 must really be on: float32 would be nearer"
    for name, wanted in gradients_of([truth], step=0).items():
        usual = np.linalg.norm(alone_at_0[name] - wanted)
        assert usual < 0.1 * np.linalg.norm(wanted), "bf16 itself must stay near float32 in this test"
    assert_about_as_near(found, alone_at_0, gradients_of([truth], step=0), mean=1.3, each=2)
    if optimizer == "sgd":
        assert_about_as_near(weights_of(seen), weights_of([alone]), weights_of([truth]), mean=1.5, each=3)


def assert_about_as_near(
    found: dict[str, np.ndarray],
    alone: dict[str, np.ndarray],
    truth: dict[str, np.ndarray],
    *,
    mean: float,
    each: float,
) -> None:
    """Errors in units of one process': a single tensor's depends on which hidden activations near zero change sign, the mean does not."""
    ratios = {
        name: np.linalg.norm(found[name] - wanted) / np.linalg.norm(alone[name] - wanted)
        for name, wanted in truth.items()
    }
    assert np.mean(list(ratios.values())) < mean, ratios
    assert max(ratios.values()) < each, ratios


PKM = {"num_keys": 3, "num_heads": 2, "top_k": 4}  # 9 values: one row of padding on 2 ranks
PEER = {"num_experts": 9, "num_heads": 2, "top_k": 3, "key_dim": 6}

VARIANTS = {
    "without clipping": Case(clip_grad_norm=0.0),
    "dropout and expert dropout": Case().with_model(
        dropout=0.2, switchhead={"expert_dropout": 0.3}, sigma_moe={"expert_dropout": 0.3}
    ),
    "recompute": Case(accumulation_steps=2).with_model(recompute=True, dropout=0.2),
    "hybrid": Case().with_model(
        mixers=("switchhead", "attention"), attention={"num_heads": 4, "head_dim": 8}, num_layers=4
    ),
    "dense twin": Case(model=DENSE),
    "relative positions and memory": Case(accumulation_steps=2).with_model(
        switchhead={"positions": "xl", "memory_blocks": 1}
    ),
    "all projections": Case().with_model(
        switchhead={"experts": ("q", "k", "v", "o"), "routers": "separate", "entropy_weight": 1.0}
    ),
    "shared router": Case().with_model(switchhead={"routers": "shared", "gates": "softmax"}),
    "one expert": Case().with_model(switchhead={"num_experts": 1, "top_k": 1, "single_expert": "gate_both"}),
    "no attention experts": Case().with_model(
        switchhead={"num_experts": 1, "top_k": 1, "single_expert": "gate_output"}
    ),
    "top-k attention": Case().with_model(switchhead={"attend_top_k": 3, "attend_chunk": 5, "attention_dropout": 0.2}),
    "shared over the depth": Case(accumulation_steps=2).with_model(
        num_layers=4, distinct_layers=2, norm="peri", switchhead={"entropy_weight": 1.0, "entropy_per_head": True}
    ),
    "softmax router": Case().with_model(sigma_moe={"router": "softmax", "entropy_over": "sequence"}),
    "softmax after top-k, shared experts, hidden dropout": Case().with_model(
        sigma_moe={"router": "softmax_after", "num_shared_experts": 2, "hidden_dropout": 0.3}
    ),
    "switch": Case().with_model(sigma_moe={"router": "switch", "top_k": 1, "load_weight": 1.0}),
    "sinkhorn": Case().with_model(sigma_moe={"router": "sinkhorn", "expert_dropout": 0.3}),
    "noisy router": Case().with_model(sigma_moe={"router": "noisy"}),
    "average keys": Case().with_model(sigma_moe={"router": "average_keys", "load_weight": 1.0}),
    "recurrent router": Case().with_model(
        sigma_moe={"router": "recurrent", "router_dim": 10, "load_weight": 1.0}, recompute=True
    ),
    "balancing bias": Case(accumulation_steps=2).with_model(
        sigma_moe={"balance": "bias", "bias_update_speed": 0.2, "entropy_weight": 0.0},
        switchhead={"entropy_weight": 1.0},
    ),
    "shift mixing": Case().with_model(mixers=("hsm", "switchhead"), hsm={"variant": "double_gate"}),
    "product-key memory": Case().with_model(feedforwards=("pkm",), sigma_moe=None, pkm=PKM),
    "product-key memory, gated and shared": Case().with_model(
        feedforwards=("pkm",),
        sigma_moe=None,
        pkm=PKM | {"scores": "relu", "key_dim": 6, "query_norm": "batch", "gated": True, "shared_values": True},
    ),
    "PEER": Case(accumulation_steps=2).with_model(feedforwards=("peer",), sigma_moe=None, peer=PEER, recompute=True),
    "PEER, sigmoid, one pool": Case().with_model(
        feedforwards=("peer",),
        sigma_moe=None,
        peer=PEER | {"scores": "sigmoid", "shared_keys": False, "query_norm": "layer", "shared_experts": True},
    ),
    "PEER, ReLU": Case().with_model(
        feedforwards=("peer",),
        sigma_moe=None,
        peer=PEER | {"scores": "relu", "query_norm": "none", "activation": "relu"},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("processes", "stage"), [(4, 0), (4, 2), (1, 1)])
def test_other_models_and_settings_equal_one_process(pool, processes, stage, variant):
    case = VARIANTS[variant]
    ep_size = 2 if processes > 1 and case.model.smallest_bank() else 1
    seen = pool(processes).run(many_processes, replace(case, ep_size=ep_size, stage=stage))
    assert_same(seen, reference(case), rtol=1e-4, atol=1e-5)


ADVERSARIAL = {
    # The last expert of each head has everything: of 4 ranks of an expert group the first and the last get no row of any layer.
    "one_expert": Case(routing="one_expert").with_model(switchhead={"top_k": 1}, sigma_moe={"top_k": 1}),
    # Without the entropy's gradient, which at equal scores is rounding noise: experts that nobody chose stay equal.
    "ties": Case(routing="ties").with_model(sigma_moe={"entropy_weight": 0.0}),
}


@pytest.mark.parametrize("routing", ADVERSARIAL)
@pytest.mark.parametrize(("ep_size", "stage"), [(2, 2), (4, 1)])
def test_one_expert_for_all_tokens_and_equal_scores_equal_one_process(pool, ep_size, stage, routing):
    case = ADVERSARIAL[routing]
    expected = reference(case)
    for name, load_G in expected.loads[0].items():
        for load_E in np.split(load_G, 1 if name.endswith("mlp") else 2):
            chosen = [0, 1] if routing == "ties" else [len(load_E) - 1]
            assert np.flatnonzero(load_E).tolist() == chosen, f"the experts that {name} must choose for all tokens"
    seen = pool(4).run(many_processes, replace(case, ep_size=ep_size, stage=stage))
    assert_same(seen, expected, rtol=1e-4, atol=1e-5)
    for step in range(STEPS):
        for name, load_G in expected.loads[step].items():
            total_G = sum(rank.loads[step][name] for rank in seen)
            np.testing.assert_array_equal(total_G, load_G, err_msg=f"copies per expert of {name} at step {step}")


def off_by_a_thousandth(seen: Seen, what: str, index: int) -> Seen:
    """One figure of step 1, the gradient of one parameter at step 1, or one parameter's weights."""
    changed = copy.deepcopy(seen)
    if what == "scalars":
        figures = np.array(seen.scalars)
        figures[1, index] *= 1.001
        return replace(changed, scalars=figures.tolist())
    pieces = changed.gradients[1] if what == "gradients" else changed.weights
    np.multiply(pieces[index].values, 1.001, out=pieces[index].values)
    return changed


def test_the_comparison_notices_a_thousandth_in_any_figure_gradient_or_weight():
    expected = reference(Case())
    assert_same([expected], expected, rtol=1e-4, atol=1e-5)
    for what, count in (("scalars", 3), ("gradients", len(expected.weights)), ("weights", len(expected.weights))):
        for index in range(count):
            with pytest.raises(AssertionError):
                assert_same([off_by_a_thousandth(expected, what, index)], expected, rtol=1e-4, atol=1e-5)
    assert all(scalars[1] < 0 for scalars in expected.scalars), "the auxiliary loss must take part"
