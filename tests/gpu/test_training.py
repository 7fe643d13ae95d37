"""Training on a GPU: the losses of a CPU, the same bits twice, a loss that falls; DeepSpeed's engine over NCCL with one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.gpu.cases import SMOKE
from tests.train.tiny_job import ALONE, records, tiny_config, write_shards
from train.checkpoint import latest, read_tensors
from train.config import Config
from train.engine import LocalMesh
from train.run import run

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
# Of float32; torch's grouped matmul takes bf16 alone on a GPU. In the interpreter a run takes 10 s.
BACKENDS = ("triton", "triton_dense", "reference")[2 if SMOKE else 0 :]
MODEL = {
    "switchhead": {"num_heads": 2, "head_dim": 8, "num_experts": 3, "top_k": 2},
    "sigma_moe": {"num_experts": 5, "expert_dim": 8, "top_k": 2},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_shards(folder / "shards", seed=2)
    return folder


def config(shards: Path, folder: Path, *, device: torch.device, **changes: Any) -> Config:
    """Three steps with dropout, so that its masks are compared too."""
    made = tiny_config(folder, run={"device": device.type, "log_every_steps": 1}, model=MODEL)
    data = {"shards": str(shards / "shards/train"), "heldout": str(shards / "shards/heldout")}
    values = made.model_dump(mode="json")
    for section, fields in ({"data": data} | changes).items():
        values[section] |= fields
    return Config.model_validate(values)


def trained(made: Config) -> dict[str, list[float]]:
    """Of a run in this process: by name, what every step told."""
    run(made, ALONE)
    return told(Path(made.run.dir).parent)


def told(folder: Path) -> dict[str, list[float]]:
    found = records(folder)
    return {name: [record[name] for record in found] for name in ("loss", "grad_norm")} | {
        "heldout": [found[-1]["heldout_loss"]]
    }


def weights(made: Config) -> dict[str, torch.Tensor]:
    newest = latest(Path(made.run.dir) / "checkpoints", mesh=LocalMesh(torch.device("cpu")))
    assert newest is not None
    return read_tensors(newest, kind="master")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_follows_that_of_a_cpu(device: torch.device, shards: Path, tmp_path: Path, backend: str):
    cpu = trained(config(shards, tmp_path / "cpu", device=torch.device("cpu"), model={"expert_backend": "reference"}))
    gpu = trained(config(shards, tmp_path / "gpu", device=device, model={"expert_backend": backend}))
    for name, values in cpu.items():
        assert gpu[name] == pytest.approx(values, rel=1e-4), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"][: 1 if SMOKE else 2])
def test_the_same_run_gives_the_same_bits(device: torch.device, shards: Path, tmp_path: Path, dtype: str):
    model = {"expert_backend": BACKENDS[0]}
    made = [
        config(shards, tmp_path / name, device=device, run={"dtype": dtype}, model=model)
        for name in ("first", "second")
    ]
    assert trained(made[0]) == trained(made[1])
    first, second = (weights(each) for each in made)
    assert first
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


def test_the_loss_falls(device: torch.device, shards: Path, tmp_path: Path):
    """The tokens are random, so what is learnt is the rows themselves: 48 documents again and again."""
    steps = 8 if SMOKE else 200
    run_fields = {"steps": steps, "dtype": "float32" if SMOKE else "bfloat16"}
    made = config(
        shards, tmp_path / "run", device=device, run=run_fields, optim={"lr": 3.0e-2},
        model={"expert_backend": BACKENDS[0], "dropout": 0.0},
    )  # fmt: skip
    losses = trained(made)["loss"]
    assert sum(losses[-3:]) / 3 < losses[0] - (0.02 if SMOKE else 0.3), losses


@pytest.mark.parametrize("stage", [0] if SMOKE else [1, 2])
def test_deepspeed_with_one_process_follows_the_plain_engine(
    device: torch.device, shards: Path, tmp_path: Path, stage: int
):
    """NCCL on a GPU. The tiny form is stage 0, which is the plain engine itself: importing DeepSpeed takes 5 s."""
    plain = trained(
        config(shards, tmp_path / "plain", device=torch.device("cpu"), model={"expert_backend": "reference"})
    )
    made = config(
        shards, tmp_path / "zero", device=device, model={"expert_backend": BACKENDS[0]},
        parallel={"zero_stage": stage},
    )  # fmt: skip
    file = tmp_path / "zero.yaml"
    file.write_text(yaml.safe_dump(json.loads(made.model_dump_json())))
    command = [sys.executable, str(ROOT / "launcher/main.py"), "--config", str(file)]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "TRITON_INTERPRET")
    }
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = told(tmp_path / "zero")
    for name, values in plain.items():
        assert found[name] == pytest.approx(values, rel=1e-4), name
