"""The preflight as a batch script starts it: real processes as nodes, good ones and each kind of bad one."""

import socket
import sys
from pathlib import Path

import pytest

from launcher.preflight import main
from tests.launcher.nodes import PREFLIGHT, TINY, arguments, attend, in_this_process, row, slow_third_node, srun, start


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
        (
            {**srun(0, 2), "SLURM_STEP_TASKS_PER_NODE": "2"},
            [],
            ["one task on each node", "there are 2", "--ntasks-per-node=1"],
        ),
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
    # a run on CPUs asks for none, and a nvidia-smi that fails is nothing to it
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environ["PATH"] = f"{tmp_path}:/usr/bin:/bin"
    assert in_this_process(arguments(shards, tmp_path), environ)[0] == 1
    assert in_this_process(arguments(shards, tmp_path), environ | {"DS_ACCELERATOR": "cpu"})[0] == 0
