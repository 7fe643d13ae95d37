"""Nodes that differ in what they see and run: the shared folder, the clone, the shards; and who is blamed for it."""

import shutil
import subprocess
import sys
from pathlib import Path

from launcher.imports import PACKAGES
from tests.launcher.nodes import (
    PREFLIGHT,
    ROOT,
    arguments,
    attend,
    bare,
    row,
    srun,
    start,
)


def test_a_node_that_never_starts_and_one_with_another_folder_are_named(pool, shards: Path, tmp_path: Path, port: int):
    bad = tmp_path / "bad"
    here, elsewhere = (
        arguments(shards, tmp_path / name, "--bad-nodes-file", str(bad), patience="4") for name in ("here", "there")
    )
    first, second, third, fourth = pool(4).run(attend, [here, here, here, elsewhere, None], port)
    assert [ended[0] for ended in (first, second, third, fourth)] == [1, 1, 1, 1]
    assert first[1].splitlines()[-1] == "bad nodes: n4,n5"
    assert "n4: folder: each node must tell its facts, but n4 has written nothing within 4 s" in first[1]
    assert bad.read_text() == "n4,n5\n"
    assert second[1:] == third[1:] == ("", "")
    assert fourth[1] == ""  # the batch script must not take its word for it
    assert fourth[2].startswith("error (rank 3): n4: most nodes must meet in ")
    assert "only 1 of 5 are seen from here" in fourth[2]


def test_of_two_nodes_that_do_not_see_each_other_neither_is_blamed(pool, shards: Path, tmp_path: Path, port: int):
    here, elsewhere = (arguments(shards, tmp_path / name, patience="2") for name in ("here", "there"))
    first, second = pool(2).run(attend, [elsewhere, here], port)
    assert (first[0], second[0]) == (3, 1)  # srun ends with the highest
    assert first[1].splitlines()[-1] == "leaving out nodes would not help: see above"
    assert "1 of 2 see" in first[1]
    assert second[1] == ""


def test_a_node_that_speaks_as_another_version_is_named(pool, shards: Path, tmp_path: Path, port: int):
    meeting = tmp_path / "shared" / ".preflight-77.3-1"
    meeting.mkdir(parents=True)
    (meeting / "facts-2.json").write_text('{"rank": 2, "node": "n3", "colour": "red"}')
    argv = arguments(shards, tmp_path / "shared")
    first, second, third = pool(4).run(attend, [argv, argv, None], port)[:3]
    assert (first[0], second[0], third) == (1, 1, None)
    assert first[1].splitlines()[-1] == "bad nodes: n3"
    assert "n3: commit: it must be the same on all nodes, but n3 tells its facts as another version" in first[1]
    assert first[2] == ""


def test_a_first_node_with_another_folder_is_named_by_the_others(pool, shards: Path, tmp_path: Path, port: int):
    here, elsewhere = (arguments(shards, tmp_path / name, patience="4") for name in ("here", "there"))
    first, second, third, _ = pool(4).run(attend, [elsewhere, here, here], port)
    assert [ended[0] for ended in (first, second, third)] == [1, 1, 1]
    assert (first[1], third[1]) == ("", "")
    assert second[1].splitlines()[-1] == "bad nodes: n1"


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
