"""The record of a logged step: what it did, how its routers chose, what it exchanged, and the held-out loss where that is due.

Owns what is asked for a record, of all ranks together. Does not own the names of the metrics (train/metrics.py). Called by train/run.py.
"""

import math
from typing import Any

from data.loader import mixture_of, training_lines
from model.router import collapse_alarm
from model.selection import bias_ranges
from train.build import build_memory
from train.evaluate import Evaluation, evaluate
from train.job import Job
from train.metrics import evaluation_record, router_record, source_record, step_record
from train.progress import Progress
from train.step import StepResult, total_reports
from train.together import read_together


def measure(
    job: Job, result: StepResult, done: Progress, *, lr: float, rows_per_second: float, evaluates: bool
) -> dict[str, Any]:
    """Every rank takes part, because loads and the held-out loss are those of all ranks. done: with the step.

    Raises:
        RuntimeError: the held-out loss is not finite, or a rank could not read its rows.
    """
    data = job.config.data
    record = step_record(
        result,
        step=done.step,
        position=done.position,
        lr=lr,
        tokens=done.position * data.sequence_length,
        tokens_per_second=rows_per_second * data.sequence_length,
    )
    if not isinstance(data.shards, str):
        mixture = mixture_of(data, job.data.train, seed=job.config.run.seed)
        lines = training_lines(data, job.data.train)
        record |= source_record(job.data.train, lines, mixture, position=done.position)
    record |= done.watch.counts()
    reports = {} if result.is_skipped else total_reports(result.reports, job.world)  # of a bad step they may be NaN
    record["routers"] = router_record(reports)
    if exchange := job.world.exchange():
        record["exchange"] = exchange
    if alarm := collapse_alarm(reports):
        job.reporter.say(f"step {done.step}: {alarm}")
    if ranges := bias_ranges(job.engine.model):
        record["bias_ranges"] = ranges
    return record | evaluation_record(_evaluation(job, result, done)) if evaluates else record


def _evaluation(job: Job, result: StepResult, done: Progress) -> Evaluation:
    heldout = read_together(job.world, job.heldout_batches())
    memory = build_memory(job.config, job.world, evaluation=True)
    evaluation = evaluate(job.engine, heldout, job.world, job.settings, step=done.step, memory=memory)
    if not math.isfinite(evaluation.loss):
        raise RuntimeError(
            f"the held-out loss must be finite, but after step {done.step} it is {evaluation.loss} while the loss is {result.loss}: "
            "what the run keeps besides weights (batch-norm statistics) is broken; go on from an earlier checkpoint with a lower "
            "optim.lr in a run with another run.dir"
        )
    return evaluation
