"""The cluster that the tests here share, and jobs of a tiny model on it.

Without SLURM on the machine every test here is skipped, loudly; .ci/run installs it and sets SWITCHYARD_NEEDS_SLURM, with which a skip is
a failure. Called by: pytest.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.slurm.cluster import Cluster, missing, open_cluster
from tests.slurm.jobs import Jobs
from tests.train.tiny_job import tiny_config, write_shards

INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three nodes: two to work and one to spare."""
    if absent := missing():
        sentence = f"the tests of the batch scripts need {', '.join(absent)}: {INSTALL}"
        if os.environ.get("SWITCHYARD_NEEDS_SLURM"):
            pytest.fail(sentence)
        pytest.skip(sentence)
    with open_cluster(num_nodes=3) as running:
        yield running


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path) -> Iterator[Jobs]:
    """A folder with shards and a config, from which jobs are submitted; those that are left are cancelled."""
    write_shards(tmp_path / "shards", seed=1)
    config = tiny_config(
        tmp_path,
        run={"steps": 100, "log_every_steps": 1},
        data={"global_batch_size": 8, "streams": 8},
        parallel={"zero_stage": 1},
        checkpoint={"every_steps": 40, "keep": 20},
    )
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    running = Jobs(cluster, tmp_path, config)
    yield running
    running.end()
