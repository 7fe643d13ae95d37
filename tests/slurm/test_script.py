"""What slurm/train_1b.sh does after each way in which its programs may end; srun, scontrol and the like are stand-ins that note calls.

The others here submit it to a real SLURM, whose commands do not fail when they should.
"""

import fcntl
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.environment import read_environment
from tests.slurm.cluster import ROOT

CANCEL = '[ "${CANCEL_AT:-}" != "$1" ] || kill -TERM "$BATCH"\n'  # what scancel does to the batch shell
STAND_INS = {
    "srun": """\
case "$*" in
*--overlap*)
    cancel probe
    [ -z "${SILENT:-}" ] || exit 1
    case "$*" in
    *"--nodelist=${LOST:-none} "*) exit 1 ;;
    *"--nodelist=${SLOW:-none} "*) [ -e "$CALLS.slow" ] || { touch "$CALLS.slow"; exit 1; } ;;
    esac ;;
*preflight.py*) cancel preflight; [ -z "${FOUND:-}" ] || echo "bad nodes: $FOUND"; exit "${PREFLIGHT_RC:-0}" ;;
*)
    echo "$*" >"$CALLS.command"
    cancel train
    for name in ${WRITES:-}; do echo "step 5" >"$RUN_DIR/$name"; touch -d "+1 sec" "$RUN_DIR/$name"; done
    exit "${TRAIN_RC:-0}" ;;
esac
""",
    "scontrol": """\
case "$*" in
"show hostnames "*) case "$3" in n\\[1-2\\]) printf 'n1\\nn2\\n' ;; *) tr , '\\n' <<<"$3" ;; esac; exit ;;
"show job"*) cancel show ;;
*) echo "scontrol $*" >>"$CALLS" ;;
esac
[[ " ${FAILS:-} " != *" $1 "* ]] || { echo "slurm error: no $1 today" >&2; exit 1; }
[ "$1" != show ] || echo "JobId=77 ReqNodeList=${ASKED:-(null)} ExcNodeList=${EXCLUDED:-(null)} NodeList=n[1-2]"
""",
    "sinfo": "printf '%s\\n' ${NODES-n1 n2 n3 n4}\n",
    "git": "cancel start; echo abc\n",
    "sleep": '[ "$1" != 60 ] || echo sleep >>"$CALLS"\n',
}


@dataclass(frozen=True)
class Ended:
    """calls: those that change the job. command: that of the training, after srun."""

    code: int
    log: str
    calls: list[str]
    command: str

    @property
    def last(self) -> str:
        return self.log.rstrip().splitlines()[-1].partition("] ")[2]


