"""What a resumed run may change in its config, and how a refusal reads."""

from pathlib import Path
from typing import Any

import pytest

from train.config import check_resume, differences, load_config

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_cpu.yaml"


def test_differences_name_every_leaf_and_both_values() -> None:
    old = {"a": {"b": 1, "c": {"d": [1, 2]}, "gone": 5}, "e": 3}
    new = {"a": {"b": 2, "c": {"d": [1, 3]}, "new": 6}, "e": 3}
    found = [(change.key, change.old, change.new) for change in differences(old, new)]
    assert found == [("a.b", 1, 2), ("a.c.d", [1, 2], [1, 3]), ("a.new", None, 6), ("a.gone", 5, None)]
    assert differences(old, old) == []


def saved(*overrides: str) -> dict[str, Any]:
    return load_config(TINY, overrides).model_dump(mode="json")


@pytest.mark.parametrize(
    "override",
    [
        "parallel.ep_size=1",
        "parallel.zero_stage=2",
        "parallel.node_size=1",
        "data.shards=other",
        "data.heldout=other",
        "data.num_workers=2",
        "data.max_skipped_shards=2",
        "data.allow_pipe=true",
        "run.dir=moved",
        "run.device=cpu",
        "run.log_every_steps=1",
        "run.steps=401",
        "checkpoint.keep=9",
        "checkpoint.every_steps=9",
        "checkpoint.asynchronous=false",
        "checkpoint.on_failure=stop",
        "eval.every_steps=9",
        "watch.on_nonfinite=skip",
        "model.recompute=true",
        "model.expert_backend=loop",
    ],
)
def test_resume_may_change_layout_and_bookkeeping_and_says_so(override: str) -> None:
    key, _, value = override.partition("=")
    (line,) = check_resume(saved(), load_config(TINY, [override]))
    assert key in line
    assert line.split(" and is ")[1].lower().startswith(value)


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=2",
        "run.dtype=bfloat16",
        "data.sequence_length=128",
        "data.global_batch_size=32",
        "data.streams=8",
        "data.document_mask=false",
        "model.d_model=64",
        "model.num_layers=3",
        "model.dropout=0.1",
        "model.switchhead.num_experts=5",
        "model.sigma_moe.entropy_weight=0.5",
        "optim.optimizer=sgd",
        "optim.lr=0.5",
        "optim.warmup_steps=51",
        "optim.accumulation_steps=2",
        "optim.clip_grad_norm=0.0",
        "eval.max_tokens=100",
        "run.steps=399",
    ],
)
def test_resume_refuses_everything_else_with_both_values(override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(ValueError) as caught:
        check_resume(saved(), load_config(TINY, [override]))
    message = str(caught.value)
    assert f"{key} was " in message
    assert f" and is {value}" in message.replace("False", "false")
    assert "another run.dir" in message


def test_resume_names_every_refused_key_and_none_of_the_allowed() -> None:
    with pytest.raises(ValueError) as caught:
        check_resume(saved(), load_config(TINY, ["optim.lr=0.5", "run.seed=2", "checkpoint.keep=1", "run.steps=300"]))
    message = str(caught.value)
    for part in (
        "optim.lr was 0.001 and is 0.5",
        "run.seed was 1 and is 2",
        "run.steps was 400 and is 300",
        "only grow",
    ):
        assert part in message
    assert "checkpoint.keep" not in message


def mixture(**weights: float) -> str:
    return f"data.shards=[{', '.join(f'{{name: {n}, shards: {n}, weight: {w}}}' for n, w in weights.items())}]"


@pytest.mark.parametrize(
    ("before", "after", "sentences"),
    [
        (mixture(web=0.7, code=0.3), mixture(web=0.7, code=0.4), ["data.shards.code.weight was 0.3 and is 0.4"]),
        (
            mixture(web=0.7, code=0.3),
            mixture(web=0.7, code=0.3, books=0.1),
            ["data.shards.books was None and is {'name': 'books', 'shards': 'books', 'weight': 0.1}"],
        ),
        (mixture(web=0.7, code=0.3), mixture(web=0.7), ["data.shards.code was {'name': 'code'", "and is None"]),
        (
            mixture(web=0.7, code=0.3),
            mixture(code=0.3, web=0.7),
            ["data.shards (order) was ['web', 'code'] and is ['code', 'web']"],
        ),
        ("data.shards=web", mixture(web=1.0), ["data.shards was web and is"]),
        (
            mixture(web=0.7),
            "data.shards=[{name: code, shards: web, weight: 0.7}]",
            ["data.shards.code was None", "data.shards.web was {"],
        ),
    ],
)
def test_resume_refuses_other_sources_and_weights_with_both_values(
    before: str, after: str, sentences: list[str]
) -> None:
    assert check_resume(saved(before), load_config(TINY, [before])) == []
    with pytest.raises(ValueError) as caught:
        check_resume(saved(before), load_config(TINY, [after]))
    for sentence in sentences:
        assert sentence in str(caught.value)


def test_the_place_of_a_source_may_change() -> None:
    moved = "data.shards=[{name: web.shards, shards: /moved, weight: 0.7}]"
    changes = check_resume(
        saved("data.shards=[{name: web.shards, shards: /old, weight: 0.7}]"), load_config(TINY, [moved])
    )
    assert changes == ["data.shards.web.shards.shards was /old and is /moved"]


def test_another_node_may_have_another_cache() -> None:
    remote = ["data.shards=http://host/x", "data.cache=/one"]
    changes = check_resume(saved(*remote), load_config(TINY, [*remote, "data.cache=/two", "data.cache_gb=5.0"]))
    assert changes == ["data.cache was /one and is /two", "data.cache_gb was 100.0 and is 5.0"]


def test_resume_of_the_same_config_says_nothing() -> None:
    assert check_resume(saved(), load_config(TINY)) == []


def test_a_field_that_is_newer_than_the_run_counts_as_its_default() -> None:
    old = saved()
    del old["optim"]["eps"]  # as if the run were older than optim.eps
    assert check_resume(old, load_config(TINY)) == []
    with pytest.raises(ValueError, match=r"optim\.eps was 1e-08 and is 1e-06"):
        check_resume(old, load_config(TINY, ["optim.eps=1.0e-6"]))


def test_longer_runs_are_told_that_the_schedule_changes() -> None:
    (line,) = check_resume(saved(), load_config(TINY, ["run.steps=800"]))
    assert "400" in line
    assert "800" in line
    assert "schedule is recomputed" in line
