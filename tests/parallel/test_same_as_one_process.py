"""Promise 1: any number of processes, ep_size and ZeRO stage gives what one process gives on the same rows."""

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
    """A layout must be as near to the float32 result as bf16 on one process is.

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
        error, usual = np.linalg.norm(found[name] - wanted), np.linalg.norm(alone_at_0[name] - wanted)
        assert error < 1.3 * usual, f"gradient of {name}: off by {error}, one process by {usual}"
        assert usual < 0.1 * np.linalg.norm(wanted), "bf16 itself must stay near float32 in this test"
    if optimizer == "sgd":
        found, alone_weights = weights_of(seen), weights_of([alone])
        for name, wanted in weights_of([truth]).items():
            error, usual = np.linalg.norm(found[name] - wanted), np.linalg.norm(alone_weights[name] - wanted)
            assert error < 1.5 * usual, f"weight of {name}: off by {error}, one process by {usual}"


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
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("processes", "stage"), [(4, 0), (4, 2), (1, 1)])
def test_other_models_and_settings_equal_one_process(pool, processes, stage, variant):
    case = VARIANTS[variant]
    ep_size = 2 if processes > 1 and case.model.smallest_bank() else 1
    seen = pool(processes).run(many_processes, replace(case, ep_size=ep_size, stage=stage))
    assert_same(seen, reference(case), rtol=1e-4, atol=1e-5)


def test_the_reference_can_tell_a_wrong_scale():
    """The comparison itself: twice the learning rate's effect, or a norm that counts an expert twice, must not pass."""
    expected = reference(Case())
    with pytest.raises(AssertionError, match="gradient norm"):
        assert_same([reference(Case(accumulation_steps=2))], expected, rtol=1e-4, atol=1e-5)
    assert all(scalars[1] < 0 for scalars in expected.scalars), "the auxiliary loss must take part"
