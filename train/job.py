"""What a run has at hand from its first step to its last, and its batches. Made by train/run.py, handed to the parts of the loop."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data.loader import Batch, TrainBatches, heldout_batches, train_batches
from model.memory import StreamMemory
from train.build import Data
from train.config import Config, Layout
from train.crash import CrashFile
from train.engine import Engine, World
from train.metrics import Reporter
from train.preemption import Preemption
from train.run_folder import RunFolder
from train.saver import Saver
from train.step import StepSettings


@dataclass(frozen=True)
class Job:
    """One process's part of a run."""

    config: Config
    layout: Layout
    data: Data
    world: World
    engine: Engine
    memory: StreamMemory | None
    reporter: Reporter
    saver: Saver
    crash: CrashFile
    preemption: Preemption = field(default_factory=Preemption)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.run.dir))

    @property
    def settings(self) -> StepSettings:
        return StepSettings(
            self.config.optim.accumulation_steps,
            self.config.run.seed,
            mask_documents=self.config.mask_documents,
            watch=self.config.watch,
        )

    def train_batches(self, position: int, *, passed_over: Mapping[str, str] | None = None) -> TrainBatches:
        """This rank's, from the data position on, without end. passed_over: the damaged shards that the run has met before it."""
        return train_batches(
            self.config.data,
            self.data.train,
            seed=self.config.run.seed,
            accumulation_steps=self.config.optim.accumulation_steps,
            rank=self.world.rank,
            num_ranks=self.world.world_size,
            position=position,
            passed_over=passed_over,
        )

    def heldout_batches(self) -> Iterator[Batch]:
        """This rank's, of one pass."""
        return heldout_batches(
            self.config.data,
            self.data.heldout,
            max_tokens=self.config.eval.max_tokens,
            accumulation_steps=self.config.optim.accumulation_steps,
            rank=self.world.rank,
            num_ranks=self.world.world_size,
        )
