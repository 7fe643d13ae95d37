"""The preflight as a batch script starts it: real processes as nodes, good ones and each kind of bad one.

A node is a process with srun's variables. Most are warm ones of the pool, which start together however busy the machine is.
"""

import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist

from data.tokenizer import bytes_tokenizer
from data.writer import ShardSetWriter
from launcher.environment import PACKAGES
from launcher.preflight import main
from parallel.bandwidth import Link, Rate

ROOT = Path(__file__).resolve().parents[2]
PREFLIGHT = str(ROOT / "launcher" / "preflight.py")
TINY = str(ROOT / "configs" / "tiny_cpu.yaml")
STARTERS = ("SLURM", "OMPI_", "PMI", "MPI_", "MASTER_")
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CUDA_VISIBLE_DEVICES")
FOREVER_S = "90"  # a patience that no test waits for

Ended = tuple[int, str, str]  # exit code, stdout, stderr


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("preflight")
    for name in ("train", "heldout"):
        writer = ShardSetWriter(out / name, tokenizer=(tokenizer := bytes_tokenizer()), shard_tokens=10**9)
        writer.add(np.array([1, 2, 3, 0], dtype=tokenizer.dtype), num_bytes=3)
        writer.end_shard()
        writer.close()
    return out


@pytest.fixture
def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def arguments(shards: Path, shared: Path, *more: str, patience: str = FOREVER_S, megabytes: str = "0") -> list[str]:
    values = {"data.shards": shards / "train", "data.heldout": shards / "heldout", "run.dir": shared / "run"}
    sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    return ["--config", TINY, *sets, "--patience-s", patience, "--bandwidth-mb", megabytes, *more]


def bare() -> dict[str, str]:
    """This process's environment without what any starter has put into it."""
    return {name: value for name, value in os.environ.items() if not name.startswith(STARTERS) and name not in NAMES}


def srun(rank: int, size: int, *, port: int = 1) -> dict[str, str]:
    """What srun --ntasks-per-node=1 sets on node `rank` of n1, n2, ..."""
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_RESTART_COUNT": "1",
        "SLURM_STEP_ID": "3",
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(rank),
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{size})",
        "SLURM_STEP_NODELIST": f"n[1-{size}]",
        "SLURMD_NODENAME": f"n{rank + 1}",
        "MASTER_ADDR": "127.0.0.1",  # n1 is a name of this test alone
        "MASTER_PORT": str(port),
    }


def in_this_process(argv: Sequence[str], environ: dict[str, str]) -> Ended:
    out, error = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, {**bare(), **environ}, clear=True),
        mock.patch.object(sys, "path", sys.path.copy()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
    ):
        return main(argv), out.getvalue(), error.getvalue()


def slow_third_node(link: Link) -> Rate:
    return Rate(0.1, 0.1) if 2 in link.ranks else Rate(2.0, 2.0)


def attend(nodes: list[list[str] | None], port: int, measure: Callable[[Link], Rate] | None = None) -> Ended | None:
    """This rank's node, by its command line; None: it never starts."""
    rank = dist.get_rank()
    argv = nodes[rank] if rank < len(nodes) else None
    if argv is None:
        return None
    if measure is None:
        return in_this_process(argv, srun(rank, len(nodes), port=port))
    with mock.patch.multiple("parallel.bandwidth", measure=measure, open_store=mock.Mock(return_value="a store")):
        return in_this_process(argv, srun(rank, len(nodes), port=port))


def start(*command: str, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env={**bare(), **environ}, capture_output=True, text=True, timeout=100)


