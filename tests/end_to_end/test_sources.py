"""Real processes on several sources, fetched and local, with a damaged shard: any number of them tells the same story."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import ConfigFile, records
from tests.end_to_end.warm import Job


@pytest.fixture
def mixed(config: ConfigFile, shards: Path, tmp_path: Path) -> ConfigFile:
    """Two sources, one behind a command; half of the first shard of the other is damaged."""
    copy = Path(shutil.copytree(shards / "heldout", tmp_path / "second"))
    tar = sorted(copy.glob("*.tar"))[0]
    content = bytearray(tar.read_bytes())
    first, last = len(content) // 4, 3 * len(content) // 4  # documents, and not the zeros at the end of a tar
    content[first:last] = bytes(last - first)
    tar.write_bytes(content)
    values: dict[str, Any] = config.values | {
        "data": config.values["data"]
        | {
            "shards": [
                {"name": "far", "shards": f"pipe:cat {shards}/train/{{}}", "weight": 0.5},
                {"name": "near", "shards": str(copy), "weight": 0.5},
            ],
            "allow_pipe": True,
            "cache": str(tmp_path / "cache"),
            "max_skipped_shards": 1,
        },
        "eval": {"every_steps": 100, "max_tokens": 200},
    }
    return ConfigFile(config.path, values)


def test_two_processes_and_one_with_readers_tell_the_same(mixed: ConfigFile, ranks: Callable[..., Job], tmp_path: Path):
    from launcher.main import main

    alone = tmp_path / "alone"
    settings = [f"run.dir={alone}", "parallel.zero_stage=0", "data.num_workers=2"]
    assert main(mixed.arguments(*settings)) == 0
    ranks(2, mixed.arguments()).finish()
    one, two = records(alone), records(mixed.folder)
    assert sorted(one) == sorted(two) == list(range(1, 13))
    for step in one:
        assert one[step]["loss"] == pytest.approx(two[step]["loss"], rel=1e-4)
        assert one[step]["bits_per_byte"] == pytest.approx(two[step]["bits_per_byte"], rel=1e-4)
        for name in ("epochs", "shares"):
            assert one[step][name] == two[step][name]
    assert one[12]["skipped_shards"] == two[12]["skipped_shards"] == 1
