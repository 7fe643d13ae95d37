"""The cluster that the tests here share, and jobs of a tiny model on it.

Without SLURM on the machine every test here is skipped, loudly; .ci/run installs it and sets SWITCHYARD_NEEDS_SLURM, with which a skip is
a failure. Called by: pytest.
"""

import contextlib
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
    """Four nodes: two to work and two to spare."""
    if absent := missing():
        refuse(f"the tests of the batch scripts need {', '.join(absent)}: {INSTALL}")
    with open_cluster(num_nodes=4) as running:
        yield running


@pytest.fixture
def namespaces(cluster: Cluster) -> None:
    """Nodes that can lose their power or their network."""
    if not cluster.has_namespaces:
        refuse("this test needs root: each node has to be a network namespace of its own")


@pytest.fixture
def slow_cluster(cluster: Cluster, namespaces: None) -> Iterator[Cluster]:
    """Another, which takes as long as most sites' do to see that a node is dead."""
    with open_cluster(num_nodes=3, slurmd_timeout_s=300) as running:
        yield running


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(cluster, tmp_path) as running:
        yield running


@pytest.fixture
def slow_jobs(slow_cluster: Cluster, tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(slow_cluster, tmp_path) as running:
        yield running


def refuse(sentence: str) -> None:
    """Skips the test; fails where a skip must not be."""
    if os.environ.get("SWITCHYARD_NEEDS_SLURM"):
        pytest.fail(sentence)
    pytest.skip(sentence)


@contextlib.contextmanager
def open_jobs(cluster: Cluster, folder: Path) -> Iterator[Jobs]:
    """A folder with shards and a config, from which jobs are submitted; those that are left are cancelled."""
    write_shards(folder / "shards", seed=1)
    config = tiny_config(
        folder,
        run={"steps": 100, "log_every_steps": 1},
        data={"global_batch_size": 8, "streams": 8},
        parallel={"zero_stage": 1},
        checkpoint={"every_steps": 40, "keep": 20},
    )
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    running = Jobs(cluster, folder, config)
    yield running
    running.end()
