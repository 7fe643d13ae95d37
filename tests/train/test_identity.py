"""By what the processes of a run know each other: what nodes may have otherwise is not in it, and all else is."""

from pathlib import Path
from typing import Any

import pytest

from tests.train.tiny_job import tiny_config
from train.config import Config
from train.identity import in_common


def changed(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(tmp_path)


def test_a_node_may_reach_its_folders_by_other_ways_and_wait_otherwise(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    here = Path(config.run.dir)
    here.mkdir(exist_ok=True)
    (tmp_path / "link").symlink_to(here)
    monkeypatch.chdir(here.parent)
    for folder in (f"{here}/", here.name, str(tmp_path / "link"), f"/mnt/other/{here.name}"):
        assert in_common(changed(config, "run", dir=folder)) == in_common(config)
    ours = changed(config, "data", shards="/scratch/node7/train", heldout="/scratch/node7/heldout", num_workers=3)
    ours = changed(changed(ours, "parallel", meeting_s=9.0, watchdog_s=99.0), "run", init_from="/scratch/node7/model")
    assert in_common(ours) == in_common(config)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("run", "dir", "elsewhere"),
        ("run", "seed", 77),
        ("optim", "lr", 0.125),
        ("parallel", "zero_stage", 2),
        ("parallel", "chunks", 4),
        ("model", "recompute", True),
        ("checkpoint", "every_steps", 7),
        ("data", "sequence_length", 24),
    ],
)
def test_what_must_be_alike_for_the_same_collectives_or_results_is_in_it(
    config: Config, section: str, name: str, value: Any
):
    there, here = in_common(changed(config, section, **{name: value})), in_common(config)
    key = f"{section}.{name}"
    assert (there[key], {**there, key: here[key]}) == (str(value), here)