def script(folder: Path, *arguments: str, **environ: str) -> Ended:
    """Runs it in job 77 on n1 and n2, of two ranks each."""
    programs, run = folder / "bin", folder / "run"
    programs.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\ncancel() {{\n{CANCEL}}}\n{text}")
        (programs / name).chmod(0o755)
    calls, command = folder / "calls", folder / "calls.command"
    calls.touch()
    (folder / "env.sh").write_text("PYTHON=echo\n")
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "test", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
    job |= {"SLURMD_NODENAME": "n1", "SLURM_JOB_PARTITION": "test", "SLURM_NTASKS_PER_NODE": "2"}
    place = {"SLURM_SUBMIT_DIR": str(ROOT), "RUN_DIR": str(run), "CALLS": str(calls)}
    place |= {"ENV_SH": str(folder / "env.sh")}
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", 'BATCH=$$ exec bash "$@"', "_", str(ROOT / "slurm" / "train_1b.sh"), *arguments],
        env={**os.environ, **path, **job, **place, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    said = command.read_text() if command.exists() else ""
    return Ended(done.returncode, done.stdout, calls.read_text().splitlines(), said)


EXCLUDE = "scontrol update jobid=77 ExcNodeList=n1"
HELD, REQUEUED, RELEASED = "scontrol requeuehold 77", "scontrol requeue 77", "scontrol release 77"
EXCLUDED = [HELD, EXCLUDE, RELEASED]
BAD = {"PREFLIGHT_RC": "1", "FOUND": "n1"}


@pytest.mark.parametrize(
    ("environ", "code", "calls", "last"),
    [
        ({"WRITES": "done"}, 0, [], "done: step 5"),
        ({}, 1, [], "failed: srun ended with 0 but"),
        ({"TRAIN_RC": "85"}, 1, [REQUEUED, "sleep"], "ended early at the beginning; the job goes back into the queue"),
        ({"TRAIN_RC": "3"}, 3, [], "failed with 3 at the beginning"),
        # SIGTERM before a rank can hear it; with a crash.json one was killed in mid-run
        ({"TRAIN_RC": "143"}, 1, [REQUEUED, "sleep"], "a rank was ended by a signal, and no rank has written why; the"),
        ({"TRAIN_RC": "143", "WRITES": "crash.json"}, 143, [], ""),
        ({"TRAIN_RC": "143", "LOST": "n1"}, 1, [REQUEUED, "sleep"], "a rank was ended by a signal"),
        ({"TRAIN_RC": "3", "LOST": "n2"}, 1, ["n2"], "lost nodes: n2; they are excluded and"),
        ({"TRAIN_RC": "143", "LOST": "n2"}, 1, ["n2"], "lost nodes: n2; they are excluded and"),
        # a controller that is silent for a while is no node's fault, nor is a config
        ({"TRAIN_RC": "3", "SLOW": "n2"}, 3, [], "failed with 3 at the beginning"),
        (
            {"TRAIN_RC": "3", "SILENT": "1"},
            3,
            [],
            "no node can be asked whether it lives: SLURM itself does not answer",
        ),
        ({"TRAIN_RC": "2", "LOST": "n2"}, 2, [], "failed with 2 at the beginning"),
        ({"PREFLIGHT_RC": "143"}, 1, [REQUEUED, "sleep"], "asked to end during the preflight; the job goes back"),
        ({"PREFLIGHT_RC": "3"}, 1, [], "stopped: the preflight ended with 3, and no node can be blamed"),
        ({"PREFLIGHT_RC": "1", "LOST": "n2"}, 1, ["n2"], "lost nodes: n2; they are excluded and"),
        ({"PREFLIGHT_RC": "2", "LOST": "n2"}, 1, [], "stopped: the preflight ended with 2"),
        (BAD, 1, EXCLUDED, "bad nodes: n1; they are excluded and"),
        # the first node, where the script runs, has no such file system
        (BAD | {"RUN_DIR": "/proc/gone/run"}, 1, EXCLUDED, "bad nodes: n1; they are excluded and"),
        # what was excluded before, by the user or by the start before, stays so
        (
            BAD | {"EXCLUDED": "n[7-8],n4"},
            1,
            [HELD, f"{EXCLUDE},n[7-8],n4", RELEASED],
            "bad nodes: n1; they are excluded and",
        ),
        # a job that would wait for ever
        (
            BAD | {"ASKED": "n1,n3"},
            1,
            [],
            "stopped: bad nodes: n1, but the job asks for n1 by name; to go on: sbatch with",
        ),
        (BAD | {"ASKED": "n3,n11"}, 1, EXCLUDED, "bad nodes: n1; they are"),
        (BAD | {"NODES": "n1"}, 1, [], "stopped: bad nodes: n1, and without n1 the partition test has no node left"),
        (
            BAD | {"NODES": "n1 n11"},
            1,
            EXCLUDED,
            "without n1 the partition test has 1 node(s), and this start had 2: a",
        ),
        (BAD | {"NODES": ""}, 1, EXCLUDED, "bad nodes: n1; they are excluded"),  # sinfo does not tell
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
    expected = [call.replace("=n1", "=n2") for call in EXCLUDED] if calls == ["n2"] else calls
    assert (ended.code, ended.calls) == (code, expected), ended.log
    assert ended.last.startswith(last), ended.log
    assert ("-m train.crash" in ended.log) == ("crash.json" in environ.get("WRITES", ""))


@pytest.mark.parametrize(
    ("ending", "places"),
    [
        (BAD, ["preflight", "show"]),
        ({"PREFLIGHT_RC": "143"}, ["preflight"]),
        ({"TRAIN_RC": "85"}, ["preflight", "start", "train"]),
        ({"TRAIN_RC": "143"}, ["start", "train", "probe"]),
        ({"TRAIN_RC": "3"}, ["train", "probe"]),
        ({"TRAIN_RC": "3", "LOST": "n2"}, ["train", "probe", "show"]),
        ({}, ["start", "train"]),
    ],
)
def test_a_job_that_is_cancelled_does_not_come_back_wherever_it_was(
    tmp_path: Path, ending: dict[str, str], places: list[str]
):
    """`scontrol requeue` brings back a cancelled job too."""
    for place in places:
        (tmp_path / place).mkdir()
        ended = script(tmp_path / place, CANCEL_AT=place, **ending)
        assert (ended.code, ended.calls) == (143, []), ended.log
        assert ended.last == "ended from outside at the beginning; no requeue"
        assert place not in ("preflight", "start") or not ended.command, "it has begun to train"


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
        # what is excluded already would be forgotten
        (
            BAD | {"FAILS": "show"},
            [],
            "stopped: bad nodes: n1, but SLURM does not tell of the job (see above); to go on: sbatch --exclude=n1 with the same RUN_DIR",
        ),
        (
            BAD | {"EXCLUDED": "n4", "FAILS": "requeuehold"},
            [HELD],
            "stopped: the job cannot be requeued (see above); to go on: sbatch --exclude=n1,n4 with the same RUN_DIR",
        ),
        # released it would find the bad node again, and again
        (
            BAD | {"FAILS": "update"},
            [HELD, EXCLUDE],
            "held: n1 cannot be excluded (see above); to go on: scancel 77, then sbatch --exclude=n1 with the same RUN_DIR",
        ),
        (
            {"TRAIN_RC": "3", "LOST": "n2", "FAILS": "release"},
            [HELD, EXCLUDE.replace("=n1", "=n2"), RELEASED],
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


def test_what_an_earlier_job_has_left_is_not_believed(tmp_path: Path):
    (tmp_path / "run").mkdir()
    for name in ("done", "crash.json"):
        (tmp_path / "run" / name).write_text("step 3")
        os.utime(tmp_path / "run" / name, (1, 1))
    ended = script(tmp_path)
    assert (ended.code, ended.last.partition(" but")[0]) == (1, "failed: srun ended with 0"), ended.log


def test_the_third_start_without_progress_stops(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "attempts-77").write_text("the beginning\n" * 2)
    ended = script(tmp_path, TRAIN_RC="143")
    assert (ended.code, ended.calls, ended.command) == (1, [], "")
    assert ended.last.startswith("stopped: this is the third start from the beginning")


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        (["--set", "run.dir=/x"], {}, "the run folder must be given as RUN_DIR"),
        (["--set=run.dir=/x"], {}, "the run folder must be given as RUN_DIR"),
        ([], {"LAUNCH": "pdsh"}, "LAUNCH must be srun, torchrun, deepspeed or mpirun, but it is pdsh"),
        ([], {"PREFLIGHT": "no"}, "PREFLIGHT must be 0 or 1, but it is no"),
        ([], {"RANK_LOGS": "yes"}, "RANK_LOGS must be 0 or 1, but it is yes"),
        ([], {"SLURM_NTASKS_PER_NODE": ""}, "--ntasks-per-node, the ranks of a node, must be given"),
    ],
)
def test_what_the_user_must_change_is_said_before_any_node_is_looked_at(
    tmp_path: Path, arguments: list[str], environ: dict[str, str], said: str
):
    ended = script(tmp_path, *arguments, PREFLIGHT_RC="9", **environ)
    assert (ended.code, ended.log.count("\n")) == (2, 1), ended.log
    assert ended.log.startswith(f"error: {said}")


def test_a_launcher_gets_the_cpus_of_all_its_ranks_and_the_port_of_the_job(tmp_path: Path):
    """The port must be the one that a rank started by srun works out by itself: a user may open it in a firewall."""
    names = ("PROCID", "LOCALID", "NODEID", "STEP_ID")
    srun = {f"SLURM_{name}": "0" for name in names} | {"SLURM_JOB_ID": "4312345", "SLURM_STEP_NODELIST": "n1"}
    port = read_environment(srun | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}).master_port
    environ = {"SLURM_CPUS_PER_TASK": "3", "SLURM_JOB_ID": "4312345"}
    for launch, option in (("torchrun", f"--rdzv-endpoint=n1:{port}"), ("deepspeed", f"--master_port={port}")):
        folder = tmp_path / launch
        folder.mkdir()
        command = script(folder, LAUNCH=launch, **environ).command
        assert "--ntasks=2 --ntasks-per-node=1 --cpus-per-task=6 " in command
        assert option in command
    assert '"$0" -m deepspeed.launcher.runner --no_ssh' in command
    assert " echo --hostfile=" in command  # PYTHON, which may have no path in front of it


def test_a_job_whose_run_folder_another_one_has_does_not_come_back(tmp_path: Path):
    """Its first rank is refused, the others are ended by SIGTERM, and srun ends with 143."""
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = script(tmp_path, TRAIN_RC="143")
    assert (ended.code, ended.calls) == (143, []), ended.log
