"""The parallel section by itself: the rules that need the number of processes, and what the module may import."""

import ast
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from parallel.config import (
    ParallelConfig,
    ProcessInfo,
    check_nodes,
    resolve_ep_size,
    resolve_node_size,
    resolve_table_columns,
)

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


@pytest.mark.parametrize(("ep_size", "node_size"), [(1, 8), (4, 8), (8, 8), (3, 8), (16, 8), (24, 8), (5, 1)])
def test_a_group_within_a_node_or_of_whole_nodes_is_taken(ep_size: int, node_size: int) -> None:
    check_nodes(ep_size=ep_size, node_size=node_size)


@pytest.mark.parametrize(("ep_size", "node_size"), [(12, 8), (9, 8), (6, 4), (3, 2)])
def test_a_group_of_a_node_and_a_part_of_another_is_an_error(ep_size: int, node_size: int) -> None:
    sentence = (
        f"node_size is {node_size} and ep_size is {ep_size}: set parallel.ep_size to a multiple of {node_size} or to auto, "
        f"or parallel.node_size to a divisor of {ep_size}$"
    )
    with pytest.raises(ValueError, match=sentence):
        check_nodes(ep_size=ep_size, node_size=node_size)


def test_columns_that_divide_the_group_and_the_width_are_taken() -> None:
    for setting in ("auto", 1, 2, 4):
        assert resolve_table_columns(setting, ep_size=4, d_model=12, has_tables=True) == setting
    for setting in ("auto", 1):
        assert resolve_table_columns(setting, ep_size=4, d_model=12, has_tables=False) == setting


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (3, r"ep_size and d_model, but table_columns is 3 and ep_size is 8: use 1, 2, 4 or auto"),
        (16, r"ep_size and d_model, but table_columns is 16 and ep_size is 8: use 1, 2, 4 or auto"),
        (8, r"ep_size and d_model, but table_columns is 8 and model\.d_model is 12: use 1, 2, 4 or auto"),
    ],
)
def test_columns_that_do_not_divide_are_an_error(setting: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        resolve_table_columns(setting, ep_size=8, d_model=12, has_tables=True)


def test_columns_of_no_table_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"table_columns is 2 and .* no layer with one: set .* to auto"):
        resolve_table_columns(2, ep_size=4, d_model=12, has_tables=False)


@pytest.mark.parametrize("exchange", ["auto", "tokens", "weights"])
def test_every_exchange_is_offered(exchange: str) -> None:
    config = ParallelConfig.model_validate({"exchange": exchange})
    assert (config.exchange, config.chunks, config.table_columns, config.watchdog_s) == (exchange, 1, "auto", 300.0)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"exchange": "rows"}, "exchange"),
        ({"chunks": 0}, "chunks"),
        ({"table_columns": 0}, "table_columns"),
        ({"watchdog_s": 0}, "watchdog_s"),
        ({"watchdog_s": float("inf")}, "watchdog_s"),
        ({"meeting_s": 0}, "meeting_s"),
        (
            {"exchange": "weights", "table_columns": 2},
            "exchange is weights and table_columns is 2: set table_columns to auto or exchange to tokens",
        ),
    ],
)
def test_a_bad_exchange_is_refused(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(ValidationError, match=part):
        ParallelConfig.model_validate(settings)


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
