"""What a run tells: figures from counts made by hand, and a log that survives a kill in the middle of a line."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.router import RouterReport
from tests.parallel.two_steps import open_world
from train.engine import LocalMesh
from train.metrics import MetricsWriter, router_record, step_record
from train.run_folder import RunFolder
from train.step import StepResult

WORLD = LocalMesh(torch.device("cpu"))


def report(counts: list[float], probabilities: list[float], rows: int) -> RouterReport:
    return RouterReport(torch.tensor(counts).float(), torch.tensor(probabilities).float(), torch.tensor(float(rows)))


def test_a_balanced_router_has_load_1_no_dead_expert_and_the_entropy_of_a_uniform_choice():
    record = router_record({"mlp": report([6, 6, 6, 6], [3, 3, 3, 3], 12)})
    even = {"load_max_over_mean": 1.0, "dead_experts": 0, "load_spread": 1.0}
    assert record["mlp"] == even | {"entropy": pytest.approx(math.log(4))}


def test_a_collapsed_router_is_seen_in_every_figure():
    record = router_record({"mlp": report([24, 0, 0, 0], [12, 0, 0, 0], 12)})
    assert record["mlp"]["load_max_over_mean"] == 4.0
    assert record["mlp"]["dead_experts"] == 3
    assert record["mlp"]["entropy"] == pytest.approx(0.0, abs=1e-6)
    assert record["mlp"]["load_spread"] < 0.05


def test_entropy_is_the_mean_over_heads():
    """Two heads of two experts: one uniform, one decided."""
    record = router_record({"value": report([5, 5, 10, 0], [5, 5, 10, 0], 10)})
    assert record["value"]["entropy"] == pytest.approx(math.log(2) / 2, abs=1e-6)
    assert record["value"]["load_max_over_mean"] == 2.0


def test_bits_per_byte_are_the_nats_of_all_targets_over_the_bytes():
    result = StepResult(
        loss=1.25,
        auxiliary_loss=-0.5,
        grad_norm=2.0,
        nats=math.log(2) * 3 * 100,
        num_targets=100,
        num_bytes=150,
        reports={},
    )
    record = step_record(result, step=7, position=56, lr=0.1, tokens=560, tokens_per_second=9.0)
    assert record["bits_per_byte"] == pytest.approx(3 * 100 / 150)
    assert (record["loss"], record["step"], record["position"], record["tokens"]) == (result.loss, 7, 56, 560)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_records_after_the_restored_step_and_a_line_cut_short_are_dropped(folder: RunFolder):
    writer = MetricsWriter(folder, WORLD, restored_step=0)
    for step in range(1, 7):
        writer.write({"step": step, "loss": step / 2})
    writer.close()
    with folder.metrics.open("a") as file:
        file.write('{"step": 7, "lo')

    writer = MetricsWriter(folder, WORLD, restored_step=4)
    writer.write({"step": 5, "loss": 9.0, "routers": {"mlp": {"entropy": 1.0}}})
    writer.close()
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[-1]["loss"] == 9.0


def test_tensorboard_has_the_nested_figures(folder: RunFolder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(folder, WORLD, restored_step=0)
    exchange = {"bytes": {"dispatch_backward": {"near": 5.0, "far": 7.0}}, "seconds": {"dispatch": {"max": 0.5}}}
    writer.write(
        {"step": 3, "loss": 1.5, "routers": {"layers.0.mixer.value": {"dead_experts": 2}}, "exchange": exchange}
    )
    writer.close()
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    (loss,) = events.Scalars("loss")
    (dead,) = events.Scalars("routers/layers.0.mixer.value/dead_experts")
    assert (loss.step, loss.value, dead.value) == (3, 1.5, 2.0)
    names = ("bytes/dispatch_backward/near", "bytes/dispatch_backward/far", "seconds/dispatch/max")
    assert [events.Scalars(f"exchange/{name}")[0].value for name in names] == [5.0, 7.0, 0.5]


def test_the_metrics_of_an_attempt_without_a_checkpoint_are_kept(folder: RunFolder, caplog: pytest.LogCaptureFixture):
    for loss in (7.0, 8.0, 9.0):
        writer = MetricsWriter(folder, WORLD, restored_step=0)
        writer.write({"step": 1, "loss": loss})
        writer.close()
    losses = {path.name: json.loads(path.read_text())["loss"] for path in folder.path.glob("metrics*")}
    assert losses == {"metrics.jsonl.1": 7.0, "metrics.jsonl.2": 8.0, "metrics.jsonl": 9.0}
    assert "metrics.jsonl.2 is of an attempt that left no checkpoint" in caplog.messages[-1]


def write_to_a_full_disk(path: str) -> tuple[str, str]:
    with open_world(1) as mesh:
        folder = RunFolder(Path(path))
        if mesh.rank == 0:
            folder.metrics.symlink_to("/dev/full")
        mesh.barrier()
        writer = MetricsWriter(folder, mesh, restored_step=0)
        try:
            writer.write({"step": 1, "loss": 2.0})
        except Exception as error:
            return type(error).__name__, str(error)
        return "nothing", ""


def test_a_full_disk_under_rank_0_ends_every_rank_with_one_sentence(pool, tmp_path: Path):
    first, second = pool(2).run(write_to_a_full_disk, str(tmp_path), timeout=30)
    assert first == second
    name, sentence = first
    assert name == "RuntimeError"
    assert sentence.startswith(
        f"{tmp_path}/metrics.jsonl cannot be written (No space left on device): free space there"
    )
    assert sentence.endswith("(rank 0 of 2)")


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_a_place_that_cannot_be_written_is_named_with_the_remedy(folder: RunFolder, name: str):
    if name == "tensorboard":
        folder.tensorboard.write_text("in the way")
    else:
        folder.metrics.mkdir()
    with pytest.raises(RuntimeError, match=rf"{name} cannot be written \(.*\): .* choose another run.dir"):
        MetricsWriter(folder, WORLD, restored_step=4)


SAYS = """
import sys
from train.metrics import Reporter

reporter = Reporter(is_main=True, total_steps=1)
sys.stdin.read()
reporter.say("nobody reads this")
reporter.say("nor this")
print("went on", file=sys.stderr)
"""


def test_a_console_that_nobody_reads_any_more_ends_no_run():
    root, pipe = Path(__file__).resolve().parents[2], subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", SAYS], cwd=root, text=True, stdin=pipe, stdout=pipe, stderr=pipe
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, errors = process.communicate("", timeout=60)
    assert (process.returncode, errors) == (0, "went on\n")