def row(out: str, name: str) -> list[str]:
    """The cells of a node's row in the table."""
    (line,) = (line for line in out.splitlines() if line.startswith(f"│ {name}"))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_two_good_nodes_measure_their_link_and_leave_nothing_behind(pool, shards: Path, tmp_path: Path, port: int):
    bad = tmp_path / "bad"
    bad.write_text("n9\n")
    (tmp_path / "shared" / ".preflight-77.2-0").mkdir(parents=True)  # of the start before, which was killed
    argv = arguments(shards, tmp_path / "shared", "--bad-nodes-file", str(bad), megabytes="2")
    first, second = pool(2).run(attend, [argv, argv], port, timeout=100)
    assert first[0] == 0, first
    assert second == (0, "", "")
    assert first[1].splitlines()[-1] == "all nodes are good"
    for name in ("n1", "n2"):
        cells = row(first[1], name)
        assert cells[7:9] == ["ok", "ok"]
        assert abs(float(cells[9].removesuffix(" s"))) < 1
        assert float(cells[10]) > 0
        assert float(cells[11]) > 0
    assert bad.read_text() == ""
    assert list((tmp_path / "shared").iterdir()) == []


def test_a_node_that_never_starts_and_one_with_another_folder_are_named(pool, shards: Path, tmp_path: Path, port: int):
    bad = tmp_path / "bad"
    here, elsewhere = (
        arguments(shards, tmp_path / name, "--bad-nodes-file", str(bad), patience="4") for name in ("here", "there")
    )
    first, second, third, _ = pool(4).run(attend, [here, here, elsewhere, None], port)
    assert [ended[0] for ended in (first, second, third)] == [1, 1, 1]
    assert first[1].splitlines()[-1] == "bad nodes: n3,n4"
    assert "n3: folder: each node must tell its facts, but n3 has written nothing within 4 s" in first[1]
    assert bad.read_text() == "n3,n4\n"
    assert second[1:] == ("", "")
    assert third[1] == ""  # the batch script must not take its word for it
    assert third[2].startswith("error (rank 2): n3: most nodes must meet in ")
    assert "only 1 of 4 are seen from here" in third[2]


def test_a_first_node_with_another_folder_is_named_by_the_others(pool, shards: Path, tmp_path: Path, port: int):
    here, elsewhere = (arguments(shards, tmp_path / name, patience="4") for name in ("here", "there"))
    first, second, third, _ = pool(4).run(attend, [elsewhere, here, here], port)
    assert [ended[0] for ended in (first, second, third)] == [1, 1, 1]
    assert (first[1], third[1]) == ("", "")
    assert second[1].splitlines()[-1] == "bad nodes: n1"


def test_a_node_with_a_slow_link_is_named(pool, shards: Path, tmp_path: Path, port: int):
    argv = arguments(shards, tmp_path, megabytes="1")
    first, second, third, _ = pool(4).run(attend, [argv] * 3, port, slow_third_node)
    assert [ended[0] for ended in (first, second, third)] == [1, 1, 1]
    assert first[1].splitlines()[-1] == "bad nodes: n3"
    assert (
        "n3: network: half of the 2 GB/s that is usual here must be reached, but all-reduce between n3 and n2 and n1"
        in first[1]
    )
    assert row(first[1], "n1")[10] == "2, 0.1"


