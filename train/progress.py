"""How far a run is: steps done, rows consumed, what the watch remembers. And where it stands when it goes back.

The position is not step times rows: a rollback takes the step back and leaves the position behind the rows of the bad step. So both are
counted on, never derived from each other. Owned by the loop of train/run.py; a checkpoint holds all of it but `came_back_to`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from train.watch import WatchState, rolled_back


@dataclass(frozen=True)
class Progress:
    """step: steps done; position: rows consumed or stepped over. Both 0 at the start of a new run.

    came_back_to: the step of the checkpoint that the run went back to, as long as it has saved none since. damaged: the shards that were
    passed over so far, in earlier starts too (path -> problem).
    """

    step: int
    position: int
    watch: WatchState = field(default_factory=WatchState)
    came_back_to: int | None = None
    damaged: Mapping[str, str] = field(default_factory=dict)

    @property
    def updates(self) -> int:
        """That the weights have seen: a skipped step made none."""
        return self.step - self.watch.skipped_steps

    def forward(self, *, rows: int, watch: WatchState) -> "Progress":
        """A step of `rows` rows further, whether its update was made or skipped."""
        return replace(self, step=self.step + 1, position=self.position + rows, watch=watch)

    def saved(self) -> "Progress":
        """With a checkpoint of this step."""
        return replace(self, came_back_to=None)

    def back(self, saved: "Progress", *, rows: int) -> "Progress":
        """At the checkpoint `saved`, all rows up to the last of the bad step after this one stepped over."""
        watch = rolled_back(self.watch, saved.watch)
        return Progress(saved.step, self.position + rows, watch, came_back_to=saved.step, damaged=self.damaged)


def no_way_back(step: int, folder: Path) -> str:
    """The sentence for a rollback without a checkpoint. step: the bad one, 1 is the first."""
    return (
        f"to go back the run needs a checkpoint, but step {step} is bad and there is none in {folder}: lower checkpoint.every_steps, "
        "or set watch.on_nonfinite and watch.on_spike to skip"
    )
