"""What a run puts into a checkpoint and takes out of one: at its start, and when the watch sends it back.

Owns which state that is, and what may not have changed since. Does not own the files (train/checkpoint.py), when a write happens
(train/saver.py), nor when one is due (train/run.py, the caller, on every rank).
"""

from pathlib import Path

from data.difference import describe_changes, summarize
from data.index import check_tokenizer
from data.split import one_source
from model.parameters import states_of
from train import checkpoint
from train.begin import begin_from
from train.config import check_resume
from train.job import Job
from train.progress import Progress, no_way_back
from train.together import on_every_rank
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
            "layout": {"processes": job.world.world_size, "ep_size": job.layout.ep_size},
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
    return _restore_from(job, newest)


def roll_back(job: Job, done: Progress) -> Progress:
    """Everything but the position as the newest whole checkpoint has it; the rows of the step after `done` are stepped over.

    Raises:
        RuntimeError: there is no whole checkpoint; or the save that was on failed, and the config says stop.
    """
    job.saver.settle()
    newest = checkpoint.latest(job.folder.checkpoints, mesh=job.world)
    if newest is None:
        raise RuntimeError(no_way_back(done.step + 1, job.folder.checkpoints))
    saved = _restore_from(job, newest)
    back = done.back(saved, rows=job.config.data.global_batch_size)
    job.reporter.say(f"back to step {back.step}; rows {saved.position} to {back.position - 1} are stepped over")
    return back


def _restore_from(job: Job, newest: Path) -> Progress:
    for sentence in on_every_rank(job.world, lambda: _check_same_run(job, newest)):
        job.reporter.say(sentence)
    # `latest` has just compared the checksums
    saved = checkpoint.load(newest, fragments=job.engine.fragments(), mesh=job.world, verify=False)
    found = Progress(saved.step, saved.position, WatchState.of(saved.extra.get("watch")))
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


def _check_same_run(job: Job, newest: Path) -> list[str]:
    """Sentences for the log about what could not be compared."""
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
