"""What TensorBoard shows of a run that was killed after a checkpoint: each step once, as it was done the last time."""

from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.engine import LocalMesh
from train.metrics import MetricsWriter
from train.run_folder import RunFolder


def test_events_after_the_restored_step_are_not_shown(tmp_path: Path):
    folder, world = RunFolder(tmp_path), LocalMesh(torch.device("cpu"))
    for restored_step, steps, loss in ((0, range(1, 7), 1.0), (4, range(5, 6), 2.0)):
        writer = MetricsWriter(folder, world, restored_step=restored_step)
        for step in steps:
            writer.write({"step": step, "loss": loss})
        writer.close()
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0)]
