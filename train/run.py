"""The life of a job, in the order in which it happens. Called by launcher/main.py.

Owns that order and nothing else: each line hands over to the module that knows.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.index import check_tokenizer
from data.loader import Batch, heldout_batches, train_batches
from model.memory import StreamMemory
from model.parameters import count_parameters, states_of
from model.router import collapse_alarm
from model.selection import bias_ranges
from parallel.config import ProcessInfo
from train import checkpoint
from train.begin import begin_from
from train.build import (
    Data,
    build_memory,
    build_model,
    choose_kernels,
    exchange_notes,
    open_data,
    open_world,
    set_up_torch,
)
from train.config import Config, Layout, check_resume, check_world
from train.crash import CrashFile, set_aside
from train.engine import Engine, World
from train.evaluate import evaluate
from train.incident import tell_of
from train.metrics import MetricsWriter, Reporter, evaluation_record, router_record, step_record
from train.optimizer import learning_rate
from train.progress import Progress, no_way_back
from train.run_folder import RunFolder, find_changes, write_folder
from train.run_lock import hold_together
from train.step import StepResult, StepSettings, total_reports, train_step
from train.stragglers import Spent, Stragglers
from train.together import on_every_rank, on_rank_zero, read_together
from train.watch import WatchState, after


@dataclass(frozen=True)
class Job:
    """What a run has at hand from its first step to its last."""

    config: Config
    layout: Layout
    data: Data
    world: World
    engine: Engine
    memory: StreamMemory | None
    reporter: Reporter
    crash: CrashFile

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


def run(config: Config, info: ProcessInfo) -> None:
    """Trains until run.steps, from the newest whole checkpoint if the run folder holds one.

    Raises:
        ValueError: something in the config does not fit the processes, the shards or the run folder; nothing was written.
        RuntimeError: the world failed (a corrupt shard, a full disk, a loss that is not finite); checkpoints stay as they are.
    """
    layout = check_world(config, info)
    data = open_data(config)
    changes = find_changes(config)
    device = set_up_torch(config, info)
    folder = RunFolder(Path(config.run.dir))
    crash = CrashFile(folder, info)
    with open_world(config, info, layout, device=device, crash=crash) as (world, build_engine):
        model = build_model(config, vocab_size=data.train.vocab_size)
        backends, kernel_notes = choose_kernels(config, layout, world)
        backends.apply(model)
        engine = build_engine(model)
        with (
            hold_together(world, folder.path),
            Reporter(is_main=world.rank == 0, total_steps=config.run.steps) as reporter,
        ):
            reporter.say(
                f"{count_parameters(model):,} parameters on {info.world_size} process(es), ep_size {layout.ep_size}, "
                f"zero_stage {config.parallel.zero_stage}, {config.run.dtype}"
            )
            exchanges = exchange_notes(config, layout, processes=info.world_size)
            for note in [*config.model.notes(), *kernel_notes, *exchanges]:
                reporter.say(note)
            for change in changes:
                reporter.say(f"changed since the run began: {change}")
            job = Job(config, layout, data, world, engine, build_memory(config, world), reporter, crash)
            start = restore(job)
            batches = _train_batches(job, start.position)
            world.barrier()  # every rank has read the run folder, and nothing was refused, before rank 0 writes into it
            on_rank_zero(world, lambda: (write_folder(config), backends.write(folder), set_aside(folder)))
            crash.begin()
            train(job, start, batches)


def restore(job: Job) -> Progress:
    """Fills the engine from the newest whole checkpoint of the run folder, if there is one, else from run.init_from, if that is set.

    Raises:
        ValueError: the checkpoint was made with another config, from other shards or with another tokenizer; run.init_from does not fit.
        RuntimeError: there are checkpoints, but none is whole.
    """
    newest = checkpoint.latest(job.folder.checkpoints, mesh=job.world)
    if newest is None:
        for sentence in begin_from(job.config, job.engine, job.world, job.data.train):
            job.reporter.say(sentence)
        return Progress(step=0, position=0)
    return _restore_from(job, newest)


def _restore_from(job: Job, newest: Path) -> Progress:
    on_every_rank(job.world, lambda: _check_same_run(job, newest))
    # `latest` has just compared the checksums
    saved = checkpoint.load(newest, fragments=job.engine.fragments(), mesh=job.world, verify=False)
    found = Progress(saved.step, saved.position, WatchState.of(saved.extra.get("watch")))
    job.engine.restored(step=found.updates)
    on_every_rank(job.world, lambda: _restore_states(job, newest))
    job.reporter.say(f"resumed from {newest}: step {saved.step}, data position {saved.position}")
    return found


def roll_back(job: Job, done: Progress) -> Progress:
    """Everything but the position as the newest whole checkpoint has it; the rows of the step after `done` are stepped over."""
    newest = checkpoint.latest(job.folder.checkpoints, mesh=job.world)
    if newest is None:
        raise RuntimeError(no_way_back(done.step + 1, job.folder.checkpoints))
    saved = _restore_from(job, newest)
    back = done.back(saved, rows=job.config.data.global_batch_size)
    job.reporter.say(f"back to step {back.step}; rows {saved.position} to {back.position - 1} are stepped over")
    return back


def _restore_states(job: Job, newest: Path) -> None:
    """What a run keeps besides weights and moments: the states of its routers and norms, the memory of its streams."""
    states = states_of(job.engine.model)
    for name, value in checkpoint.read_tensors(newest, names=states).items():
        states[name].copy_(value)
    if job.memory is not None:
        job.memory.restore(checkpoint.read_tensors(newest, names=job.memory.names()))


def _check_same_run(job: Job, newest: Path) -> None:
    saved = checkpoint.read_state(newest)
    check_resume(saved.config, job.config)  # config.yaml may be gone; the checkpoint's own config decides
    index = job.data.train
    check_tokenizer(index, saved.extra["tokenizer_id"])
    if saved.extra["data_fingerprint"] != index.fingerprint:
        raise ValueError(
            f"a run must go on with the shards it began with, but those in {index.folder} have fingerprint {index.fingerprint} "
            f"and {newest} was made from {saved.extra['data_fingerprint']}: restore the shards, or choose another run.dir to "
            "start a new run"
        )


def train(job: Job, start: Progress, batches: Iterator[Batch]) -> None:
    """The loop: a step, then whatever is due after it. What a step tells is on disk before the checkpoint that follows it."""
    config, last = job.config, job.config.run.steps
    if start.step >= last:
        job.reporter.say(f"nothing to do: step {start.step} of {last} is done (raise run.steps to go on)")
        return
    writer, stragglers = MetricsWriter(job.folder, job.world, restored_step=start.step), Stragglers(job.world)
    job.reporter.start(start.step)
    engine, world, rows = job.engine, job.world, config.data.global_batch_size
    done, spent = start, Spent(world)
    while done.step < last:
        job.crash.at(step=done.step, position=done.position)
        lr = learning_rate(done.step, config.optim, num_steps=last)
        tell = partial(tell_of, world, job.folder, done, rows=rows, say=job.reporter.say)
        spent.begin(time.perf_counter())
        result = train_step(
            engine, batches, world, job.settings, step=done.step, lr=lr, memory=job.memory, past=done.watch, tell=tell
        )
        spent.end(time.perf_counter())
        if result.goes_back:
            done, spent = roll_back(job, done), Spent(world)  # `batches` stands behind the bad step's rows already
            writer.close()
            writer = MetricsWriter(job.folder, world, restored_step=done.step)
            job.reporter.start(done.step)
            continue
        done = done.forward(rows=rows, watch=after(config.watch, done.watch, result.figures, result.finding))
        job.reporter.step(done.step)

        evaluates = done.step == last or done.step % config.eval.every_steps == 0
        if evaluates or done.step % config.run.log_every_steps == 0:
            speed = rows * spent.steps / spent.seconds
            record = _measure(job, result, done, lr=lr, rows_per_second=speed, evaluates=evaluates)
            record |= stragglers.record(spent, say=job.reporter.say)
            writer.write(record)
            job.reporter.record(record)
            spent = Spent(world)

        if done.step == last or done.step % config.checkpoint.every_steps == 0:
            save(job, done)
    writer.close()
    job.reporter.say(f"done: step {last}; checkpoints, metrics and config are in {job.folder.path}")


def save(job: Job, at: Progress) -> None:
    """Writes a checkpoint; RuntimeError on every rank if any could not write, and then the earlier ones are untouched."""
    state = checkpoint.TrainState(
        step=at.step,
        position=at.position,
        config=job.config.model_dump(mode="json"),
        extra={
            "tokenizer_id": job.data.train.tokenizer_id,
            "data_fingerprint": job.data.train.fingerprint,
            "watch": at.watch.saved(),
            "layout": {"processes": job.world.world_size, "ep_size": job.layout.ep_size},
        },
    )
    fragments = job.engine.owned_fragments()
    keep = job.config.checkpoint.keep
    tensors = {} if job.memory is None else job.memory.tensors()
    if job.world.rank == 0:  # the states are the same on all
        tensors |= states_of(job.engine.model)
    checkpoint.save(
        job.folder.checkpoints, state=state, fragments=fragments, tensors=tensors, mesh=job.world, keep=keep
    )


def _measure(
    job: Job, result: StepResult, done: Progress, *, lr: float, rows_per_second: float, evaluates: bool
) -> dict[str, Any]:
    """The record of a step: every rank takes part, because loads and the held-out loss are those of all ranks."""
    record = step_record(
        result,
        step=done.step,
        position=done.position,
        lr=lr,
        tokens=done.position * job.config.data.sequence_length,
        tokens_per_second=rows_per_second * job.config.data.sequence_length,
    )
    record |= done.watch.counts()
    reports = {} if result.is_skipped else total_reports(result.reports, job.world)  # of a bad step they may be NaN
    record["routers"] = router_record(reports)
    if exchange := job.world.exchange():
        record["exchange"] = exchange
    if alarm := collapse_alarm(reports):
        job.reporter.say(f"step {done.step}: {alarm}")
    if ranges := bias_ranges(job.engine.model):
        record["bias_ranges"] = ranges
    if evaluates:
        heldout = read_together(job.world, _heldout_batches(job))
        memory = build_memory(job.config, job.world, evaluation=True)
        evaluation = evaluate(job.engine, heldout, job.world, job.settings, step=done.step, memory=memory)
        if not math.isfinite(evaluation.loss):
            raise RuntimeError(
                f"the held-out loss must be finite, but after step {done.step} it is {evaluation.loss} while the loss is {result.loss}: "
                "what the run keeps besides weights (batch-norm statistics) is broken; go on from an earlier checkpoint with a lower "
                "optim.lr in a run with another run.dir"
            )
        record |= evaluation_record(evaluation)
    return record


def _train_batches(job: Job, position: int) -> Iterator[Batch]:
    return train_batches(
        job.config.data,
        job.data.train,
        seed=job.config.run.seed,
        accumulation_steps=job.config.optim.accumulation_steps,
        rank=job.world.rank,
        num_ranks=job.world.world_size,
        position=position,
    )


def _heldout_batches(job: Job) -> Iterator[Batch]:
    return heldout_batches(
        job.config.data,
        job.data.heldout,
        max_tokens=job.config.eval.max_tokens,
        accumulation_steps=job.config.optim.accumulation_steps,
        rank=job.world.rank,
        num_ranks=job.world.world_size,
    )
