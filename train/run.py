"""The life of a job, in the order in which it happens. Called by launcher/main.py.

Owns that order and nothing else: each line hands over to the module that knows.
"""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.difference import describe_changes, summarize
from data.index import check_tokenizer
from data.loader import Batch, TrainBatches, heldout_batches, mixture_of, train_batches, training_lines
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
from train.engine import Engine, World
from train.evaluate import evaluate
from train.metrics import MetricsWriter, Reporter, evaluation_record, router_record, source_record, step_record
from train.optimizer import learning_rate
from train.run_folder import RunFolder, find_changes, write_folder
from train.run_lock import hold_together
from train.saver import Saver, open_saver
from train.step import StepResult, StepSettings, total_reports, train_step
from train.together import on_every_rank, on_rank_zero, read_together


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
    saver: Saver

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.run.dir))

    @property
    def settings(self) -> StepSettings:
        return StepSettings(
            self.config.optim.accumulation_steps,
            self.config.run.seed,
            mask_documents=self.config.mask_documents,
        )


@dataclass(frozen=True)
class Progress:
    """Updates done and rows consumed; both 0 at the start of a new run."""

    step: int
    position: int


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
    with open_world(config, info, layout, device=device) as (world, build_engine):
        model = build_model(config, vocab_size=data.train.vocab_size)
        backends, kernel_notes = choose_kernels(config, layout, world)
        backends.apply(model)
        engine = build_engine(model)
        with (
            hold_together(world, Path(config.run.dir)),
            Reporter(is_main=world.rank == 0, total_steps=config.run.steps) as reporter,
            _open_saver(config, world, reporter) as saver,
        ):
            reporter.say(
                f"{count_parameters(model):,} parameters on {info.world_size} process(es), ep_size {layout.ep_size}, "
                f"zero_stage {config.parallel.zero_stage}, {config.run.dtype}"
            )
            exchanges = exchange_notes(config, layout, processes=info.world_size)
            changed = [f"changed since the run began: {change}" for change in changes]
            for note in [*config.model.notes(), *kernel_notes, *exchanges, *changed]:
                reporter.say(note)
            job = Job(config, layout, data, world, engine, build_memory(config, world), reporter, saver)
            start = restore(job)
            batches = _train_batches(job, start.position)
            world.barrier()  # every rank has read the run folder, and nothing was refused, before rank 0 writes into it
            on_rank_zero(world, lambda: write_folder(config, shards=data.train.folder))
            on_rank_zero(world, lambda: backends.write(job.folder))
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
    on_every_rank(job.world, lambda: _check_same_run(job, newest))
    # `latest` has just compared the checksums
    saved = checkpoint.load(newest, fragments=job.engine.fragments(), mesh=job.world, verify=False)
    job.engine.restored(step=saved.step)
    on_every_rank(job.world, lambda: _restore_states(job, newest))
    job.reporter.say(f"resumed from {newest}: step {saved.step}, data position {saved.position}")
    return Progress(step=saved.step, position=saved.position)


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
    split = job.data.train
    check_tokenizer(split.sources[0].index, saved.extra["tokenizer_id"])
    if saved.extra["data_fingerprint"] != split.fingerprint:
        changed = (
            describe_changes(saved.extra["data"], split) if "data" in saved.extra else "which ones it did not record"
        )
        raise ValueError(
            f"a run must go on with the shards it began with, but since {newest} those in "
            f"{', '.join(str(source.index.folder) for source in split.sources)} changed: {changed} (the fingerprint was "
            f"{saved.extra['data_fingerprint']} and is {split.fingerprint}): restore the shards, or choose another run.dir to "
            "start a new run"
        )


def train(job: Job, start: Progress, batches: TrainBatches) -> None:
    """The loop: a step, then whatever is due after it. What a step tells is on disk before the checkpoint that follows it."""
    config, last = job.config, job.config.run.steps
    if start.step >= last:
        job.reporter.say(f"nothing to do: step {start.step} of {last} is done (raise run.steps to go on)")
        return
    writer = MetricsWriter(job.folder, job.world, restored_step=start.step)
    job.reporter.start(start.step)
    told: set[str] = set()  # damaged shards that the console has named
    rows, seconds = 0, 0.0  # of the steps since the last record, without its evaluation and the checkpoints in between
    for step in range(start.step, last):
        lr = learning_rate(step, config.optim, num_steps=last)
        began = time.perf_counter()
        result = train_step(job.engine, batches, job.world, job.settings, step=step, lr=lr, memory=job.memory)
        seconds += time.perf_counter() - began
        rows += config.data.global_batch_size
        done = Progress(step + 1, start.position + (step + 1 - start.step) * config.data.global_batch_size)
        job.reporter.step(done.step)
        job.saver.look()

        evaluates = done.step == last or done.step % config.eval.every_steps == 0
        saves = done.step == last or done.step % config.checkpoint.every_steps == 0
        logs = evaluates or done.step % config.run.log_every_steps == 0
        if (logs or saves) and config.data.max_skipped_shards:
            _share_damaged(job, batches, told)
        if logs:
            record = _measure(job, result, done, lr=lr, rows_per_second=rows / seconds, evaluates=evaluates)
            if config.data.max_skipped_shards:
                record["skipped_shards"] = len(batches.damaged)
            record |= job.saver.take_record()
            writer.write(record)
            job.reporter.record(record)
            rows, seconds = 0, 0.0

        if saves:
            save(job, done)
    job.saver.finish()
    writer.close()
    job.reporter.say(f"done: step {last}; checkpoints, metrics and config are in {job.folder.path}")


def save(job: Job, at: Progress) -> None:
    """Saves the run as it is now; RuntimeError on every rank, see `Saver.save`. The earlier checkpoints are then untouched."""
    state = checkpoint.TrainState(
        step=at.step,
        position=at.position,
        config=job.config.model_dump(mode="json"),
        extra={
            "tokenizer_id": job.data.train.tokenizer_id,
            "data_fingerprint": job.data.train.fingerprint,
            "data": summarize(job.data.train),
            "layout": {"processes": job.world.world_size, "ep_size": job.layout.ep_size},
        },
    )
    tensors = {} if job.memory is None else job.memory.tensors()
    if job.world.rank == 0:  # the states are the same on all
        tensors |= states_of(job.engine.model)
    job.saver.save(state, fragments=job.engine.owned_fragments(), tensors=tensors)


def _open_saver(config: Config, world: World, reporter: Reporter) -> AbstractContextManager[Saver]:
    # Half of the watchdog's patience: a rank that ends with an error tells the others after the wait, before they call it a hang.
    patience_s = config.parallel.watchdog_s / 2
    return open_saver(
        RunFolder(Path(config.run.dir)).checkpoints, world, config.checkpoint, patience_s=patience_s, say=reporter.say
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
    if not isinstance(job.config.data.shards, str):
        lines = training_lines(job.config.data, job.data.train)
        mixture = mixture_of(job.config.data, job.data.train, seed=job.config.run.seed)
        record |= source_record(job.data.train, lines, mixture, position=done.position)
    reports = total_reports(result.reports, job.world)
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


def _share_damaged(job: Job, batches: TrainBatches, told: set[str]) -> None:
    """Adds the damaged shards that other ranks met, so that the limit is that of all ranks, and names new ones on the console."""
    found = {path: problem for part in job.world.all_gather_object(batches.damaged) for path, problem in part.items()}
    for path in sorted(found.keys() - told):
        job.reporter.say(f"skipped: {found[path]}")
    told.update(found)
    batches.add_damaged(found)


def _train_batches(job: Job, position: int) -> TrainBatches:
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
