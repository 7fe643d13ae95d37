"""benchmarks/gpu_suite.sh: its tiny form on this CPU, and how it goes on, ends and tells, with a false Python.

Three parts run at once; the fourth is for the drills.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SUITE = ROOT / "benchmarks/gpu_suite.sh"
STEPS = {
    "tests": ["machine", "pytest"],
    "kernels": ["machine", "compile", "expert_mlp", "grouped_matmul", "switchhead_project"],
    "relatives": [
        "machine",
        "compile",
        "peer_experts",
        "embedding_bag",
        "product_key_topk",
        "top_k_attention",
        "shift_mix",
    ],
    "model": ["machine", "compile", "shards", "layers", "training"],
}
LONGEST = (
    1200.0  # seconds; three of the parts need 75 s of CPU, and took 150 s beside five other processes on two cores
)
RESULTS = {
    "tests": set(),
    "kernels": {"expert_mlp.md", "grouped_matmul.md", "switchhead_project.md", "kernel_profiles.md"},
    "relatives": {
        "peer_experts.md",
        "embedding_bag.md",
        "product_key_topk.md",
        "top_k_attention.md",
        "shift_mix.md",
        "relatives_profiles.md",
    },
    "model": {"layers.md", "layer_profiles.md", "training.md", "switchall_47m.jsonl", "dense_47m.jsonl"},
}
# Answers like a Python that can do everything but the modules in FAILING, and is slow in those of SLOW.
FALSE_PYTHON = """#!/usr/bin/env bash
echo "called $*" >>"$CALLS"
[[ "$*" == "-m zipfile"* ]] && exec "$REAL" "$@"
echo "path $(ls "${PYTHONPATH%%:*}")" >>"$CALLS"
for word in $FAILING; do [[ "$*" == *$word* ]] && { echo "no $word here" >&2; exit 3; }; done
for word in $SLOW; do [[ "$*" == *$word* ]] && sleep 30; done
echo result
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "WHEELS", "STEPS")}
    return kept | {"HOME": str(home), "SMOKE": "1", "SWITCHYARD_COMMIT": "0123abc"} | more


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, Path]]:
    """By part: the status, what was printed, the folder of the results. The home folder is beside it."""
    return run_tiny([part for part in STEPS if part != "relatives"], tmp_path_factory)


@pytest.fixture(scope="module")
def tiny_relatives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, Path]]:
    """The same of the part whose five kernels take a minute and a half in the interpreter."""
    return run_tiny(["relatives"], tmp_path_factory)


