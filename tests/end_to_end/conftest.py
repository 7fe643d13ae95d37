"""What the end-to-end tests share: shards of a little text, a small config, and real processes that are always ended.

The processes are those of a user: launcher/main.py with the variables that a launcher would set.
"""

import json
import os
import random
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from data.prepare import main as prepare

if TYPE_CHECKING:
    from tests.end_to_end.drilled_run import Place, Run
    from tests.end_to_end.one_token_each import TokenShards
    from tests.end_to_end.warm import Job, Warm

ROOT = Path(__file__).resolve().parents[2]
MAIN = ROOT / "launcher" / "main.py"
TIMEOUT_S = 150


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 600,000 tokens, one id per byte, of a text that stays the same when the project changes: what differs between layouts by
    rounding alone may turn a near-tie of a router, so a text that passes must be kept.
    """
    folder = tmp_path_factory.mktemp("data")
    write_text(folder / "text")
    out = folder / "shards"
    prepare(["--source", str(folder / "text"), "--out", str(out), "--tokenizer", "bytes", "--workers", "1"])
    return out


def write_text(folder: Path) -> None:
    """100 files of lines of the licence in an order of chance."""
    lines = [line.strip() for line in (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines() if line.strip()]
    chance = random.Random(1)
    folder.mkdir()
    for number in range(100):
        (folder / f"{number}.txt").write_text("\n".join(chance.choices(lines, k=120)), encoding="utf-8")


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> "ConfigFile":
    """A SwitchAll of 30,000 weights that takes 12 steps and saves every 4, in a file of its own."""
    values = {
        "run": {"dir": str(tmp_path / "run"), "steps": 12, "seed": 5, "log_every_steps": 1},
        "data": {
            "shards": str(shards / "train"),
            "heldout": str(shards / "heldout"),
            "sequence_length": 32,
            "global_batch_size": 8,
            "streams": 8,
        },
        "model": {
            "d_model": 32,
            "num_layers": 2,
            "mixers": ["switchhead"],
            "feedforwards": ["sigma_moe"],
            "switchhead": {"num_heads": 2, "head_dim": 8, "num_experts": 3, "top_k": 2},
            "sigma_moe": {"num_experts": 5, "expert_dim": 16, "top_k": 2},
            "dropout": 0.1,
        },
        "optim": {"lr": 3.0e-3, "warmup_steps": 2, "accumulation_steps": 2},
        "checkpoint": {"every_steps": 4, "keep": 2},
        "eval": {"every_steps": 6, "max_tokens": 1000},
    }
    return ConfigFile(tmp_path / "config.yaml", values)


@dataclass
class ConfigFile:
    """A config on disk and its run folder."""

    path: Path
    values: dict[str, Any]

    def __post_init__(self) -> None:
        self.path.write_text(yaml.safe_dump(self.values))

    @property
    def folder(self) -> Path:
        return Path(self.values["run"]["dir"])

    def arguments(self, *settings: str) -> list[str]:
        return ["--config", str(self.path), *(part for setting in settings for part in ("--set", setting))]


def records(folder: Path) -> dict[int, dict[str, Any]]:
    """metrics.jsonl by step; a step may be there only once. A line that is still being written does not count."""
    text = (folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    assert len({line["step"] for line in lines}) == len(lines), "a step is twice in metrics.jsonl"
    return {line["step"]: line for line in lines}


@dataclass
class Processes:
    """The processes of one job, in sessions of their own, with one log each."""

    folder: Path
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, command: Sequence[str], **environment: str) -> subprocess.Popen[bytes]:
        log = self.folder / f"process_{len(self.running)}.log"
        clean = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        }
        process = subprocess.Popen(
            command,
            env=clean | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | environment,
            cwd=self.folder,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.running.append(process)
        return process

    def wait(self) -> None:
        """All must end with exit code 0."""
        for number, process in enumerate(self.running):
            try:
                code = process.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                code = f"nothing within {TIMEOUT_S} s"
            assert code == 0, f"process {number} gave {code}\n{self.log(number)}"
        self.running.clear()

    def kill(self) -> None:
        """kill -9, each with what it started."""
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.running.clear()

    def log(self, number: int) -> str:
        return (self.folder / f"process_{number}.log").read_text(errors="replace")[-4000:]


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    job = Processes(tmp_path)
    yield job
    job.kill()


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Calls launcher/main.py in this process as one of `world_size` ranks; gives the sentence that it fails with."""
    from launcher.main import main

    def call(arguments: Sequence[str], *, world_size: int = 1, code: int = 2) -> str:
        if world_size > 1:
            place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            for name, value in (place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}).items():
                monkeypatch.setenv(name, str(value))
        assert main(list(arguments)) == code
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("error: ")
        if code == 2:
            assert len(lines) == 1, f"one sentence, no traceback: {lines}"
        return lines[-1].removeprefix("error: ")

    return call


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Warm"]:
    from tests.end_to_end.warm import Warm  # not at the top: the drills' modules are built on this one

    process = Warm(tmp_path_factory.mktemp("warm"))
    yield process
    process.stop()


@pytest.fixture
def ranks(warm: "Warm", tmp_path: Path) -> Iterator[Callable[..., "Job"]]:
    """`ranks(count, arguments)` starts launcher/main.py, with what tests.end_to_end.warm.start takes more; ended with the test."""
    from tests.end_to_end.warm import start

    jobs: list[Job] = []

    def begin(count: int, arguments: Sequence[str], **options: Any) -> "Job":
        jobs.append(start(warm, arguments, ranks=count, logs=tmp_path / "logs", **options))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()


@pytest.fixture(scope="session")
def token_shards(tmp_path_factory: pytest.TempPathFactory) -> "TokenShards":
    from tests.end_to_end.one_token_each import write_shards

    return write_shards(tmp_path_factory.mktemp("data") / "tokens", seed=1)


@pytest.fixture
def drilled(token_shards: "TokenShards", warm: "Warm", tmp_path: Path) -> Callable[..., "Run"]:
    """`drilled(place, steps)`: a run in a folder of its own that has not begun; `changes` are those of its config."""
    from tests.end_to_end.drilled_run import Run

    def make(place: "Place", steps: int, *, name: str = "drilled", **options: Any) -> "Run":
        return Run(tmp_path / name, token_shards.folder, place, steps, warm, **options)

    return make


@pytest.fixture(scope="session")
def untouched(
    token_shards: "TokenShards", warm: "Warm", tmp_path_factory: pytest.TempPathFactory
) -> Callable[["Place", int], dict[int, dict[str, Any]]]:
    """`untouched(place, steps)`: the records of such a run that nobody has touched, and that waits for its saves."""
    from tests.end_to_end.drilled_run import Run

    @cache
    def make(place: "Place", steps: int) -> dict[int, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("untouched")
        run = Run(folder, token_shards.folder, place, steps, warm, changes={"checkpoint": {"asynchronous": False}})
        run.start().finish()
        assert sorted(run.records()) == list(range(1, steps + 1))
        return run.records()

    return make


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> random.Random:
    """What a drill leaves to chance: the same with the same DRILLS_SEED, which `make drills` draws anew."""
    seed = os.environ["DRILLS_SEED"]
    print(f"DRILLS_SEED={seed}")
    return random.Random(f"{seed}/{request.node.name}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
