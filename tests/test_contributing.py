"""The example of CONTRIBUTING.md: a mixer is one file, one config class and one test, and they work as they stand there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "data", "kernels", "launcher", "model", "parallel", "tests", "train")
FIELD = "    hsm: HSMConfig | None = None\n"


def blocks() -> dict[str, str]:
    """The example's code by the place that its first line names."""
    found = re.findall(r"```python\n# ([^\n]+)\n(.+?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
    return {place: code for place, code in found}


def copy_with_the_example(folder: Path) -> None:
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    code = blocks()
    config = (folder / "model/config.py").read_text()
    assert config.count("class ModelConfig") == 1
    assert config.count(FIELD) == 1
    config = config.replace("class ModelConfig", f"{code.pop('model/config.py')}\n\nclass ModelConfig")
    config = config.replace(FIELD, FIELD + code.pop("model/config.py: ModelConfig"))
    (folder / "model/config.py").write_text(config)
    for place, text in code.items():
        (folder / place).write_text(text)


def test_the_example_of_a_mixer_works_as_it_stands_there(tmp_path: Path):
    copy_with_the_example(tmp_path)

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "2 passed" in run("-m", "pytest", "-q", "tests/model/test_causal_mean.py")
    settings = [
        "model.mixers=[causal_mean]",
        "model.switchhead=null",
        "model.causal_mean.scale=0.5",
        "model.vocab_size=64",
    ]
    overrides = [word for setting in settings for word in ("--set", setting)]
    shown = run("launcher/main.py", "--config", "configs/tiny_cpu.yaml", *overrides, "--dry-run")
    assert "scale: 0.5" in shown
