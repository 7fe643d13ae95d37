"""Jobs of slurm/train_tiny.sh on the test cluster: submitted, watched by what they write, compared with a run without SLURM.

Called by the tests beside it.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from parallel.config import ProcessInfo
from tests.slurm.cluster import Cluster, JobState, wait_until
from train.config import Config
from train.run import run

ONE_EACH = "--ntasks-per-node=1"  # half the processes to start, where it is not about ranks of one node
ENDLESS = ("run.steps=100000",)
START_S = 180.0  # from submission to the first step: 12 s on an idle machine, ten times that on a busy one


class Jobs:
    """Those of one test. Each has the name of its run folder."""

    def __init__(self, cluster: Cluster, folder: Path, config: Config) -> None:
        self.cluster, self.folder, self.config = cluster, folder, config
        self.numbers: list[int] = []

    def submit(
        self, name: str, *options: str, script: str = "train_tiny.sh", sets: tuple[str, ...] = (), **env: str
    ) -> int:
        """options: of sbatch; sets: of the trainer; env: of the script, with PREFLIGHT=0 unless it says otherwise."""
        environ = {"CONFIG": str(self.folder / "tiny.yaml"), "RUN_DIR": str(self.folder / name), "PREFLIGHT": "0"}
        settings = [argument for value in sets for argument in ("--set", value)]
        # the environment in which the suite runs may have a rank or a port of its own
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
            assert variable not in os.environ
        if not self.cluster.has_namespaces:
            environ["MASTER_ADDR"] = "127.0.0.1"
        arguments = [
            f"--output={self.folder}/{name}-%j.out",
            f"--job-name={name}",
            *options,
            f"slurm/{script}",
            *settings,
        ]
        number = self.cluster.submit(*arguments, environ=environ | env)
        self.numbers.append(number)
        return number

    def blind_on(self, *nodes: str) -> dict[str, str]:
        """For `submit`: there the preflight is told of a folder of shards that is not there."""
        python = self.folder / "python"
        python.write_text(
            "#!/bin/bash\n"
            f'[[ "$*" == *preflight.py* && " {" ".join(nodes)} " == *" $SLURMD_NODENAME "* ]] && set -- "$@" --set data.shards=/gone\n'
            'exec .venv/bin/python "$@"\n'
        )
        python.chmod(0o755)
        (self.folder / "env.sh").write_text(f"PYTHON={python}\n")
        return {"ENV_SH": str(self.folder / "env.sh"), "PREFLIGHT": "1"}

    def wait(self, number: int | str, *, limit_s: float = START_S) -> JobState:
        return self.cluster.wait(number, limit_s=limit_s)

    def at_step(self, name: str, step: int, *, job: int | None = None, limit_s: float = START_S) -> None:
        """Waits until the run has done so many steps; fails with the log where its job (the last, unless named) is over before."""
        job = self.numbers[-1] if job is None else job

        def is_there() -> bool:
            assert not self.cluster.job(job).is_over, self.log(name)
            return len(self.losses(name)) >= step

        wait_until(is_there, limit_s=limit_s)

    def losses(self, name: str) -> list[float]:
        """By step. A last line that is being written is not one yet."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]

    def wait_for_start(self, name: str, *, restart: int, limit_s: float = START_S) -> None:
        """Of the training, after so many requeues."""
        wait_until(lambda: f"restart {restart}] start on" in self.log(name), limit_s=limit_s)

    def of_steps(self, steps: int) -> Config:
        """The config with another length."""
        return self.config.model_copy(update={"run": self.config.run.model_copy(update={"steps": steps})})

    def log(self, name: str) -> str:
        """Of all jobs of the name."""
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{name}-*.out")))

    def end(self) -> None:
        for number in self.numbers:
            with contextlib.suppress(RuntimeError):
                self.cluster.on("login", "scancel", str(number))
                self.cluster.wait(number, limit_s=60.0)


def train_here(config: Config, name: str, processes: int, per_node: int) -> str:
    """The same run on a worker of a warm pool, with as many processes on a node as SLURM would say."""
    rank = torch.distributed.get_rank()
    info = ProcessInfo(
        rank=rank,
        world_size=processes,
        local_rank=rank % per_node,
        local_world_size=per_node,
        master_addr="",
        master_port=0,
        launcher="test",
    )
    return run(moved(config, name), info)


def moved(config: Config, name: str) -> Config:
    folder = Path(config.run.dir).parent / name
    values: dict[str, Any] = {"run": config.run.model_copy(update={"dir": str(folder)})}
    return config.model_copy(update=values)
