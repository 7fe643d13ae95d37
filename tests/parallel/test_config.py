"""The parallel section by itself: the rules that need the number of processes, and what the module may import."""

import ast
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from parallel.config import ParallelConfig, ProcessInfo, resolve_ep_size, resolve_node_size

ROOT = Path(__file__).resolve().parents[2]
ONE = {
    "rank": 0,
    "world_size": 1,
    "local_rank": 0,
    "local_world_size": 1,
    "master_addr": "a",
    "master_port": 1,
    "launcher": "test",
}


def test_auto_obeys_its_rule_in_every_small_world() -> None:
    for processes, per_node, bank in product(range(1, 25), range(1, 13), [1, 3, 8, 10, 155, None]):
        size = resolve_ep_size("auto", processes=processes, processes_per_node=per_node, smallest_bank=bank)
        fits = [s for s in range(1, per_node + 1) if not per_node % s and not processes % s and s <= (bank or 1)]
        assert size == fits[-1], (processes, per_node, bank)


@pytest.mark.parametrize(
    ("setting", "processes", "bank"),
    [(1, 4, 10), (2, 4, 10), (4, 4, 10), (16, 16, 10), (1, 4, None)],
)
def test_a_number_that_divides_the_processes_is_taken_even_above_the_bank(
    setting: int, processes: int, bank: int | None
) -> None:
    assert resolve_ep_size(setting, processes=processes, processes_per_node=2, smallest_bank=bank) == setting


def test_ep_size_that_does_not_divide_the_processes_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"ep_size is 4 and there are 6 processes: use 1, 2, 3, 6 or auto"):
        resolve_ep_size(4, processes=6, processes_per_node=6, smallest_bank=16)


def test_ep_size_without_experts_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"ep_size is 2 and .* with experts: set parallel\.ep_size to 1 or auto"):
        resolve_ep_size(2, processes=4, processes_per_node=4, smallest_bank=None)


def test_node_size_is_the_machine_unless_it_is_given() -> None:
    assert resolve_node_size("auto", processes=16, processes_per_node=8) == 8
    assert resolve_node_size(2, processes=16, processes_per_node=8) == 2
    with pytest.raises(ValueError, match=r"node_size is 3 and there are 16 processes: use 1, 2, 4, 8, 16 or auto"):
        resolve_node_size(3, processes=16, processes_per_node=8)


@pytest.mark.parametrize(
    "name", ["tensor_parallel_size", "tp", "tp_size", "sequence_parallel", "pipeline_stages", "cp"]
)
def test_other_kinds_of_parallelism_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValidationError, match=f"not offered, but {name} is 1: remove {name}"):
        ParallelConfig.model_validate({name: 1})


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"rank": 1}, "rank must be below world_size, but rank is 1 and world_size is 1"),
        ({"rank": -1}, "rank"),
        ({"local_rank": 1}, "local_rank must be below local_world_size"),
        ({"local_world_size": 2}, "local_world_size must be at most world_size"),
        ({"master_port": 65536}, "master_port"),
    ],
)
def test_a_process_that_cannot_be_is_refused(changes: dict[str, Any], part: str) -> None:
    assert ProcessInfo(**ONE).world_size == 1
    with pytest.raises(ValidationError, match=part):
        ProcessInfo(**{**ONE, **changes})


def test_the_module_imports_only_pydantic() -> None:
    tree = ast.parse((ROOT / "parallel" / "config.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    assert imported <= {"typing", "pydantic"}
    loaded = "import sys, parallel.config; print([n for n in ('torch', 'numpy', 'deepspeed', 'megatron') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