def test_a_node_with_another_commit_is_named(pool, shards: Path, tmp_path: Path, port: int):
    clone = tmp_path / "clone"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(clone), "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "another"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    argv = arguments(shards, tmp_path / "shared")
    other = subprocess.Popen(
        [sys.executable, str(clone / "launcher" / "preflight.py"), *argv],
        cwd=tmp_path,
        env={**bare(), **srun(1, 2)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        first, _ = pool(2).run(attend, [argv, None], port, timeout=100)
        said, _ = other.communicate(timeout=100)
    finally:
        other.kill()
        other.wait()
    assert (other.returncode, said) == (1, "")
    assert first[0] == 1
    assert first[1].splitlines()[-1] == "bad nodes: n2"
    assert f"n2: commit: it must be the same on all nodes, but n2 has {commit} and 1 of 2 nodes have " in first[1]
    assert row(first[1], "n2")[1] == f"{commit[:8]}!"


def test_shards_that_are_nowhere_are_no_nodes_fault(pool, tmp_path: Path, port: int):
    argv = arguments(tmp_path / "none", tmp_path)
    first, second = pool(2).run(attend, [argv, argv], port)
    assert (first[0], second[0]) == (3, 3)
    assert first[1].count("there is no folder of shards at") == 2
    assert first[1].splitlines()[-1] == "leaving out nodes would not help: see above"
    assert "bad nodes" not in first[1]


def test_under_mpirun_the_facts_come_by_mpi_and_a_folder_of_its_own_is_seen(shards: Path, tmp_path: Path):
    mpirun = str(Path(sys.executable).with_name("mpirun"))  # of the mpich that requirements.lock pins
    command = [mpirun]
    for rank, name in enumerate(("here", "here", "there")):
        node = ["-n", "1", "-env", "SLURMD_NODENAME", f"m{rank + 1}", sys.executable, PREFLIGHT]
        patience = arguments(shards, tmp_path / name, patience="8")
        command += [*([":"] if rank else []), *node, *patience]
    done = start(*command, folder=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "bad nodes: m3"
    assert "m3: folder: " in done.stdout
    assert [row(done.stdout, name)[7] for name in ("m1", "m2")] == ["ok", "ok"]
    assert row(done.stdout, "m3")[7] == "ok!"
    assert list((tmp_path / "here").iterdir()) == list((tmp_path / "there").iterdir()) == []


def test_by_itself_it_checks_this_machine_from_any_folder(shards: Path, tmp_path: Path):
    done = start(sys.executable, PREFLIGHT, *arguments(shards, tmp_path), folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert row(done.stdout, socket.gethostname())[7:9] == ["ok", "ok"]
    assert list(tmp_path.iterdir()) == []


def test_help_imports_nothing_that_takes_time(tmp_path: Path):
    code = f"""
import runpy, sys
sys.argv = ["preflight.py", "--help"]
try:
    runpy.run_path({PREFLIGHT!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0
print(sorted({{"torch", "pydantic", "yaml", "numpy", "rich", "mpi4py"}} & set(sys.modules)))
"""
    done = start(sys.executable, "-c", code, folder=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "bad nodes: n2,n5" in done.stdout


@pytest.mark.parametrize(
    ("environ", "more", "parts"),
    [
        ({}, ["--set", "optim.lrr=3"], ["optim.lrr"]),
        ({**srun(0, 2), "SLURM_STEP_TASKS_PER_NODE": "2"}, [], ["one task on each node", "there are 2", "-per-node=1"]),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
            [],
            ["with srun or mpirun", "torchrun has started 2"],
        ),
    ],
)
def test_a_wrong_command_or_config_is_one_sentence_and_2(
    shards: Path, tmp_path: Path, environ: dict[str, str], more: list[str], parts: list[str]
):
    code, out, error = in_this_process(arguments(shards, tmp_path, *more), environ)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert all(part in error for part in parts), error


def test_a_config_that_only_another_node_cannot_read_is_that_nodes_fault(shards: Path, tmp_path: Path):
    """srun ends with the highest code of its tasks: 2 would say that the command is wrong, where the first node says 1 and names it."""
    argv = ["--config", str(tmp_path / "missing.yaml")]
    assert in_this_process(argv, srun(0, 2))[0] == 2
    assert in_this_process(argv, srun(1, 2))[0] == 1


@pytest.mark.parametrize(
    "flags", [["--gpus", "many"], ["--gpus", "-1"], ["--patience-s", "inf"], ["--min-gpu-gb", "x"]]
)
def test_a_number_that_is_none_is_refused(flags: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["--config", TINY, *flags])
    assert ended.value.code == 2
    assert f"argument {flags[0]}: must be a" in capsys.readouterr().err


def test_gpus_that_are_asked_for_and_not_there_make_a_node_bad(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    environ = {"SLURMD_NODENAME": "n7", "SLURM_GPUS_ON_NODE": "8", "DS_ACCELERATOR": ""}
    code, out, _ = in_this_process(arguments(shards, tmp_path), environ)
    assert (code, "n7 has 0 and SLURM promised 8" in out, out.splitlines()[-1]) == (1, True, "bad nodes: n7")
    # a run on CPUs asks for none
    assert in_this_process(arguments(shards, tmp_path), environ | {"DS_ACCELERATOR": "cpu"})[0] == 0
