"""What slurm/train_1b.sh does after each way in which its programs may end; srun, scontrol and sleep are stand-ins that note their calls.

The others here submit it to a real SLURM, whose commands do not fail when they should.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT

SRUN = """\
case "$*" in
*--overlap*) [[ "$*" != *"--nodelist=${LOST:-none} "* ]] ;;
*preflight.py*) [ -z "${FOUND:-}" ] || echo "$FOUND" >"${!#}"; exit "${PREFLIGHT_RC:-0}" ;;
*) [ -z "${DONE:-}" ] || echo "step 5" >"$RUN_DIR/done"; exit "${TRAIN_RC:-0}" ;;
esac
"""
SCONTROL = """\
case "$*" in
"show hostnames"*) printf 'n1\\nn2\\n' ;;
"show job"*) echo "JobId=77 ReqNodeList=(null) ExcNodeList=${EXCLUDED:-(null)} NodeList=n[1-2]" ;;
*) echo "scontrol $*" >>"$CALLS"; [[ " ${FAILS:-} " != *" $1 "* ]] || { echo "slurm error: no $1 today"; exit 1; } ;;
esac
"""


@dataclass(frozen=True)
class Ended:
    """calls: those that change the job."""

    code: int
    log: str
    calls: list[str]

    @property
    def last(self) -> str:
        return self.log.rstrip().splitlines()[-1].partition("] ")[2]


def script(folder: Path, **environ: str) -> Ended:
    """Runs it in job 77 on n1 and n2, of two ranks each."""
    programs, run = folder / "bin", folder / "run"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sleep", "echo sleep >>$CALLS\n")):
        (programs / name).write_text(f"#!/bin/bash\n{text}")
        (programs / name).chmod(0o755)
    calls = folder / "calls"
    calls.touch()
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "test", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
    place = {"SLURM_SUBMIT_DIR": str(ROOT), "RUN_DIR": str(run), "CALLS": str(calls), "SLURM_NTASKS_PER_NODE": "2"}
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "train_1b.sh")],
        env={**os.environ, **path, **job, **place, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return Ended(done.returncode, done.stdout, calls.read_text().splitlines())


EXCLUDE = "scontrol update jobid=77 ExcNodeList=n1"
HELD, REQUEUED, RELEASED = "scontrol requeuehold 77", "scontrol requeue 77", "scontrol release 77"


@pytest.mark.parametrize(
    ("environ", "code", "calls", "last"),
    [
        ({"DONE": "1"}, 0, [], "done: step 5"),
        ({}, 1, [], "failed: srun ended with 0 but"),
        ({"TRAIN_RC": "85"}, 1, [REQUEUED, "sleep"], "ended early at the beginning; the job goes back into the queue"),
        ({"TRAIN_RC": "3"}, 3, [], "failed with 3 at the beginning"),
        (
            {"TRAIN_RC": "3", "LOST": "n1"},
            1,
            [HELD, EXCLUDE, RELEASED],
            "lost nodes: n1; they are excluded and",
        ),
        ({"PREFLIGHT_RC": "143"}, 1, [REQUEUED, "sleep"], "asked to end during the preflight; the job goes back"),
        ({"PREFLIGHT_RC": "3"}, 1, [], "stopped: the preflight ended with 3, and no node can be blamed"),
        (
            {"PREFLIGHT_RC": "1", "FOUND": "n1"},
            1,
            [HELD, EXCLUDE, RELEASED],
            "bad nodes: n1; they are excluded and",
        ),
        # what was excluded before, by the user or by the start before, stays so
        (
            {"PREFLIGHT_RC": "1", "FOUND": "n1", "EXCLUDED": "n[7-8],n4"},
            1,
            [HELD, f"{EXCLUDE},n[7-8],n4", RELEASED],
            "bad nodes: n1; they are excluded and",
        ),
        # of an array only this element
        (
            {"TRAIN_RC": "85", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"},
            1,
            ["scontrol requeue 70_3", "sleep"],
            "ended early at",
        ),
    ],
)
def test_each_ending_has_its_answer(tmp_path: Path, environ: dict[str, str], code: int, calls: list[str], last: str):
    ended = script(tmp_path, **environ)
    assert (ended.code, ended.calls) == (code, calls), ended.log
    assert ended.last.startswith(last), ended.log


@pytest.mark.parametrize(
    ("environ", "calls", "last"),
    [
        (
            {"TRAIN_RC": "85", "FAILS": "requeue"},
            [REQUEUED],
            "stopped: the job cannot be requeued (see above); to go on: sbatch with the same RUN_DIR",
        ),
        (
            {"PREFLIGHT_RC": "143", "FAILS": "requeue"},
            [REQUEUED],
            "stopped: the job cannot be requeued (see above); to go on: sbatch with the same RUN_DIR",
        ),
        (
            {"PREFLIGHT_RC": "1", "FOUND": "n1", "EXCLUDED": "n4", "FAILS": "requeuehold"},
            [HELD],
            "stopped: the job cannot be requeued (see above); to go on: sbatch --exclude=n1,n4 with the same RUN_DIR",
        ),
        # released it would find the bad node again, and again
        (
            {"PREFLIGHT_RC": "1", "FOUND": "n1", "FAILS": "update"},
            [HELD, EXCLUDE],
            "held: n1 cannot be excluded (see above); to go on: scancel 77, then sbatch --exclude=n1 with the same RUN_DIR",
        ),
        (
            {"TRAIN_RC": "3", "LOST": "n1", "FAILS": "release"},
            [HELD, EXCLUDE, RELEASED],
            "held: to go on: scontrol release 77",
        ),
    ],
)
def test_a_job_that_slurm_does_not_let_change_ends_and_says_how_to_go_on(
    tmp_path: Path, environ: dict[str, str], calls: list[str], last: str
):
    """And does not train on a node that is bad."""
    ended = script(tmp_path, **environ)
    assert (ended.code, ended.calls) == (1, calls), ended.log
    assert ended.last == last
    assert f"slurm error: no {environ['FAILS']} today" in ended.log
