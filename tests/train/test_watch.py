"""Which steps are bad: the decision against a plain loop over a made-up run, its limits, and what a checkpoint keeps of it."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from train.progress import Progress
from train.watch import Figures, WatchState, after, judge, rolled_back
from train.watch_config import WatchConfig

GOOD = Figures(2.0, 0.1, 1.0)


def watch(**values) -> WatchConfig:
    return WatchConfig.model_validate(values)


@pytest.mark.parametrize("field", ["loss", "auxiliary_loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
def test_each_figure_that_is_not_finite_is_found(field: str, value: float, action: str):
    figures = replace(GOOD, **{field: value})
    finding = judge(watch(on_nonfinite=action), WatchState(), figures, step=7)
    assert finding is not None
    assert (finding.kind, finding.action, finding.applies) == ("nonfinite", action, False)
    assert "must be finite, but at step 7" in finding.sentence
    assert judge(watch(on_nonfinite=action), WatchState(), GOOD, step=7) is None


def spikes_of(losses: list[float], norms: list[float], *, factor: float, window: int) -> list[int]:
    """A plain loop: which steps stand out, when those are not counted among the good ones."""
    good: list[tuple[float, float]] = []
    found = []
    for number, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        last = np.array(good[-window:])
        if len(last) == window and (loss > factor * np.median(last[:, 0]) or norm > factor * np.median(last[:, 1])):
            found.append(number)
        else:
            good.append((loss, norm))
    return found


@pytest.mark.parametrize("window", [3, 4, 20])
@pytest.mark.parametrize("seed", range(5))
def test_spikes_are_those_of_a_plain_loop(window: int, seed: int):
    draw = random.Random(seed)
    losses, norms = ([draw.lognormvariate(0.0, 0.6) for _ in range(200)] for _ in range(2))
    config = watch(spike_factor=2.5, window=window, on_spike="skip", max_skips=1000, max_skips_in_a_row=1000)
    state, found = WatchState(), []
    for number, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        figures = Figures(loss, 0.0, norm)
        finding = judge(config, state, figures, step=number + 1)
        if finding is not None:
            found.append(number)
        state = after(config, state, figures, finding)
    expected = spikes_of(losses, norms, factor=2.5, window=window)
    assert found == expected
    assert len(expected) > 5
    assert state.skipped_steps == len(expected)
    assert len(state.losses) == len(state.norms) == window


def filled(config: WatchConfig, figures: Figures = GOOD) -> WatchState:
    state = WatchState()
    for _ in range(config.window):
        state = after(config, state, figures, None)
    return state


def test_nothing_is_a_spike_before_the_window_is_full():
    config = watch(spike_factor=2.0, window=5)
    spike = replace(GOOD, loss=1e9)
    state = filled(config)
    assert judge(config, replace(state, losses=state.losses[1:], norms=state.norms[1:]), spike, step=5) is None
    finding = judge(config, state, spike, step=6)
    assert finding is not None
    assert "loss must stay below 2 times its median over the last 5 good steps, 2, but at step 6" in finding.sentence


def test_a_spike_is_above_the_multiple_and_of_the_last_steps_of_the_window_alone():
    config = watch(spike_factor=2.0, window=3)
    assert judge(config, filled(config), replace(GOOD, loss=4.0), step=4) is None, "twice 2"
    assert judge(config, filled(config), replace(GOOD, loss=4.001), step=4) is not None
    longer = WatchState(losses=(9.0,) * 7 + (1.0,) * 3, norms=(1.0,) * 10)  # of a run whose window was 10
    assert judge(config, longer, replace(GOOD, loss=3.0), step=11) is not None


def test_a_logged_spike_is_applied_and_moves_the_median():
    """So a lasting change of the level is not told of for ever."""
    config = watch(spike_factor=2.0, window=3)
    state, high, told = filled(config), replace(GOOD, grad_norm=10.0), 0
    for step in range(10):
        finding = judge(config, state, high, step=step)
        assert finding is None or finding.applies
        told += finding is not None
        state = after(config, state, high, finding)
    assert told == 2, "two of three are then high"


def test_without_a_factor_and_with_a_median_of_zero_nothing_is_a_spike():
    state = WatchState(losses=(1.0,) * 100, norms=(1.0,) * 100)
    assert judge(watch(), state, Figures(1e9, 0.0, 1e9), step=1) is None
    assert after(watch(), WatchState(), GOOD, None).losses == (), "nothing is kept that nobody asks for"
    config = watch(spike_factor=2.0, window=3)
    assert judge(config, filled(config, Figures(0.0, 0.0, 0.0)), GOOD, step=1) is None


@pytest.mark.parametrize(
    ("state", "word"),
    [(WatchState(skipped_steps=2, skips_in_a_row=2), "in_a_row"), (WatchState(skipped_steps=4), "max_skips)")],
)
def test_a_skip_beyond_a_limit_stops_the_run_and_names_the_limit(state: WatchState, word: str):
    config = watch(on_nonfinite="skip", max_skips=4, max_skips_in_a_row=2)
    bad = replace(GOOD, loss=math.nan)
    below = WatchState(skipped_steps=3, skips_in_a_row=1)
    last = judge(config, below, bad, step=9)
    assert last is not None
    assert last.action == "skip"
    beyond = judge(config, state, bad, step=9)
    assert beyond is not None
    assert beyond.action == "stop"
    assert word in beyond.sentence


def test_skips_in_a_row_begin_anew_after_a_good_step():
    config = watch(on_nonfinite="skip")
    bad = replace(GOOD, loss=math.nan)
    state = WatchState()
    for figures in (bad, bad, GOOD, bad):
        state = after(config, state, figures, judge(config, state, figures, step=1))
    assert (state.skipped_steps, state.skips_in_a_row) == (3, 1)


def test_rollbacks_have_a_limit_that_going_back_does_not_undo():
    config = watch(on_nonfinite="rollback", max_rollbacks=2)
    bad = replace(GOOD, loss=math.nan)
    saved, state = WatchState(skipped_steps=1), WatchState(skipped_steps=4)
    actions = []
    for _ in range(3):
        finding = judge(config, state, bad, step=9)
        assert finding is not None
        actions.append(finding.action)
        state = rolled_back(state, saved)
    assert actions == ["rollback", "rollback", "stop"]
    assert state.skipped_steps == 1, "those after the checkpoint are undone"


def test_the_state_comes_out_of_a_checkpoint_as_it_went_in():
    state = WatchState(3, 1, 2, (0.1, 1 / 3), (math.pi,))
    assert WatchState.of(json.loads(json.dumps(state.saved()))) == state
    assert WatchState.of(None) == WatchState()


def test_a_state_with_what_this_version_does_not_know_is_refused_in_a_sentence():
    with pytest.raises(RuntimeError, match=r"watch state in step_7 must hold .* but it also holds future: go on with"):
        WatchState.of({"rollbacks": 1, "future": 2}, where="step_7")


def test_step_and_position_go_apart_where_the_run_goes_back():
    saved = Progress(4, 16, WatchState(skipped_steps=1))
    done = Progress(7, 40, WatchState(skipped_steps=2, rollbacks=1))
    back = done.back(saved, rows=4)
    assert (back.step, back.position, back.updates, back.watch.rollbacks) == (4, 44, 3, 2)
    on = back.forward(rows=4, watch=back.watch)
    assert (on.step, on.position) == (5, 48)


def test_going_back_does_not_undo_that_a_damaged_shard_was_passed_over():
    done = Progress(7, 40, damaged={"a.tar": "a.tar is missing"})
    assert done.back(Progress(4, 16), rows=4).damaged == {"a.tar": "a.tar is missing"}


@pytest.mark.parametrize(
    "values",
    [
        {"on_spike": "skip"},
        {"window": 7},
        {"max_skips": 3},
        {"max_skips_in_a_row": 4, "spike_factor": 2.0},
        {"max_rollbacks": 1, "on_nonfinite": "skip"},
        {"on_spike": "rollback", "max_rollbacks": 1},
    ],
)
def test_a_setting_that_nothing_asks_for_is_refused(values: dict):
    with pytest.raises(ValidationError, match="set what is missing, or remove"):
        watch(**values)
    assert watch(**watch(on_nonfinite="skip").model_dump()) == watch(on_nonfinite="skip")


def test_more_skips_in_a_row_than_skips_are_refused():
    with pytest.raises(ValidationError, match="max_skips_in_a_row is 8 and max_skips is 2: lower"):
        watch(on_nonfinite="skip", max_skips=2, max_skips_in_a_row=8)
    with pytest.raises(ValidationError, match="max_skips_in_a_row is 50 and max_skips is 10: lower"):
        watch(on_nonfinite="skip", max_skips_in_a_row=50)
    assert watch(on_nonfinite="skip", max_skips=2).max_skips_in_a_row == 3, "a default asks for nothing"


@pytest.mark.parametrize(
    ("values", "steps", "sentence"),
    [
        ({"spike_factor": 2.0, "window": 7}, 7, "watch.window is 7 and run.steps is 7: lower watch.window"),
        ({"on_nonfinite": "rollback"}, 5, "checkpoint.every_steps is 5 and run.steps is 5: lower checkpoint.every"),
        ({"spike_factor": 2.0, "window": 3, "on_spike": "rollback"}, 5, "every_steps is 5 and run.steps is 5"),
    ],
)
def test_what_a_run_is_too_short_for_is_refused(values: dict, steps: int, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        watch(**values).check_length(steps=steps, checkpoint_every=5)
    watch(**values).check_length(steps=steps + 1, checkpoint_every=5)
    watch(on_nonfinite="skip", window=100).check_length(steps=1, checkpoint_every=100)
