"""The checkpoint section of a config: when a run is saved, how, and what a failed save means. Used by train/config.py and saver.py."""

from typing import Annotated, Literal

from pydantic import Field

from model.section import Section

Count = Annotated[int, Field(ge=1)]


class CheckpointConfig(Section):
    """When the run is saved, and what it waits for; it is always saved at its end."""

    every_steps: Count = 100
    keep: Count = Field(default=3, description="checkpoints kept, the newest")
    asynchronous: bool = Field(
        default=True, description="a step waits only for a copy to host memory; the write goes on behind the steps"
    )
    on_failure: Literal["continue", "stop"] = Field(
        default="continue",
        description="after a save that failed; three in a row, or that of the last step, stop the run all the same",
    )
    timeout_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = Field(
        default=1800.0, description="seconds that the write of a checkpoint may take; after them the disk is given up"
    )
