"""What takes minutes on a real SLURM: its own time limit, a node that is lost, the other starts over two nodes, many preemptions."""

import contextlib
import re
import time

import pytest

from tests.slurm.cluster import LOGIN, JobState, wait_until
from tests.slurm.jobs import ENDLESS, ONE_EACH, START_S, Jobs, train_here

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_ten_preemptions_in_a_row_lose_nothing(jobs: Jobs, pool):
    job = jobs.submit("often", ONE_EACH, sets=("run.steps=200",))
    for number in range(10):
        jobs.at_step("often", 5 + 15 * number)
        wait_until(lambda: "0: step" in since_start(jobs, "often", number), limit_s=200)  # noqa: B023
        jobs.cluster.signal(job, "TERM")
        jobs.cluster.wait(job, limit_s=200, until=lambda state: state.restarts > number or state.is_over)  # noqa: B023
    state = jobs.wait(job, limit_s=600)
    assert (state.state, state.restarts) == ("COMPLETED", 10), jobs.log("often")
    pool(2).run(train_here, jobs.of_steps(200), "here", 2, 1, timeout=400)
    assert jobs.losses("often") == jobs.losses("here")
    assert len(jobs.losses("often")) == 200


def test_a_job_that_is_asked_to_end_during_the_preflight_comes_back_and_a_cancelled_one_does_not(jobs: Jobs):
    job = jobs.submit("early", ONE_EACH, sets=("run.steps=4",), PREFLIGHT="1")
    in_preflight(jobs, job)
    jobs.cluster.signal(job, "TERM")
    state = jobs.wait(job, limit_s=300)
    log = jobs.log("early")
    assert (state.state, state.restarts) == ("COMPLETED", 1), log
    assert "asked to end during the preflight; the job goes back into the queue" in log
    assert "restart 1] done: step 4" in log
    assert not list(jobs.folder.glob(".preflight-*")), "what the killed one has left"

    job = jobs.submit("ended", ONE_EACH, sets=("run.steps=4",), PREFLIGHT="1")
    in_preflight(jobs, job)
    jobs.cluster.on(LOGIN, "scancel", str(job))
    state = jobs.wait(job)
    assert (state.state, state.restarts) == ("CANCELLED", 0), jobs.log("ended")


def in_preflight(jobs: Jobs, job: int) -> None:
    """Until the nodes write to each other."""
    wait_until(lambda: list(jobs.folder.glob(f".preflight-{job}.*/*")), limit_s=START_S)


def test_two_bad_nodes_one_after_the_other_are_both_excluded(jobs: Jobs):
    """The second start, on n2 and n3, finds n3 bad; the third has n2 and n4."""
    job = jobs.submit("bad", ONE_EACH, sets=("run.steps=4",), **jobs.blind_on("n1", "n3"))
    state = jobs.wait(job, limit_s=400)
    log = jobs.log("bad")
    assert (state.state, state.restarts, state.nodes) == ("COMPLETED", 2, "n[2,4]"), log
    assert re.findall("bad nodes: (n.); they are excluded", log) == ["n1", "n3"]
    assert sorted(state.fields["ExcNodeList"].split(",")) in (["n1", "n3"], ["n[1", "3]"])


def since_start(jobs: Jobs, name: str, number: int) -> str:
    """The log from the start with this restart count on."""
    return jobs.log(name).rpartition(f"restart {number}] start on")[2]


def test_a_real_time_limit_takes_the_way_of_a_preemption(jobs: Jobs):
    """SLURM looks at limits every half minute, and the least is a minute."""
    job = jobs.submit("limit", ONE_EACH, "--time=2", "--signal=TERM@60", sets=ENDLESS)
    state = jobs.cluster.wait(job, limit_s=400, until=lambda state: state.restarts == 1 or state.is_over)
    assert (state.restarts, state.is_over) == (1, False), jobs.log("limit")
    assert re.search(r"restart 0\] ended early at step_\d+; the job goes back into the queue", jobs.log("limit"))


@pytest.mark.parametrize(
    ("nodes", "left"),
    [("2", ("n[1,3]", "n[1,4]", "n[3-4]")), ("1-2", ("n1", "n[1,3]", "n[1,4]", "n3", "n4", "n[3-4]"))],
)
@pytest.mark.usefixtures("namespaces")
def test_a_node_that_is_lost_is_done_without(jobs: Jobs, nodes: str, left: tuple[str, ...]):
    """On two of the other three; or, where the job may be smaller, also on one."""
    job = jobs.submit("lost", f"--nodes={nodes}", sets=("run.steps=200",))
    jobs.at_step("lost", 10)
    try:
        jobs.cluster.kill_node("n2")
        state = jobs.wait(job, limit_s=500)
    finally:
        jobs.cluster.start_node("n2")
        jobs.cluster.wait_for_nodes(limit_s=120)
    assert (state.state, state.restarts) == ("COMPLETED", 1), jobs.log("lost")
    assert state.nodes in left
    assert len(jobs.losses("lost")) == 200


@pytest.mark.parametrize("how", ["its processes die", "it falls silent"])
def test_a_dead_node_is_found_before_slurm_knows(slow_jobs: Jobs, how: str):
    """SLURM takes it for alive for 300 s yet. The other rank hears of dead processes at once, of silence by the watchdog."""
    jobs, cluster = slow_jobs, slow_jobs.cluster
    job = jobs.submit("lost", ONE_EACH, sets=("run.steps=100000", "parallel.watchdog_s=20"))
    jobs.at_step("lost", 10)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        if how == "it falls silent":
            stack.enter_context(cluster.cut_off("n2"))
        else:
            cluster.kill_node("n2")
        cluster.wait(job, limit_s=250, until=lambda state: state.restarts == 1 or state.is_over)
        took = time.monotonic() - began
        log = jobs.log("lost")
        assert "lost nodes: n2; they are excluded and the job goes back into the queue" in log
        assert cluster.job(job).fields["ExcNodeList"] == "n2", log
        print(f"excluded after {took:.0f} s")
        jobs.wait_for_start("lost", restart=1, limit_s=500)
        print(f"started again after {time.monotonic() - began:.0f} s")
    assert "restart 1] start on n[1,3] from " in jobs.log("lost")


@pytest.mark.parametrize("launch", ["torchrun", "deepspeed"])
def test_the_other_launchers_start_the_ranks_on_two_nodes(jobs: Jobs, launch: str, pool):
    job = jobs.submit(launch, sets=("run.steps=20",), LAUNCH=launch)
    state: JobState = jobs.wait(job, limit_s=400)
    assert state.state == "COMPLETED", jobs.log(launch)
    pool(4).run(train_here, jobs.of_steps(20), "here", 4, 2, timeout=200)
    assert jobs.losses(launch) == jobs.losses("here")
