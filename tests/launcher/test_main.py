"""The program as it is started: from other folders, with foreign packages about. How it ends: test_main_ends.py."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.main import PLAN_FLAGS, main
from parallel.config import ProcessInfo
from parallel.predict import Hardware
from tests.launcher.conftest import TINY
from train.config import Config
from train.config_errors import fields
from train.dry_run import Plan

ROOT = Path(__file__).resolve().parents[2]
MAIN = str(ROOT / "launcher" / "main.py")


def start(*arguments: str, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs main.py as a user in another folder would."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_help_from_another_folder_shows_every_key_and_the_three_starts(tmp_path: Path) -> None:
    done = start(MAIN, "--help", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for key, _ in fields(Config):
        assert f"\n  {key} " in done.stdout
    for text in ("deepspeed --num_accelerators 2", "torchrun", "\n  python launcher/main.py", "--set optim.lr=5.0e-4"):
        assert text in done.stdout
    assert "float32|bfloat16" in done.stdout
    assert "[0.9, 0.95]" in done.stdout


def test_dry_run_from_another_folder_counts_the_parameters(tmp_path: Path) -> None:
    os.symlink(TINY, tmp_path / "mine.yaml")
    # --local_rank is what DeepSpeed's launcher adds
    options = ["--local_rank=0", "--config", "mine.yaml", "--set", "model.vocab_size=4096", "--dry-run"]
    done = start(MAIN, *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "vocab_size: 4096" in done.stdout
    assert "2,447,616" in done.stdout  # by the formulas of tests/train/test_config.py
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_dry_run_predicts_for_the_nodes_and_rates_of_the_command(tmp_path: Path) -> None:
    rates = ["--nvlink-gb", "100", "--network-gb", "12.5", "--tflops", "2"]
    plan = ["--dry-run", "--nodes", "2", "--gpus-per-node", "4", *rates]
    done = start(MAIN, "--config", TINY, "--set", "model.vocab_size=4096", *plan, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in ("topology: 8 processes, 2 node(s) of 4; ep_size 4", " at 100 and 12.5 GB/s:", "sustained 2 TFLOP/s"):
        assert text in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--nodes", "2"], ["--nodes belongs to --dry-run", "it is 2", "add --dry-run or remove --nodes"]),
        (["--tflops", "9.5"], ["--tflops belongs to --dry-run", "it is 9.5"]),
        (["--dry-run", "--gpus-per-node", "0"], ["--gpus-per-node must be above 0", "it is 0"]),
        (["--dry-run", "--network-gb", "inf"], ["--network-gb must be above 0 and finite", "it is inf"]),
        (["--dry-run", "--nodes", "3"], ["there are 3 processes"]),
    ],
)
def test_a_plan_that_cannot_be_is_one_sentence(
    in_process: Callable[..., None], capsys: pytest.CaptureFixture[str], flags: list[str], parts: list[str]
) -> None:
    in_process(lambda config, info: pytest.fail("nothing may be started"))
    assert main(["--config", TINY, "--set", "model.vocab_size=64", *flags]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    for part in parts:
        assert part in error


def test_a_wrong_config_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = start(MAIN, "--config", TINY, "--set", "optim.lrr=3", folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: --set optim.lrr=3: ")
    assert done.stderr.count("\n") == 1


def test_a_foreign_package_called_kernels_is_caught(tmp_path: Path) -> None:
    (tmp_path / "site" / "kernels").mkdir(parents=True)
    (tmp_path / "site" / "kernels" / "__init__.py").write_text("raise SystemExit('the foreign package was imported')")
    done = start(MAIN, "--config", TINY, folder=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: the package kernels must come from {ROOT / 'kernels'}, but Python finds {tmp_path}")
    assert "uninstall" in last


def test_foreign_folders_of_our_names_are_beaten(tmp_path: Path) -> None:
    for name in ("kernels", "model", "train", "launcher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.py").write_text("raise SystemExit('the foreign module was imported')")
    done = start(MAIN, "--help", folder=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_importing_the_launcher_does_no_work() -> None:
    show = "import sys; before = set(sys.modules); import launcher.main; print(sorted(set(sys.modules) - before))"
    done = start("-c", show, folder=ROOT)
    assert "launcher.main" in done.stdout
    assert not [name for name in ("pydantic", "yaml", "torch", "train", "rich") if f"'{name}'" in done.stdout]


def test_no_file_of_the_launcher_has_the_name_of_a_standard_module() -> None:
    names = {path.stem for path in (ROOT / "launcher").glob("*.py")}
    assert "main" in names
    assert not names & sys.stdlib_module_names


def test_run_gets_the_config_with_its_device_and_the_place_of_the_process(
    in_process: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Config, ProcessInfo]] = []
    in_process(lambda config, info: seen.append((config, info)))
    rank = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**rank, "MASTER_ADDR": "here", "MASTER_PORT": "7"}.items():
        monkeypatch.setenv(name, value)
    assert main(["--config", TINY, "--set", "run.steps=77", "--set", "run.seed=5", "--local-rank", "1"]) == 0
    ((config, info),) = seen
    assert (config.run.steps, config.run.seed, config.run.device) == (77, 5, "cpu")
    assert (info.rank, info.world_size, info.master_addr) == (1, 2, "here")
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_the_clone_takes_the_place_of_the_launcher_folder_on_the_path(
    in_process: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(lambda config, info: None)
    rest = [entry for entry in sys.path if entry != str(ROOT)]
    monkeypatch.setattr(sys, "path", [str(ROOT / "launcher"), *rest])
    assert main(["--config", TINY]) == 0
    assert sys.path == [str(ROOT), *rest]


def test_deepspeed_is_told_about_the_cpu_before_it_is_imported(
    in_process: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []
    in_process(lambda config, info: seen.append(os.environ.get("DS_ACCELERATOR")))
    monkeypatch.delenv("DS_ACCELERATOR")
    assert main(["--config", TINY, "--set", "run.device=cpu"]) == 0
    assert seen == ["cpu"]


def test_the_help_names_the_rates_that_a_prediction_takes():
    """They are written twice, because a run does not import parallel/predict.py."""
    defaults = {flag: default for flag, *_, default in PLAN_FLAGS}
    for flag in ("nvlink_gb", "network_gb", "tflops"):
        assert float(defaults["--" + flag.replace("_", "-")]) == getattr(Hardware(), flag)
    assert float(defaults["--disk-gb"]) == Plan().disk_gb
