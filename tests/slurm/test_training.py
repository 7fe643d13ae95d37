"""slurm/train_tiny.sh, whose body is that of train_1b.sh, on a real SLURM: what it survives, and what it refuses."""

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import LOGIN, Cluster, wait_until
from tests.slurm.jobs import ENDLESS, ONE_EACH, START_S, Jobs, train_here

pytestmark = pytest.mark.timeout(400)  # of a busy machine; together they take 3 minutes on an idle one


def test_a_job_that_is_preempted_goes_on_and_has_the_losses_of_a_run_without_slurm(jobs: Jobs, pool):
    """Two nodes with two ranks each."""
    job = jobs.submit("train", sets=("run.steps=60",))
    jobs.at_step("train", 10)
    jobs.cluster.signal(job, "TERM")
    state = jobs.wait(job, limit_s=250)
    log = jobs.log("train")
    assert (state.state, state.restarts) == ("COMPLETED", 1), log
    assert re.search(r"restart 0\] ended early at step_\d{6}; the job goes back into the queue", log)
    assert re.search(r"restart 1\] start on n\[1-2\] from step_\d{6}", log)
    assert "restart 1] done: step 60" in log

    pool(4).run(train_here, jobs.of_steps(60), "here", 4, 2, timeout=200)
    assert jobs.losses("train") == jobs.losses("here")
    assert len(jobs.losses("train")) == 60


def test_a_rank_that_is_killed_ends_the_job_with_what_the_others_saw(jobs: Jobs):
    job = jobs.submit("killed", ONE_EACH, sets=ENDLESS)
    jobs.at_step("killed", 5)
    began = time.monotonic()
    os.kill(a_rank_of(jobs.folder / "killed"), signal.SIGKILL)
    state = jobs.wait(job)
    assert time.monotonic() - began < 30
    log = jobs.log("killed")
    assert (state.state, state.restarts) == ("FAILED", 0)
    told = log[log.index("failed with") :]
    assert re.search(r"rank 0 of 2 on \S+, after step \d+: .* a rank is gone: rank 1 ", told), log
    assert "to go on: the same command in the same folder" in told


def a_rank_of(folder: Path) -> int:
    """The process number of rank 1 of the run in `folder`."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            command = process.joinpath("cmdline").read_bytes().split(b"\0")
            variables = process.joinpath("environ").read_bytes().split(b"\0")
            if f"run.dir={folder}".encode() in command and b"SLURM_PROCID=1" in variables:
                return int(process.name)
    raise AssertionError("there is no such rank")


def test_a_second_job_on_a_run_folder_is_refused_and_the_first_saves_and_stays_away_when_it_is_cancelled(jobs: Jobs):
    first = jobs.submit("shared", ONE_EACH, sets=ENDLESS)
    jobs.at_step("shared", 5)
    second = jobs.submit("shared", ONE_EACH, sets=ENDLESS)
    assert jobs.wait(second).state == "FAILED"
    assert re.search(r"one process at a time", jobs.log("shared"))
    done = len(jobs.losses("shared"))
    jobs.at_step("shared", done + 5, job=first)

    jobs.cluster.on(LOGIN, "scancel", str(first))
    state = jobs.wait(first)
    assert (state.state, state.restarts) == ("CANCELLED", 0)
    assert re.search(r"ended from outside at step_\d{6}; no requeue", jobs.log("shared")), jobs.log("shared")


def test_each_element_of_an_array_trains_its_config_and_comes_back_alone(jobs: Jobs):
    """The last element's job number is the array's too: a requeue of the number would take the other one with it."""
    text = (jobs.folder / "tiny.yaml").read_text()
    for name, steps in (("one", 150), ("two", 160)):
        (jobs.folder / f"{name}.yaml").write_text(text.replace("steps: 100", f"steps: {steps}"))
    options = ("--array=0-1", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--mem=100")
    output = f"--output={jobs.folder}/sweep-%A_%a.out"
    configs = [str(jobs.folder / f"{name}.yaml") for name in ("one", "two")]
    environ = {"PREFLIGHT": "0", "RUNS": str(jobs.folder / "runs"), "DS_ACCELERATOR": "cpu"}
    job = jobs.cluster.submit(*options, output, "slurm/sweep.sh", *configs, environ=environ)
    jobs.numbers.append(job)
    wait_until(lambda: len(jobs.losses("runs/1-two")) > 5, limit_s=START_S)
    jobs.cluster.signal(f"{job}_1", "TERM")
    for element, restarts in ((0, 0), (1, 1)):
        state, log = jobs.wait(f"{job}_{element}"), (jobs.folder / f"sweep-{job}_{element}.out").read_text()
        assert (state.state, state.restarts) == ("COMPLETED", restarts), log
    assert [len(jobs.losses(f"runs/{name}")) for name in ("0-one", "1-two")] == [150, 160]


def test_mpirun_starts_the_ranks_too(jobs: Jobs):
    job = jobs.submit("mpirun", ONE_EACH, sets=("run.steps=4",), LAUNCH="mpirun")
    assert jobs.wait(job).state == "COMPLETED", jobs.log("mpirun")
    assert len(jobs.losses("mpirun")) == 4


def test_a_node_that_the_preflight_finds_bad_is_excluded_and_the_others_train(jobs: Jobs):
    """n1 does not see the shards."""
    job = jobs.submit("bad", ONE_EACH, sets=("run.steps=4",), **jobs.blind_on("n1"))
    state = jobs.wait(job, limit_s=300)
    log = jobs.log("bad")
    assert (state.state, state.restarts, state.nodes) == ("COMPLETED", 1, "n[2-3]"), log
    assert "bad nodes: n1; they are excluded and the job goes back into the queue" in log
    assert "n1: shards: it must not fail, but on n1 there is no folder of shards" in log


def test_a_job_that_starts_three_times_from_the_same_checkpoint_stops(jobs: Jobs):
    job = jobs.submit("stuck", "--hold")
    (jobs.folder / "stuck").mkdir()
    (jobs.folder / "stuck" / f"attempts-{job}").write_text("the beginning\n" * 2)
    jobs.cluster.on(LOGIN, "scontrol", "release", str(job))
    assert jobs.wait(job).state == "FAILED"
    assert "stopped: this is the third start from the beginning, the two before made no progress" in jobs.log("stuck")


def test_slurm_accepts_every_script_as_it_is(cluster: Cluster):
    for script in ("train_1b.sh", "train_tiny.sh", "sweep.sh"):
        assert "to start at" in cluster.on(LOGIN, "sbatch", "--test-only", f"slurm/{script}")


def test_a_run_folder_that_the_script_does_not_know_is_refused(jobs: Jobs):
    job = jobs.submit("elsewhere", sets=("run.dir=elsewhere",))
    assert jobs.wait(job).code == 2
    assert "the run folder must be given as RUN_DIR" in jobs.log("elsewhere")


def test_a_script_that_is_submitted_from_another_folder_says_so(jobs: Jobs):
    job = jobs.cluster.submit(f"--output={jobs.folder}/far.out", f"{os.getcwd()}/slurm/train_1b.sh", cwd=jobs.folder)
    assert jobs.wait(job).code == 2
    assert "must be called in the folder of the clone" in (jobs.folder / "far.out").read_text()
