"""Where the packages come from, and that to know it takes no time."""

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.imports import check_imports

ROOT = Path(__file__).resolve().parents[2]


def test_packages_of_this_clone_pass_and_of_another_do_not(tmp_path: Path) -> None:
    check_imports(ROOT)
    with pytest.raises(RuntimeError, match=f"the package launcher must come from {tmp_path}"):
        check_imports(tmp_path)


def test_a_rank_listens_before_it_imports_what_takes_seconds(tmp_path: Path) -> None:
    """A SIGTERM in them would end the rank with 143, and not with a checkpoint."""
    code = """
import sys
import launcher.main
from train.preemption import Preemption

def listen(self):
    print(sorted({"torch", "pydantic", "yaml", "numpy"} & set(sys.modules)))
    sys.exit()

Preemption.listen = listen
launcher.main.main(["--config", "none"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
