"""The life of a job, in the order in which it happens. Called by launcher/main.py.

Owns that order and nothing else: each line hands over to the module that knows.
"""

import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from data.loader import TrainBatches
from model.parameters import count_parameters
from parallel.config import ProcessInfo
from train.build import (
    build_memory,
    build_model,
    check_same_data,
    choose_kernels,
    exchange_notes,
    open_data,
    open_world,
    set_up_torch,
)
from train.config import Config, check_world
from train.crash import CrashFile, set_aside
from train.engine import World
from train.incident import tell_of
from train.job import Job
from train.measure import measure
from train.metrics import MetricsWriter, Reporter
from train.optimizer import learning_rate
from train.placing import Placer
from train.preemption import Preemption
from train.progress import Progress
from train.resume import restore, roll_back, save
from train.run_folder import RunFolder, find_changes, keep_aside, replace_file, write_folder
from train.run_lock import hold_together
from train.saver import Saver, open_saver
from train.step import StepResult, train_step
from train.stragglers import Spent, Stragglers
from train.together import on_every_rank, on_rank_zero
from train.watch import after

Ending = Literal["done", "preempted"]


def run(config: Config, info: ProcessInfo, preemption: Preemption | None = None) -> Ending:
    """Trains until run.steps, from the newest whole checkpoint if the run folder holds one; or until a rank is asked to end.

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
    with (
        ExitStack() as at_last,
        open_world(config, info, layout, device=device, crash=crash) as (world, build_engine),
    ):
        check_same_data(world, data)  # before the network: its vocabulary is the shards'
        # before kernels.json is read, to the very end: crash.json is written under the lock
        at_last.enter_context(hold_together(world, folder.path))
        model = build_model(config, vocab_size=data.train.vocab_size)
        backends, kernel_notes = choose_kernels(config, layout, world, model)
        backends.apply(model)
        engine = build_engine(model)
        with (
            Reporter(is_main=world.rank == 0, total_steps=config.run.steps) as reporter,
            open_saver_of(config, world, reporter) as saver,
        ):
            reporter.say(
                f"{count_parameters(model):,} parameters on {info.world_size} process(es), ep_size {layout.ep_size}, "
                f"zero_stage {config.parallel.zero_stage}, {config.run.dtype}"
            )
            exchanges = exchange_notes(config, layout, processes=info.world_size)
            changed = [f"changed since the run began: {change}" for change in changes]
            for note in [*config.model.notes(), *kernel_notes, *exchanges, *changed]:
                reporter.say(note)
            memory = build_memory(config, world)
            job = Job(config, layout, data, world, engine, memory, reporter, saver, crash, preemption or Preemption())
            start = restore(job)
            # what each rank has found damaged itself counts too: one may be beyond the limit alone
            batches = on_every_rank(world, lambda: job.train_batches(start.position, passed_over=start.damaged))
            world.barrier()  # every rank has read the run folder, and nothing was refused, before rank 0 writes into it
            on_rank_zero(world, lambda: write_folder(config, shards=data.train.folder))
            on_rank_zero(world, lambda: (backends.write(folder), clear(folder, begins_anew=start.step == 0)))
            crash.begin()
            crash.at(step=start.step, position=start.position)
            ending = train(job, start, batches)
            if ending == "done":
                on_rank_zero(world, lambda: replace_file(folder.done, f"step {config.run.steps}\n"))
            return ending


def clear(folder: RunFolder, *, begins_anew: bool) -> None:
    """Moves aside what earlier starts have told and is not true of this one. Rank 0."""
    set_aside(folder)
    folder.done.unlink(missing_ok=True)
    if begins_anew:
        keep_aside(folder.events)  # what went back in them was another course


def train(job: Job, start: Progress, batches: TrainBatches) -> Ending:
    """The loop: a step, then whatever is due after it. What a step tells is on disk before the checkpoint that follows it."""
    config, last = job.config, job.config.run.steps
    if start.step >= last:
        job.reporter.say(f"nothing to do: step {start.step} of {last} is done (raise run.steps to go on)")
        return "done"
    writer, stragglers = MetricsWriter(job.folder, job.world, restored_step=start.step), Stragglers(job.world)
    placer = Placer(job)
    job.reporter.start(start.step)
    world, rows = job.world, config.data.global_batch_size
    told = set(start.damaged)  # damaged shards that the console has named
    done, spent, ends = start, Spent(world), False
    while done.step < last and not ends:
        lr = learning_rate(done.step, config.optim, num_steps=last)
        spent.begin(time.perf_counter())
        result = _step(job, batches, done, lr=lr)
        spent.end(time.perf_counter())
        if result.goes_back:
            done = roll_back(job, done, result)  # `batches` stands behind the bad step's rows already
            spent = Spent(world)
            placer.take_record()  # of a move that is undone
            writer.close()
            writer = MetricsWriter(job.folder, world, restored_step=done.step)
            job.reporter.start(done.step)
            continue
        done = done.forward(rows=rows, watch=after(config.watch, done.watch, result.figures, result.finding))
        job.crash.at(step=done.step, position=done.position)
        job.reporter.step(done.step)
        job.saver.look()
        ends = result.ends
        placer.look(done)

        evaluates = done.step == last or done.step % config.eval.every_steps == 0
        saves = ends or done.step == last or done.step % config.checkpoint.every_steps == 0
        logs = evaluates or done.step % config.run.log_every_steps == 0
        if (logs or saves) and config.data.max_skipped_shards:
            share_damaged(job, batches, told)
            done = replace(done, damaged=batches.damaged)
        if logs:
            speed = rows * spent.steps / spent.seconds
            record = measure(job, result, done, lr=lr, rows_per_second=speed, evaluates=evaluates)
            if config.data.max_skipped_shards:
                record["skipped_shards"] = len(batches.damaged)
            record |= stragglers.record(spent, say=job.reporter.say) | job.saver.take_record() | placer.take_record()
            writer.write(record)
            job.reporter.record(record)
            spent = Spent(world)
        if saves:
            save(job, done)
            done = done.saved()
    is_saved = job.saver.finish(goes_on=done.step < last)
    writer.close()
    if done.step < last:
        what = "is written; the same command goes on from it"
        if not is_saved:
            what = "is missing, see above; the same command goes on from the one before it"
        job.reporter.say(f"asked to end: the checkpoint of step {done.step} of {last} {what}")
        return "preempted"
    job.reporter.say(f"done: step {last}; checkpoints, metrics and config are in {job.folder.path}")
    return "done"


def _step(job: Job, batches: TrainBatches, done: Progress, *, lr: float) -> StepResult:
    """The one after `done`."""
    rows, say = job.config.data.global_batch_size, job.reporter.say
    return train_step(
        job.engine,
        batches,
        job.world,
        job.settings,
        step=done.step,
        lr=lr,
        memory=job.memory,
        past=done.watch,
        is_asked_to_end=lambda: job.preemption.is_asked,
        tell=partial(tell_of, job.world, job.folder, done, rows=rows, say=say),
    )


def open_saver_of(config: Config, world: World, reporter: Reporter) -> AbstractContextManager[Saver]:
    """The run's saver; every rank enters it."""
    # Half of the watchdog's patience: a rank that ends with an error tells the others after the wait, before they call it a hang.
    patience_s = config.parallel.watchdog_s / 2
    return open_saver(
        RunFolder(Path(config.run.dir)).checkpoints, world, config.checkpoint, patience_s=patience_s, say=reporter.say
    )


def share_damaged(job: Job, batches: TrainBatches, told: set[str]) -> None:
    """Adds the damaged shards that other ranks met, so that the limit is that of all ranks, and names new ones on the console."""
    found = {path: problem for part in job.world.all_gather_object(batches.damaged) for path, problem in part.items()}
    for path in sorted(found.keys() - told):
        job.reporter.say(f"skipped: {found[path]}")
    told.update(found)
    batches.add_damaged(found)
