"""The ways to start a run give the same rows and the same losses, and one process needs nothing of parallel/."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.conftest import MAIN, ConfigFile, Processes, free_port, records
from tests.end_to_end.warm import Job

SHORT = ("run.steps=4", "eval.every_steps=4", "optim.warmup_steps=1")
BIN = Path(sys.executable).parent

BLOCK_PARALLEL = """
import importlib.abc, runpy, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        root, _, rest = name.partition(".")
        if root in ("deepspeed", "megatron", "mpi4py") or (root == "parallel" and rest not in ("", "config")):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def losses(folder: Path) -> list[float]:
    return [figure for record in records(folder).values() for figure in (record["loss"], record["auxiliary_loss"])]


@pytest.mark.timeout(400)  # four starts one after the other: 31 s on idle cores, 150 s where ten others want them
def test_deepspeed_torchrun_and_plain_python_give_the_same_losses(
    config: ConfigFile, processes: Processes, ranks: Callable[..., Job]
):
    folders = {name: config.folder.parent / name for name in ("plain", "deepspeed", "torchrun", "alone")}

    ranks(1, config.arguments(*SHORT, f"run.dir={folders['alone']}")).finish()  # under DeepSpeed: ZeRO 1 of one rank

    launcher = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
    processes.start([*launcher, str(MAIN), *config.arguments(*SHORT, f"run.dir={folders['deepspeed']}")])
    processes.wait()

    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    processes.start([*torchrun, str(MAIN), *config.arguments(*SHORT, f"run.dir={folders['torchrun']}")])
    processes.wait()

    plain = config.arguments(*SHORT, "parallel.zero_stage=0", f"run.dir={folders['plain']}")
    processes.start([sys.executable, "-c", BLOCK_PARALLEL, str(MAIN), *plain])
    processes.wait()

    expected = losses(folders["plain"])
    assert len(expected) == 8
    for name in ("alone", "deepspeed", "torchrun"):
        assert losses(folders[name]) == pytest.approx(expected, rel=1e-4), name
    assert losses(folders["deepspeed"]) == losses(folders["torchrun"]), "the same layout, so the same bits"
    assert (folders["plain"] / "environment.json").exists()
    assert list((folders["plain"] / "tensorboard").iterdir())


def test_a_rank_that_ends_before_all_have_met_is_named_by_the_other(config: ConfigFile, processes: Processes):
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(MAIN), *config.arguments("parallel.meeting_s=3")]
    processes.start(command, RANK="0", LOCAL_RANK="0", **place)
    processes.start([*command, "--set", "no.key=1"], RANK="1", LOCAL_RANK="1", **place)
    assert [process.wait(60) for process in processes.running] == [1, 2]
    lines = processes.log(0).splitlines()
    assert len(lines) == 1, "one sentence, no traceback"
    assert "all 2 ranks must meet at 127.0.0.1:" in lines[0]
    assert "within 3 s (parallel.meeting_s), but rank 1 never came; there were rank 0 on " in lines[0]
    assert not config.folder.exists()


def test_parallel_is_really_blocked_in_that_test(config: ConfigFile):
    command = [sys.executable, "-c", BLOCK_PARALLEL, str(MAIN), *config.arguments("parallel.zero_stage=1")]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert answer.returncode == 1
    assert re.search(r"parallel\.\w+ is blocked", answer.stderr)


def test_dry_run_prints_the_config_and_the_size_and_writes_nothing(
    config: ConfigFile, capsys: pytest.CaptureFixture[str]
):
    from launcher.main import main

    assert main([*config.arguments("optim.lr=7.0e-4"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "lr: 0.0007" in printed
    vocabulary, d, heads, c, e = 257, 32, 2, 8, 3
    block = 2 * d * heads * c + 2 * heads * e * d * c + 2 * heads * e * d + 2 * d * 5 * 16 + 5 * d + 4 * d
    assert f"parameters: {2 * block + 2 * vocabulary * d + vocabulary + 2 * d:,}" in printed
    assert not config.folder.exists()