def run_tiny(parts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, Path]]:
    started = {}
    for part in parts:
        folder = tmp_path_factory.mktemp(part)
        home = folder / "home"
        home.mkdir()
        started[part] = folder, subprocess.Popen(
            [SUITE, part, folder / "out"], env=environment(home, PYTHON=sys.executable), cwd=folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return {
        part: (process.wait(timeout=LONGEST), process.stdout.read() if process.stdout else "", folder / "out")
        for part, (folder, process) in started.items()
    }


@pytest.mark.timeout(LONGEST)
@pytest.mark.parametrize("part", [part for part in STEPS if part != "relatives"])
def test_the_tiny_form_of_a_part_runs_on_a_cpu(tiny, part: str):
    check_tiny(part, *tiny[part])


@pytest.mark.slow
def test_the_tiny_form_of_the_relatives_runs_on_a_cpu(tiny_relatives):
    check_tiny("relatives", *tiny_relatives["relatives"])


def check_tiny(part: str, status: int, text: str, out: Path) -> None:
    assert status == 0, text
    summary = text.split(f"\n== {part}\n")[1].splitlines()
    assert [line.split(": ok, ")[0] for line in summary] == STEPS[part], text
    assert {path.name for path in out.iterdir()} == RESULTS[part] | {f"{part}.log"}
    for path in out.iterdir():
        assert path.stat().st_size, f"{path.name} is empty"
    assert "commit 0123abc" in (out / f"{part}.log").read_text()
    assert not {path.name for path in (out.parent / "home").iterdir()} - {".triton"}, "something was written at home"


@pytest.mark.timeout(LONGEST)
def test_a_table_says_that_nothing_was_measured_and_names_each_bar(tiny):
    text = (tiny["kernels"][2] / "expert_mlp.md").read_text()
    bars = [line for line in text.splitlines() if line.startswith("- bar: ")]
    assert [bar.rsplit(":", 1)[1].strip() for bar in bars] == ["not measured"] * 3
    for bar, limit in zip(bars, ("at least 80%", "at least 65%", "at least 1.30"), strict=True):
        assert limit in bar
    layers = (tiny["model"][2] / "layers.md").read_text()
    for bar in ("at least 1.40: not measured", "at most 0.65: not measured"):
        assert bar in layers
    for backend in ("auto", "triton", "triton_dense", "torch"):
        assert f"| switchhead_xl_47m_wt103 by {backend}, as a run |" in layers
    for table in (text, layers, (tiny["model"][2] / "training.md").read_text()):
        for fact in ("commit 0123abc", "command: `python -m ", " --smoke"):
            assert fact in table


def run_false(tmp_path: Path, part: str, **more: str) -> tuple[int, str, list[str]]:
    """The status, what was printed, and how the false Python was called."""
    false, calls = tmp_path / "python", tmp_path / "calls"
    false.write_text(FALSE_PYTHON)
    false.chmod(0o755)
    more = {
        "FAILING": "",
        "SLOW": "",
        "CALLS": str(calls),
        "REAL": sys.executable,
        "PYTHON": str(false),
        "SMOKE": "0",
    } | more
    ended = subprocess.run(
        [SUITE, part, tmp_path / "out"], env=environment(tmp_path, **more), capture_output=True, text=True, timeout=60
    )
    return ended.returncode, ended.stdout + ended.stderr, calls.read_text().splitlines() if calls.exists() else []


def test_a_step_that_fails_is_told_and_does_not_stop_the_next(tmp_path: Path):
    status, text, calls = run_false(tmp_path, "kernels", FAILING="bench_expert_mlp gpu.warm")
    assert status == 1
    summary = text.split("\n== kernels\n")[1].splitlines()
    assert [line.split(",")[0] for line in summary] == [
        "machine: ok",
        "compile: FAILED with status 3",
        "expert_mlp: FAILED with status 3",
        "grouped_matmul: ok",
        "switchhead_project: ok",
    ]
    assert "no bench_expert_mlp here" in (tmp_path / "out/kernels.log").read_text()
    assert not any("--smoke" in call for call in calls)
    assert (tmp_path / "out/grouped_matmul.md").read_text() == "result\n"


def test_without_shards_there_is_no_training_run(tmp_path: Path):
    status, text, calls = run_false(tmp_path, "model", FAILING="data.prepare")
    assert status == 1
    assert [line.split(",")[0] for line in text.split("\n== model\n")[1].splitlines()] == [
        "machine: ok",
        "compile: ok",
        "shards: FAILED with status 3",
        "layers: ok",
        "training: FAILED: not run",
    ]
    assert text.rstrip().endswith("training: FAILED: not run, no shards")
    assert not any("gpu.training" in call for call in calls)


def test_both_runs_and_the_imports_fit_the_limit_of_training_and_speeds_are_handed_on(tmp_path: Path):
    status, text, calls = run_false(tmp_path, "model", SPEEDS="--peak-tflops 756 --bandwidth-gb 2000")
    assert status == 0, text
    call = next(call.split() for call in calls if "gpu.training" in call)
    limit = int(SUITE.read_text().split("module training ")[1].split()[0])
    assert 2 * float(call[call.index("--seconds") + 1]) + 30 <= limit
    assert call[-4:] == ["--peak-tflops", "756", "--bandwidth-gb", "2000"]


def test_the_limits_of_a_part_add_up_to_less_than_nine_minutes():
    for part, steps in STEPS.items():
        block = SUITE.read_text().split(f"\n{part})\n")[1].split(";;")[0]
        words = [line.split() for line in block.splitlines()]
        limits = [
            int(line[2]) * (len(steps) - 2 if line[1] == "$op" else 1)
            for line in words
            if line and line[0] in ("step", "module")
        ]
        assert len(limits) == (2 if "$op" in block else len(steps) - 1)
        assert 30 + sum(limits) <= 9 * 60, f"{part}: {limits}, and 30 s for the machine"


def test_wheels_are_unpacked_for_the_steps_and_removed_again(tmp_path: Path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "brought-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought.py", "")
    (wheels / "COMMIT").write_text("feed123\n")
    status, text, calls = run_false(tmp_path, "tests", WHEELS=str(wheels), SWITCHYARD_COMMIT="")
    assert status == 0, text
    assert calls.count("path brought.py") >= 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tests.log"]


@pytest.mark.parametrize("arguments", [[], ["kernels"], ["all", "out"], ["tests", "out", "more"]])
def test_another_command_line_is_refused(tmp_path: Path, arguments: list[str]):
    ended = subprocess.run([SUITE, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "usage: benchmarks/gpu_suite.sh tests|kernels|relatives|model OUT_DIR\n"
    assert not list(tmp_path.iterdir())
