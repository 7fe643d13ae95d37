"""What a run puts into a checkpoint and takes out of one: at its start, and when the watch sends it back.

Owns which state that is, and what may not have changed since. Does not own the files (train/checkpoint.py), when a write happens
(train/saver.py), nor when one is due (train/run.py, the caller, on every rank).
"""

from dataclasses import replace
from pathlib import Path

from data.difference import describe_changes, summarize
from data.index import check_tokenizer
from data.split import one_source
from model.parameters import states_of
from train import checkpoint
from train.begin import begin_from
from train.checkpoint_folder import step_of
from train.config import check_resume
from train.incident import bad_step, count_rollbacks, write_event
from train.job import Job
from train.placing import restore_placement, saved_placement
from train.progress import Progress, no_way_back
from train.step import StepResult
from train.together import on_every_rank, on_rank_zero
from train.watch import WatchState


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
            "heldout_fingerprint": job.data.heldout.fingerprint,
            "heldout": summarize(one_source(job.data.heldout)),
            "watch": at.watch.saved(),
            "damaged_shards": job.data.train.names_of(at.damaged),
            "layout": {"processes": job.world.world_size, "ep_size": job.layout.ep_size},
            **saved_placement(job),
        },
    )
    tensors = {} if job.memory is None else job.memory.tensors()
    if job.world.rank == 0:  # the states are the same on all
        tensors |= states_of(job.engine.model)
    job.saver.save(state, fragments=job.engine.owned_fragments(), tensors=tensors)


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
    found = _restore_from(job, newest)
    for place in sorted(found.damaged):
        job.reporter.say(f"passed over before this start, and counted: {found.damaged[place]}")
    # a start that was killed, or stopped at the limit, has not saved how often it went back
    told = job.world.all_gather_object(on_rank_zero(job.world, lambda: count_rollbacks(job.folder)))[0]
    return replace(found, watch=replace(found.watch, rollbacks=max(told, found.watch.rollbacks)))


def roll_back(job: Job, done: Progress, result: StepResult) -> Progress:
    """Everything but the position as a checkpoint has it; the rows of the step after `done`, the bad one, are stepped over. Tells of it.

    The checkpoint is the newest whole one. If the run has come back to it and met a bad step again before the next, what is broken may be
    in it: then it is the one before, if there is one.

    Raises:
        RuntimeError: there is no whole checkpoint; or the save that was on failed, and the config says stop. It is told of as a stop.
    """
    rows = job.config.data.global_batch_size
    event = bad_step(result, job.world, step=done.step + 1, position=done.position, rows=rows)
    try:
        target = _way_back(job, done)
    except RuntimeError as error:
        stop = event | {"action": "stop", "reason": f"{event['reason']}; {error}"}
        write_event(job.folder, job.world, stop, say=job.reporter.say)
        raise
    step = step_of(target.name)
    passed_over = None if done.came_back_to in (None, step) else done.came_back_to
    way = {"back_to": step, "passed_over": passed_over}
    write_event(job.folder, job.world, event | way, say=job.reporter.say)
    saved = _restore_from(job, target)
    back = done.back(saved, rows=rows)
    job.crash.at(step=back.step, position=back.position)
    job.reporter.say(f"back to step {back.step}; rows {saved.position} to {back.position - 1} are stepped over")
    return back


def _way_back(job: Job, done: Progress) -> Path:
    job.saver.settle()
    limit = done.step if done.came_back_to is None else done.came_back_to - 1
    for up_to in dict.fromkeys((limit, done.step)):
        found = checkpoint.latest(job.folder.checkpoints, mesh=job.world, up_to=up_to)
        if found is not None:
            return found
    raise RuntimeError(no_way_back(done.step + 1, job.folder.checkpoints))


def _restore_from(job: Job, newest: Path) -> Progress:
    state = on_every_rank(job.world, lambda: checkpoint.read_state(newest))
    for sentence in on_every_rank(job.world, lambda: _check_same_run(job, state, newest)):
        job.reporter.say(sentence)
    restore_placement(job, state.extra)
    # `latest` has just compared the checksums
    saved = checkpoint.load(newest, fragments=job.engine.fragments(), mesh=job.world, verify=False)
    watch = on_every_rank(job.world, lambda: WatchState.of(saved.extra.get("watch"), where=newest))
    damaged = job.data.train.places_of(saved.extra.get("damaged_shards", []))  # of an older checkpoint: none
    found = Progress(saved.step, saved.position, watch, damaged=damaged)
    job.engine.restored(step=found.updates)
    on_every_rank(job.world, lambda: _restore_states(job, newest))
    job.reporter.say(f"resumed from {newest}: step {saved.step}, data position {saved.position}")
    return found


def _restore_states(job: Job, newest: Path) -> None:
    """What a run keeps besides weights and moments: the states of its routers and norms, the memory of its streams."""
    states = states_of(job.engine.model)
    for name, value in checkpoint.read_tensors(newest, names=states).items():
        states[name].copy_(value)
    if job.memory is not None:
        job.memory.restore(checkpoint.read_tensors(newest, names=job.memory.names()))


def _check_same_run(job: Job, saved: checkpoint.TrainState, newest: Path) -> list[str]:
    """Sentences for the log about what could not be compared."""
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
    return _check_same_heldout(job, saved, newest)


def _check_same_heldout(job: Job, saved: checkpoint.TrainState, newest: Path) -> list[str]:
    """A loss on other targets would not go on the curve."""
    index, was = job.data.heldout, saved.extra.get("heldout_fingerprint")
    old_place, place = saved.config["data"]["heldout"], job.config.data.heldout
    if was is None and old_place == place:
        return [f"{newest} is from before held-out shards were recorded: they were not compared"]
    if was is None:
        raise ValueError(
            f"data.heldout may move only where the shards can be compared, but {newest} did not record them, and data.heldout was "
            f"{old_place} and is {place}: give the old value, and the new one after the next checkpoint"
        )
    if was != index.fingerprint:
        raise ValueError(
            f"a run must keep the held-out shards it began with, but since {newest} those in {index.folder} changed: "
            f"{describe_changes(saved.extra['heldout'], one_source(index))} (the fingerprint was {was} and is {index.fingerprint}): "
            "restore the shards, or choose another run.dir to start a new run"
        )
    return []
