"""What a run tells: figures from counts made by hand, and a log that survives a kill in the middle of a line."""

import json
import math
from pathlib import Path

import pytest
import torch

from model.router import RouterReport
from train.metrics import MetricsWriter, router_record, step_record
from train.run_folder import RunFolder
from train.step import StepResult


def report(counts: list[float], probabilities: list[float], rows: int) -> RouterReport:
    return RouterReport(torch.tensor(counts).float(), torch.tensor(probabilities).float(), torch.tensor(float(rows)))


def test_a_balanced_router_has_load_1_no_dead_expert_and_the_entropy_of_a_uniform_choice():
    record = router_record({"mlp": report([6, 6, 6, 6], [3, 3, 3, 3], 12)})
    assert record["mlp"] == {"load_max_over_mean": 1.0, "dead_experts": 0, "entropy": pytest.approx(math.log(4))}


def test_a_collapsed_router_is_seen_in_all_three_figures():
    record = router_record({"mlp": report([24, 0, 0, 0], [12, 0, 0, 0], 12)})
    assert record["mlp"]["load_max_over_mean"] == 4.0
    assert record["mlp"]["dead_experts"] == 3
    assert record["mlp"]["entropy"] == pytest.approx(0.0, abs=1e-6)


def test_entropy_is_the_mean_over_heads():
    """Two heads of two experts: one uniform, one decided."""
    record = router_record({"value": report([5, 5, 10, 0], [5, 5, 10, 0], 10)})
    assert record["value"]["entropy"] == pytest.approx(math.log(2) / 2, abs=1e-6)
    assert record["value"]["load_max_over_mean"] == 2.0


def test_bits_per_byte_are_the_nats_of_all_targets_over_the_bytes():
    result = StepResult(
        loss=math.log(2) * 3, auxiliary_loss=-0.5, grad_norm=2.0, num_targets=100, num_bytes=150, reports={}
    )
    record = step_record(result, step=7, position=56, lr=0.1, tokens=560, tokens_per_second=9.0)
    assert record["bits_per_byte"] == pytest.approx(3 * 100 / 150)
    assert (record["loss"], record["step"], record["position"], record["tokens"]) == (result.loss, 7, 56, 560)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_records_after_the_restored_step_and_a_line_cut_short_are_dropped(folder: RunFolder):
    writer = MetricsWriter(folder, restored_step=0)
    for step in range(1, 7):
        writer.write({"step": step, "loss": step / 2})
    writer.close()
    with folder.metrics.open("a") as file:
        file.write('{"step": 7, "lo')

    writer = MetricsWriter(folder, restored_step=4)
    writer.write({"step": 5, "loss": 9.0, "routers": {"mlp": {"entropy": 1.0}}})
    writer.close()
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[-1]["loss"] == 9.0


def test_tensorboard_has_the_nested_figures(folder: RunFolder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(folder, restored_step=0)
    writer.write({"step": 3, "loss": 1.5, "routers": {"layers.0.mixer.value": {"dead_experts": 2}}})
    writer.close()
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    (loss,) = events.Scalars("loss")
    (dead,) = events.Scalars("routers/layers.0.mixer.value/dead_experts")
    assert (loss.step, loss.value, dead.value) == (3, 1.5, 2.0)
