"""The run that the drills break: its config at a place, its starts, and the comparison with a run that nobody touched.

Called by test_kills.py and test_disks_and_clocks.py; the fixtures are in conftest.py.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.end_to_end.conftest import records
from tests.end_to_end.one_token_each import LENGTH, ROWS, STREAMS
from tests.end_to_end.warm import Job, Warm, start

FIGURES = ("loss", "auxiliary_loss", "grad_norm", "lr", "position", "routers", "heldout_loss", "epochs")
SAVE_EVERY = 3
# Every kind of state: a balancing bias, batch-norm statistics, the memory of streams, dropout.
MODEL = {
    "d_model": 16,
    "num_layers": 2,
    "mixers": ["switchhead"],
    "feedforwards": ["sigma_moe", "pkm"],
    "switchhead": {"num_heads": 2, "head_dim": 4, "num_experts": 3, "top_k": 2, "positions": "xl", "memory_blocks": 1},
    "sigma_moe": {"num_experts": 5, "expert_dim": 4, "top_k": 2, "balance": "bias"},
    "pkm": {"num_keys": 3, "num_heads": 2, "top_k": 2, "query_norm": "batch"},
    "dropout": 0.1,
}


@dataclass(frozen=True)
class Place:
    """A layout; readers: reader processes of each rank, which run ahead of the training."""

    processes: int
    ep_size: int
    zero_stage: int
    exchange: str = "auto"
    readers: int = 0


@dataclass
class Run:
    """A run in `folder`/run with shards beside it; `starts` counts the times that it was started."""

    folder: Path
    shards: Path
    place: Place
    steps: int
    warm: Warm
    starts: int = 0
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    run_dir: Path | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / "journal").mkdir(exist_ok=True)
        sections: dict[str, dict[str, Any]] = {
            "run": {"dir": str(self.run), "steps": self.steps, "seed": 5, "log_every_steps": 1},
            "data": {
                "shards": str(self.shards / "train"),
                "heldout": str(self.shards / "heldout"),
                "sequence_length": LENGTH,
                "global_batch_size": ROWS,
                "streams": STREAMS,
                "num_workers": self.place.readers,
            },
            "model": MODEL,
            "parallel": {
                "ep_size": self.place.ep_size,
                "zero_stage": self.place.zero_stage,
                "exchange": self.place.exchange,
            },
            "optim": {"lr": 3.0e-3, "warmup_steps": 2, "accumulation_steps": 2},
            "checkpoint": {"every_steps": SAVE_EVERY, "keep": 1},
            "eval": {"every_steps": 5, "max_tokens": 90},
        }
        values = {name: fields | self.changes.get(name, {}) for name, fields in sections.items()}
        (self.folder / "config.yaml").write_text(yaml.safe_dump(values))

    @property
    def run(self) -> Path:
        return self.run_dir or self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def start(self, *, faults: dict[int, dict[str, Any]] | None = None, **options: Any) -> Job:
        """One more start with the same command. faults: by rank, beside the journal."""
        self.starts += 1
        journal = self.folder / "journal"
        plans = [
            {"journal": str(journal / f"{self.starts:04d}_{rank}")} | (faults or {}).get(rank, {})
            for rank in range(self.place.processes)
        ]
        return start(
            self.warm,
            ["--config", str(self.folder / "config.yaml")],
            ranks=self.place.processes,
            logs=self.folder / "logs",
            faults=plans,
            **options,
        )

    def records(self) -> dict[int, dict[str, Any]]:
        return records(self.run)

    def told(self) -> int:
        """The last step in metrics.jsonl, as its lines are counted while the run writes them."""
        return max(self.records(), default=0)

    def latest_step(self) -> int:
        """Of the checkpoint that the file `latest` names, or, before there is that file, of the newest that has its name; 0 without one.
        Read here, not by the code that is drilled."""
        latest = self.checkpoints / "latest"
        if not latest.exists():  # killed between the first rename and the first `latest`
            whole = self.checkpoints.glob("step_*") if self.checkpoints.exists() else []
            return max((int(path.name[5:]) for path in whole if path.name[5:].isdecimal()), default=0)
        found = re.fullmatch(r"[0-9a-f]{64}  step_(\d+)/manifest.json\n", latest.read_text())
        return int(found.group(1)) if found else 0


def wait_until(done: Callable[[], bool], job: Job, *, seconds: float = 120) -> None:
    """Fails if the job ends before, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not done():
        early, late = any([rank.ended() for rank in job.ranks]), time.monotonic() > deadline
        if early or late:
            said = "\n".join(rank.said() for rank in job.ranks)
            raise AssertionError(f"{'a rank has ended by itself' if early else f'nothing in {seconds:g} s'}:\n{said}")
        time.sleep(0.005)


def resumed_step(job: Job) -> int:
    """The step that rank 0 says it goes on from; 0 if it begins."""
    found = re.search(r"resumed from \S+: step (\d+),", " ".join(job.ranks[0].said().split()))
    return int(found.group(1)) if found else 0


def assert_same_curve(run: Run, expected: dict[int, dict[str, Any]], *, whole: bool = True) -> None:
    """Bit for bit: JSON keeps every bit of a float."""
    found = run.records()
    assert not whole or sorted(found) == sorted(expected)
    for step, record in found.items():
        for figure in FIGURES:
            assert record.get(figure) == expected[step].get(figure), f"{figure} at step {step}"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
