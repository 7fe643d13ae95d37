"""A run from its first line to its last on a tiny job: what its end writes, what a resume refuses, what its seed draws."""

import math
from pathlib import Path

import pytest
from torch.nn.functional import cross_entropy

from data.loader import train_batches
from data.split import open_train
from data.tokenizer import bytes_tokenizer
from model.parameters import materialize
from model.transformer import Transformer
from tests.model.build import context
from tests.train.tiny_job import ALONE, another_tokenizer, records, tiny_config, write_shards
from train.config import Config
from train.dry_run import dry_run
from train.evaluate import Evaluation
from train.run import run

pytestmark = pytest.mark.usefixtures("torch_as_it_was")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", seed=1)
    return tmp_path


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


def test_the_last_step_is_measured_evaluated_and_saved_although_nothing_is_due(folder: Path):
    run(tiny_config(folder), ALONE)
    (record,) = records(folder)
    assert record["step"] == 3
    assert record["heldout_loss"] > 0
    assert checkpoints(folder) == ["latest", "step_000003"]


def test_steps_at_which_something_is_due_are_evaluated_and_saved_too(folder: Path):
    due = {"checkpoint": {"every_steps": 2}, "eval": {"every_steps": 2}}
    run(tiny_config(folder, run={"steps": 5}, **due), ALONE)
    assert [record["step"] for record in records(folder) if "heldout_loss" in record] == [2, 4, 5]
    assert checkpoints(folder) == ["latest", "step_000002", "step_000004", "step_000005"]


@pytest.mark.parametrize(
    ("tokenizer", "sentence"),
    [(None, "must go on with the shards it began with.* fingerprint"), (another_tokenizer(), "the same tokenizer")],
    ids=["other documents", "another tokenizer"],
)
def test_a_run_does_not_go_on_with_other_shards(folder: Path, tokenizer, sentence: str):
    run(tiny_config(folder), ALONE)
    before = records(folder)
    write_shards(folder / "shards", seed=2 if tokenizer is None else 1, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=sentence) as caught:
        run(tiny_config(folder, run={"steps": 5}), ALONE)
    if tokenizer is not None:
        assert tokenizer.tokenizer_id in str(caught.value)
        assert bytes_tokenizer().tokenizer_id in str(caught.value)
    assert records(folder) == before
    assert checkpoints(folder) == ["latest", "step_000003"]
    assert "steps: 3" in (folder / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("with_config_file", [True, False], ids=["config.yaml", "checkpoint alone"])
@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("d_model", 16, "model.d_model was 8 and is 16"),
        ("num_layers", 2, "model.num_layers was 1 and is 2"),
        ("switchhead.head_dim", 8, "model.switchhead.head_dim was 4 and is 8"),
        ("switchhead.num_experts", 4, "model.switchhead.num_experts was 3 and is 4"),
        ("sigma_moe.num_experts", 6, "model.sigma_moe.num_experts was 5 and is 6"),
        ("sigma_moe.expert_dim", 8, "model.sigma_moe.expert_dim was 4 and is 8"),
    ],
)
def test_a_run_does_not_go_on_with_another_size(
    folder: Path, key: str, value: int, sentence: str, with_config_file: bool
):
    """config.yaml is looked at first; where it is gone the checkpoint's own config decides."""
    quick = {"expert_backend": "reference"}  # nothing is measured before the first step
    run(tiny_config(folder, model=quick), ALONE)
    if not with_config_file:
        (folder / "run" / "config.yaml").unlink()
    model = tiny_config(folder, model=quick).model.model_dump()
    section, _, name = key.rpartition(".")
    (model[section] if section else model)[name] = value
    files = {path: path.read_bytes() for path in (folder / "run" / "checkpoints").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=sentence):
        run(tiny_config(folder, run={"steps": 5}, model=model), ALONE)
    assert {path: path.read_bytes() for path in files} == files


def test_a_run_goes_on_with_the_shards_written_anew(folder: Path):
    """What the test above refuses is refused for its documents, not for being written again."""
    run(tiny_config(folder), ALONE)
    write_shards(folder / "shards", seed=1)
    run(tiny_config(folder, run={"steps": 5}), ALONE)
    assert [record["step"] for record in records(folder)] == [3, 5]


def loss_of_the_first_step(config: Config, *, seed: int) -> float:
    """Weights, rows and dropout masks of `seed` in a plain forward pass."""
    split = open_train(config.data)
    model = Transformer(config.model, vocab_size=split.vocab_size, backend="reference")
    materialize(model, seed=seed)
    batch = next(train_batches(config.data, split, seed=seed, accumulation_steps=1, rank=0, num_ranks=1, position=0))
    facts = context(batch.positions_B.tolist(), documents_BS=batch.document_ids_BS, seed=seed, depth=-1)
    logits_BSV = model.train()(batch.tokens_BS, facts).logits_BSV
    return cross_entropy(logits_BSV.flatten(0, 1), batch.targets_BS.flatten()).item()


@pytest.mark.parametrize("zero_stage", [0, 1], ids=["PlainEngine", "ZeroEngine"])
def test_the_seed_of_the_run_draws_weights_rows_and_dropout(folder: Path, pool, zero_stage: int):
    for seed in (5, 6):
        fields = {"dir": str(folder / f"seed_{seed}" / "run"), "seed": seed, "steps": 1, "log_every_steps": 1}
        config = tiny_config(folder, run=fields, parallel={"zero_stage": zero_stage})
        pool(1).run(run, config, ALONE)  # not here: importing DeepSpeed takes seconds
        (record,) = records(folder / f"seed_{seed}")
        assert record["loss"] == pytest.approx(loss_of_the_first_step(config, seed=seed), rel=1e-6)


def test_what_a_default_was_turned_into_is_said_by_a_run_and_by_a_dry_run(folder: Path, capsys):
    config = tiny_config(folder)
    odd = config.model.model_dump()
    odd["switchhead"]["head_dim"] = 6  # half of it is 3 channels
    config = tiny_config(folder, model=odd)
    sentence = "rotary_dim is 2: half of head_dim 6 is 3, rounded down to even"
    dry_run(config, ALONE)
    assert f"# {sentence}" in capsys.readouterr().out
    run(config, ALONE)
    assert sentence in capsys.readouterr().out


def test_a_collapsed_router_is_named(folder: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("model.router.COLLAPSED", 2.0)  # then every router is
    run(tiny_config(folder), ALONE)
    said = capsys.readouterr().out
    assert "step 3: the load must be spread over the experts" in said
    assert "layers.0.feedforward.mlp" in said


def test_a_held_out_loss_that_is_not_finite_ends_the_run_with_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch):
    broken = Evaluation(loss=math.nan, bits_per_byte=math.nan, num_targets=1, num_bytes=1)
    monkeypatch.setattr("train.measure.evaluate", lambda *_, **__: broken)
    with pytest.raises(RuntimeError, match="the held-out loss must be finite, but after step 3 it is nan"):
        run(tiny_config(folder), ALONE)


def test_the_done_marker_is_there_exactly_while_the_run_has_reached_its_steps(folder: Path):
    done = folder / "run" / "done"
    run(tiny_config(folder, run={"steps": 2}), ALONE)
    assert done.read_text() == "step 2\n"
    seen: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.run.save", lambda job, at: seen.append(done.exists()))
        run(tiny_config(folder, run={"steps": 3}), ALONE)
    assert seen == [False]
    assert done.read_text() == "step 3\n"
