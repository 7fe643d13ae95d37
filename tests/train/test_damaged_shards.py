"""Damaged shards over several starts of a run: the limit is the run's. One start: test_sources.py; reading: tests/data/test_damage.py."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from parallel.config import ProcessInfo
from tests.train.tiny_job import ALONE, records, tiny_config, write_shards
from train import checkpoint
from train.run import run

pytestmark = pytest.mark.usefixtures("torch_as_it_was")

CONSTANT = {"lr": 1.0e-2, "schedule": "constant"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards, and a run of 3 steps on them during which shard 3 was missing; it is back again."""
    write_shards(tmp_path / "shards", seed=1)
    lost = tmp_path / "shards" / "train" / "train-000003.tar"
    lost.rename(tmp_path / "lost.tar")
    go(tmp_path, steps=3, limit=1)
    (tmp_path / "lost.tar").rename(lost)
    return tmp_path


def go(folder: Path, *, steps: int, limit: int, shards: str = "shards", info: ProcessInfo = ALONE) -> None:
    data = {"shards": str(folder / shards / "train"), "heldout": str(folder / shards / "heldout")}
    data |= {"max_skipped_shards": limit}
    run(tiny_config(folder, run={"steps": steps, "log_every_steps": 1}, optim=CONSTANT, data=data), info)


def lose_another(folder: Path) -> None:
    (folder / "shards" / "train" / "train-000005.tar").unlink()


def named(folder: Path, step: int) -> list[list[str]]:
    return checkpoint.read_state(folder / "run" / "checkpoints" / f"step_{step:06d}").extra["damaged_shards"]


def test_what_an_earlier_start_passed_over_counts_against_the_limit(folder: Path):
    lose_another(folder)
    with pytest.raises(
        RuntimeError, match=r"allows 1 damaged shard, but 2 are: .*train-000003\.tar .*train-000005\.tar"
    ):
        go(folder, steps=4, limit=1)
    go(folder, steps=4, limit=2)
    assert [record["skipped_shards"] for record in records(folder)] == [1, 1, 1, 2]
    assert [(source, name) for source, name, _ in named(folder, 4)] == [
        ("", "train-000003.tar"),
        ("", "train-000005.tar"),
    ]


def go_on_two(folder: Path) -> str:
    """On a rank of a pool of two, each with shards of its own: what it raised."""
    rank = dist.get_rank()
    place = {"rank": rank, "world_size": 2, "local_rank": rank, "local_world_size": 2}
    with pytest.raises(RuntimeError) as caught:
        go(folder, steps=4, limit=1, shards=f"shards{rank}", info=ALONE.model_copy(update=place))
    return str(caught.value)


def test_damage_beyond_the_limit_on_one_rank_ends_all_with_its_sentence(folder: Path, pool: Any):
    for rank in range(2):
        shutil.copytree(folder / "shards", folder / f"shards{rank}")
    (folder / "shards1" / "train" / "train-000005.tar").unlink()
    first, second = pool(2).run(go_on_two, folder, timeout=100)
    assert first == second
    assert "allows 1 damaged shard, but 2 are: " in first
    assert first.endswith("or raise data.max_skipped_shards (rank 1 of 2)")


def test_a_shard_that_is_passed_over_in_two_starts_counts_once_wherever_it_lies(folder: Path, capsys: Any):
    (folder / "shards" / "train" / "train-000003.tar").unlink()
    (folder / "shards").rename(folder / "moved")
    capsys.readouterr()
    go(folder, steps=4, limit=1, shards="moved")
    assert records(folder)[-1]["skipped_shards"] == 1
    assert len(named(folder, 4)) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("passed over before this start, and counted: the shard") == 1
    assert "skipped: the shard" not in said, "it is named once"


def test_a_run_that_may_pass_over_nothing_any_more_goes_on_and_keeps_the_record(folder: Path):
    go(folder, steps=4, limit=0)
    assert "skipped_shards" not in records(folder)[-1]
    ((source, name, problem),) = named(folder, 4)
    assert (source, name) == ("", "train-000003.tar")
    assert "is missing" in problem


def test_a_checkpoint_from_before_damaged_shards_were_recorded_has_none(folder: Path, monkeypatch: pytest.MonkeyPatch):
    load = checkpoint.load

    def load_old(*arguments: Any, **options: Any) -> checkpoint.TrainState:
        state = load(*arguments, **options)
        del state.extra["damaged_shards"]
        return state

    monkeypatch.setattr(checkpoint, "load", load_old)
    lose_another(folder)
    go(folder, steps=4, limit=1)
    assert records(folder)[-1]["skipped_shards"] == 1
