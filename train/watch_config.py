"""The `watch` section of a run's config: what happens at a step whose loss or gradient norm is not finite, or stands out.

Owns the fields and that none of them is ignored. Does not decide (train/watch.py). Composed by train/config.py.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from model.section import Section

Limit = Annotated[int, Field(ge=1)]


class WatchConfig(Section):
    """Bad steps. Counts are of the whole run, a resume goes on counting. At a limit the run stops."""

    on_nonfinite: Literal["stop", "skip", "rollback"] = Field(
        default="stop",
        description="loss or gradient norm not finite: stop; skip the update; or go back to the last checkpoint",
    )
    spike_factor: Annotated[float, Field(gt=1.0)] | None = Field(
        default=None,
        description="a loss or norm above this times its running median is a spike; null: none is looked for",
    )
    window: Annotated[int, Field(ge=3)] = Field(
        default=100, description="good steps of the median; no spike is looked for before there are as many"
    )
    on_spike: Literal["skip", "rollback", "log"] = Field(
        default="log", description="skip the update; go back to the last checkpoint; or apply it and say so"
    )
    max_skips: Limit = Field(default=10, description="skipped updates among all steps of the run")
    max_skips_in_a_row: Limit = Field(default=3, description="skipped updates one after the other")
    max_rollbacks: Limit = Field(default=3, description="times that the run goes back to a checkpoint")

    @property
    def may_skip(self) -> bool:
        return "skip" in (self.on_nonfinite, self._on_spike)

    @property
    def may_roll_back(self) -> bool:
        return "rollback" in (self.on_nonfinite, self._on_spike)

    @property
    def _on_spike(self) -> str | None:
        return None if self.spike_factor is None else self.on_spike

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        needs = {
            "window": (self.spike_factor is not None, "spike_factor"),
            "on_spike": (self.spike_factor is not None, "spike_factor"),
            "max_skips": (self.may_skip, "on_nonfinite or on_spike to be skip"),
            "max_skips_in_a_row": (self.may_skip, "on_nonfinite or on_spike to be skip"),
            "max_rollbacks": (self.may_roll_back, "on_nonfinite or on_spike to be rollback"),
        }
        for name, (is_used, need) in needs.items():
            value = getattr(self, name)
            # a resolved config writes the defaults out: those ask for nothing
            if not is_used and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} needs {need}, but {name} is {value}, on_nonfinite is {self.on_nonfinite}, spike_factor is "
                    f"{self.spike_factor} and on_spike is {self.on_spike}: set what is missing, or remove {name}"
                )
        default = type(self).model_fields["max_skips_in_a_row"].default
        if self.may_skip and self.max_skips_in_a_row > self.max_skips and self.max_skips_in_a_row != default:
            raise ValueError(
                f"max_skips_in_a_row must be at most max_skips, but max_skips_in_a_row is {self.max_skips_in_a_row} and max_skips is "
                f"{self.max_skips}: lower max_skips_in_a_row or raise max_skips"
            )
        return self

    def check_length(self, *, steps: int, checkpoint_every: int) -> None:
        """ValueError where a run of `steps` steps, with a checkpoint every so many, is too short for what is asked here."""
        if self.spike_factor is not None and self.window >= steps:
            raise ValueError(
                f"spikes are looked for after watch.window good steps, but watch.window is {self.window} and run.steps is {steps}: lower "
                "watch.window, or set watch.spike_factor to null"
            )
        if self.may_roll_back and checkpoint_every >= steps:
            raise ValueError(
                f"a rollback needs a checkpoint before the last step, but checkpoint.every_steps is {checkpoint_every} and run.steps is "
                f"{steps}: lower checkpoint.every_steps, or set watch.on_nonfinite and watch.on_spike to skip"
            )
