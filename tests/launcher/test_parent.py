"""A launcher that has ended is noticed, whichever of its two processes it was; a shell that has ended is none.

The launchers are small scripts with the names and variables of deepspeed's; the real command: tests/end_to_end/test_kill_and_resume.py.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launcher.parent import is_deepspeed

ROOT = Path(__file__).resolve().parents[2]
STARTER = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell began the tests in the background
subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()
time.sleep(30)
"""
RANK = f"""
import os, pathlib, sys, time
sys.path.insert(0, {str(ROOT)!r})
from launcher import parent
parent.LOOK_S = 0.05
parent.watch_launcher(os.environ, pathlib.Path("told").touch)
pathlib.Path("ready").touch()
time.sleep(30)
"""
LAUNCH = "deepspeed.launcher.launch"
LONG_S = 1.0  # twenty looks


SLOW_IMPORT = """
import pathlib, time
pathlib.Path("ready").touch()
time.sleep(30)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[int, int]]]:
    """`start(name, **environment)`: a command of this name, that starts `launch`, that starts the rank; the ids of the first two."""
    running: list[subprocess.Popen[bytes]] = []

    def chain(name: str, *, rank: str = RANK, **environment: str) -> tuple[int, int]:
        for script in (name, LAUNCH):
            (tmp_path / script).write_text(STARTER)
        (tmp_path / "rank").write_text(rank)
        clean = {key: value for key, value in os.environ.items() if key not in ("CROSS_SIZE", "TORCHELASTIC_RUN_ID")}
        command = [sys.executable, name, LAUNCH, "rank"]
        with (tmp_path / "said").open("wb") as said:
            process = subprocess.Popen(
                command, cwd=tmp_path, env=clean | environment, stderr=said, start_new_session=True
            )
        running.append(process)
        wait_for(tmp_path / "ready")
        (launch,) = psutil.Process(process.pid).children()
        return process.pid, launch.pid

    yield chain
    for process in running:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_end_of_the_deepspeed_command_is_told_to_the_ranks_below_its_child(start, tmp_path: Path, number: int):
    command, launch = start("deepspeed", CROSS_SIZE="1")
    assert not (tmp_path / "told").exists()
    os.kill(command, number)
    wait_for(tmp_path / "told")
    os.kill(launch, 0)  # it is there, and has told nobody


@pytest.mark.parametrize("variable", ["CROSS_SIZE", "TORCHELASTIC_RUN_ID"])
def test_the_end_of_the_process_that_has_started_the_ranks_is_told(start, tmp_path: Path, variable: str):
    _, launch = start("anything", **{variable: "1"})
    os.kill(launch, signal.SIGKILL)
    wait_for(tmp_path / "told")


@pytest.mark.parametrize("ends", [0, 1])
def test_a_launcher_that_ends_while_the_first_imports_go_on_is_noticed(start, tmp_path: Path, ends: int):
    """They wait in pydantic here, the first package that is imported and not Python's own."""
    (tmp_path / "pydantic.py").write_text(SLOW_IMPORT)
    main = f"import runpy; runpy.run_path({str(ROOT / 'launcher' / 'main.py')!r}, run_name='__main__')"
    os.kill(start("deepspeed", rank=main, CROSS_SIZE="1", PYTHONPATH=str(tmp_path))[ends], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while "the launcher has ended: so does the run" not in (tmp_path / "said").read_text():
        assert time.monotonic() < deadline, (tmp_path / "said").read_text()
        time.sleep(0.05)


def test_a_shell_above_the_launcher_may_end(start, tmp_path: Path):
    """nohup python -m deepspeed.launcher.launch ... & exit"""
    shell, _ = start("anything", CROSS_SIZE="1")
    os.kill(shell, signal.SIGKILL)
    time.sleep(LONG_S)
    assert not (tmp_path / "told").exists()


def test_without_a_launcher_any_parent_may_end(start, tmp_path: Path):
    command, launch = start("deepspeed")
    os.kill(launch, signal.SIGKILL)
    os.kill(command, signal.SIGKILL)
    time.sleep(LONG_S)
    assert not (tmp_path / "told").exists()


@pytest.mark.parametrize(
    ("command", "known"),
    [
        ("python /opt/venv/bin/deepspeed --num_accelerators 2 launcher/main.py", True),
        ("/usr/bin/python3 -m deepspeed.launcher.runner launcher/main.py", True),
        ("python3.12 -u -m deepspeed.launcher.runner launcher/main.py", True),
        ("bash train.sh --launcher deepspeed", False),
        ("bash ds", False),
        ("make deepspeed", False),
        ("python -u train.py --launcher deepspeed", False),
        ("", False),
    ],
)
def test_the_deepspeed_command_is_known_by_its_command_line(command: str, known: bool):
    launch = f"python3 -u -m {LAUNCH} --world_info=e30= launcher/main.py"
    assert is_deepspeed(launch.split(), command.split()) is known
    assert not is_deepspeed(["python3", "-m", "torch.distributed.run", "launcher/main.py"], command.split())
