"""A run on several sources and on damaged shards: what its metrics and console tell, what a resume refuses."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from data.loader import TrainBatches
from tests.train.tiny_job import ALONE, records, tiny_config, write_shards
from train import checkpoint
from train import run as run_module
from train.engine import LocalMesh
from train.evaluate import main as evaluate_main
from train.run import run, share_damaged

pytestmark = pytest.mark.usefixtures("torch_as_it_was")

TOKENS = 8 * 6 * 20  # of a split of tests/train/tiny_job.py
ROWS_PER_EPOCH = (TOKENS - 1) // 8 // 4 * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", seed=1)
    write_shards(tmp_path / "more", seed=2)
    return tmp_path


def sources(folder: Path, **weights: float) -> dict[str, Any]:
    return {
        "shards": [
            {"name": name, "shards": str(folder / name / "train"), "weight": weight} for name, weight in weights.items()
        ]
    }


def tars(folder: Path) -> list[Path]:
    return sorted((folder / "shards" / "train").glob("*.tar"))


def test_epochs_and_shares_of_each_source_are_in_the_metrics(folder: Path):
    config = tiny_config(folder, data=sources(folder, shards=0.75, more=0.25), run={"steps": 6, "log_every_steps": 3})
    run(config, ALONE)
    for record, rows in zip(records(folder), (12, 24), strict=True):
        assert record["shares"] == {"shards": 0.75, "more": 0.25}
        assert record["epochs"] == pytest.approx(
            {"shards": 0.75 * rows / ROWS_PER_EPOCH, "more": 0.25 * rows / ROWS_PER_EPOCH}
        )


def test_a_run_on_a_path_tells_what_it_told_before(folder: Path):
    run(tiny_config(folder), ALONE)
    (record,) = records(folder)
    assert not {"epochs", "shares", "skipped_shards"} & record.keys()


def test_a_run_on_several_sources_resumes_with_the_losses_of_one_that_never_stopped(folder: Path):
    data, often = sources(folder, shards=0.5, more=0.5), {"log_every_steps": 1}
    run(
        tiny_config(folder, data=data, run={"steps": 6, "dir": str(folder / "whole" / "run"), **often}, optim=CONSTANT),
        ALONE,
    )
    for steps in (3, 6):
        run(tiny_config(folder, data=data, run={"steps": steps, **often}, optim=CONSTANT), ALONE)
    losses = [[record["loss"] for record in records(place)] for place in (folder, folder / "whole")]
    assert losses[0] == losses[1]


CONSTANT = {"lr": 1.0e-2, "schedule": "constant"}


@pytest.mark.parametrize("weights", [{"shards": 0.5, "more": 0.4}, {"shards": 0.5}])
def test_other_weights_or_sources_are_refused_on_resume(folder: Path, weights: Mapping[str, float]):
    run(tiny_config(folder, data=sources(folder, shards=0.5, more=0.5)), ALONE)
    with pytest.raises(ValueError, match=r"data\.shards\.more.* was .*0\.5.* and is (0\.4|None)"):
        run(tiny_config(folder, data=sources(folder, **weights), run={"steps": 5}), ALONE)


def test_the_shards_that_changed_are_named_on_resume(folder: Path):
    run(tiny_config(folder, data=sources(folder, shards=0.5, more=0.5)), ALONE)
    write_shards(folder / "more", seed=3)
    with pytest.raises(
        ValueError, match=r"must go on with the shards it began with.*source more: 8 altered: train-000000\.tar"
    ):
        run(tiny_config(folder, data=sources(folder, shards=0.5, more=0.5), run={"steps": 5}), ALONE)


def test_a_checkpoint_from_before_shards_were_listed_is_still_compared(folder: Path, monkeypatch: pytest.MonkeyPatch):
    read_state = checkpoint.read_state

    def old_state(path: Path) -> checkpoint.TrainState:
        state = read_state(path)
        del state.extra["data"]
        return state

    monkeypatch.setattr(checkpoint, "read_state", old_state)
    run(tiny_config(folder), ALONE)
    run(tiny_config(folder, run={"steps": 4}), ALONE)
    write_shards(folder / "shards", seed=3)
    with pytest.raises(ValueError, match=r"must go on with the shards it began with.* fingerprint"):
        run(tiny_config(folder, run={"steps": 5}), ALONE)


def test_moved_shards_are_gone_on_with_and_the_console_tells_from_where_to_where(folder, capsys):
    run(tiny_config(folder), ALONE)
    (folder / "shards").rename(folder / "moved")
    places = {"shards": str(folder / "moved" / "train"), "heldout": str(folder / "moved" / "heldout")}
    capsys.readouterr()
    run(tiny_config(folder, data=places, run={"steps": 4}), ALONE)
    said = " ".join(capsys.readouterr().out.split())
    for split in ("shards", "heldout"):
        old = folder / "shards" / ("train" if split == "shards" else split)
        assert f"data.{split} was {old} and is {places[split]}" in said
    assert "resumed from" in said


def test_other_shards_in_another_place_are_refused(folder):
    run(tiny_config(folder), ALONE)
    with pytest.raises(ValueError, match=r"must go on with the shards it began with.*/more/train changed"):
        run(tiny_config(folder, data={"shards": str(folder / "more" / "train")}, run={"steps": 4}), ALONE)


@pytest.mark.parametrize("is_moved", [False, True])
def test_held_out_shards_that_changed_are_named_on_resume(folder, is_moved):
    run(tiny_config(folder), ALONE)
    other = folder / "more" / "heldout"
    if not is_moved:
        shutil.rmtree(folder / "shards" / "heldout")
        other = other.rename(folder / "shards" / "heldout")
    with pytest.raises(
        ValueError, match=r"must keep the held-out shards it began with.* 8 altered: heldout-000000\.tar"
    ):
        run(tiny_config(folder, data={"heldout": str(other)}, run={"steps": 4}), ALONE)


def test_a_checkpoint_without_held_out_shards_is_gone_on_with_and_the_console_tells(folder, monkeypatch, capsys):
    read_state = checkpoint.read_state

    def old_state(path: Path) -> checkpoint.TrainState:
        state = read_state(path)
        del state.extra["heldout"], state.extra["heldout_fingerprint"]
        return state

    run(tiny_config(folder), ALONE)
    monkeypatch.setattr(checkpoint, "read_state", old_state)
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"data\.heldout may move only where the shards can be compared"):
        run(tiny_config(folder, data={"heldout": str(folder / "more" / "heldout")}, run={"steps": 4}), ALONE)
    run(tiny_config(folder, run={"steps": 4}), ALONE)
    assert "from before held-out shards were recorded" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("part", "key"), [(0, r"data\.shards"), (1, r"data\.heldout")])
def test_ranks_that_opened_different_shards_are_told_before_the_network_is_built(folder, monkeypatch, part, key):
    """One process whose mesh says what three would."""

    def gather(mesh: LocalMesh, value: list[str]) -> list[list[str]]:
        other = list(value)
        other[part] = "different"
        return [value, value, other]

    monkeypatch.setattr(LocalMesh, "all_gather_object", gather)
    monkeypatch.setattr(run_module, "build_model", lambda *_, **__: pytest.fail("the network was built"))
    with pytest.raises(
        RuntimeError,
        match=rf"{key} must hold the same .* fingerprint of rank 2 is different and that of rank 0 is \w{{64}}",
    ):
        run(tiny_config(folder), ALONE)


def test_a_run_on_fetched_shards_is_scored_on_them_and_on_local_ones(folder: Path, capsys: pytest.CaptureFixture[str]):
    remote = {"heldout": f"pipe:cat {folder}/shards/heldout/{{}}", "allow_pipe": True, "cache": str(folder / "cache")}
    run(tiny_config(folder, data=remote), ALONE)
    capsys.readouterr()
    command = ["--run", str(folder / "run"), "--device", "cpu"]
    assert evaluate_main(command) == 0
    assert evaluate_main([*command, "--heldout", str(folder / "shards" / "heldout")]) == 0
    one, other = capsys.readouterr().out.splitlines()
    assert one == other
    assert f"loss {records(folder)[-1]['heldout_loss']:.4f}" in one


def test_memory_needs_one_source(folder: Path):
    model = tiny_config(folder).model.model_dump()
    model["switchhead"] |= {"positions": "xl", "memory_blocks": 1}
    for weights in ({"shards": 1.0}, {"shards": 0.5, "more": 0.5}):
        data = sources(folder, **weights)
        if len(weights) == 1:
            tiny_config(folder, model=model, data=data)
            continue
        with pytest.raises(
            ValueError, match=r"needs one source, but memory_blocks of the mixers is 1 and data.shards lists 2"
        ):
            tiny_config(folder, model=model, data=data)


def test_a_missing_shard_is_passed_over_counted_and_named(folder: Path, capsys: pytest.CaptureFixture[str]):
    tars(folder)[3].unlink()
    with pytest.raises(RuntimeError, match=r"train-000003\.tar is missing"):
        run(tiny_config(folder), ALONE)
    run(tiny_config(folder, data={"max_skipped_shards": 1}, run={"log_every_steps": 1}), ALONE)
    assert [record["skipped_shards"] for record in records(folder)] == [1, 1, 1]
    said = capsys.readouterr().out.replace("\n", " ")
    assert said.count("skipped: the shard") == 1
    assert "train-000003.tar is missing" in said


def test_a_step_without_any_target_trains_on_nothing_and_goes_on(folder: Path):
    for path in tars(folder):
        path.unlink()
    run(tiny_config(folder, data={"max_skipped_shards": 8}, run={"log_every_steps": 1}), ALONE)
    for record in records(folder):
        assert record["loss"] == record["bits_per_byte"] == 0.0
        assert math.isfinite(record["grad_norm"])
        assert record["skipped_shards"] == 8
    assert math.isfinite(records(folder)[-1]["heldout_loss"])


def test_a_run_that_breaks_may_go_on_with_a_higher_limit(folder: Path):
    run(tiny_config(folder, optim=CONSTANT), ALONE)
    tars(folder)[3].unlink()
    with pytest.raises(RuntimeError, match=r"train-000003\.tar is missing"):
        run(tiny_config(folder, run={"steps": 5}, optim=CONSTANT), ALONE)
    run(tiny_config(folder, run={"steps": 5}, optim=CONSTANT, data={"max_skipped_shards": 1}), ALONE)
    assert [record["step"] for record in records(folder)] == [3, 5]


def test_the_limit_is_that_of_all_ranks_together():
    def job(*of_ranks: dict[str, str], said: list[str]) -> Any:
        world = SimpleNamespace(all_gather_object=lambda own: [own, *of_ranks])
        return cast(Any, SimpleNamespace(world=world, reporter=SimpleNamespace(say=said.append)))

    said: list[str] = []
    batches = TrainBatches(iter(()), damaged={"a": "a is gone"}, limit=1)
    told: set[str] = set()
    for _ in range(2):
        share_damaged(job({}, {"a": "a is gone"}, said=said), batches, told)
    assert said == ["skipped: a is gone"]
    with pytest.raises(RuntimeError, match="allows 1 damaged shard, but 2 are: a is gone; b is gone"):
        share_damaged(job({"b": "b is gone"}, said=said), batches, told)
    assert said == ["skipped: a is gone", "skipped: b is gone"]


def test_a_checkpoint_lists_the_shards(folder: Path):
    run(tiny_config(folder), ALONE)
    state = checkpoint.read_state(folder / "run" / "checkpoints" / "step_000003")
    (source,) = state.extra["data"]
    assert (source["name"], source["documents"], source["tokens"], source["num_shards"]) == ("", 48, TOKENS, 8)
    assert [name for name, *_ in source["shards"]] == [path.name for path in tars(folder)]
    assert len(json.dumps(source)) < 1000
