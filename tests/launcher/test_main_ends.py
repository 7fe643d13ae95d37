"""How the program ends when something goes wrong: the exit code, one sentence, and where it was if the error is not ours."""

import importlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.main import main
from parallel.config import ProcessInfo
from tests.launcher.conftest import TINY
from train.config import Config


def raise_value_error(config: Config, info: ProcessInfo) -> None:
    raise ValueError("streams must be even: add one")


def raise_runtime_error(config: Config, info: ProcessInfo) -> None:
    raise RuntimeError("the disk is full: free some")


def open_what_is_not_there(config: Config, info: ProcessInfo) -> None:
    Path("not_there").read_text()


def import_what_is_missing(config: Config, info: ProcessInfo) -> None:
    importlib.import_module("not_there")


def raise_from_a_library(config: Config, info: ProcessInfo) -> None:
    json.loads("{")


def test_a_users_mistake_is_a_sentence_and_exit_code_2(
    in_process: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    in_process(raise_value_error)
    assert main(["--config", TINY]) == 2
    assert capsys.readouterr().err == "error: streams must be even: add one\n"


def test_a_failure_of_the_world_is_one_sentence_and_exit_code_1(
    in_process: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    in_process(raise_runtime_error)
    assert main(["--config", TINY]) == 1
    assert capsys.readouterr().err == "error: the disk is full: free some\n"


def test_a_failure_of_the_operating_system_ends_in_a_sentence(
    in_process: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    in_process(open_what_is_not_there)
    assert main(["--config", TINY]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: [Errno 2] No such file or directory: 'not_there'"


def test_a_missing_package_says_where_the_right_python_is(
    in_process: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    in_process(import_what_is_missing)
    assert main(["--config", TINY]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: No module named 'not_there': start with .venv/bin/python")


def test_a_value_error_that_we_did_not_write_shows_where_it_was(
    in_process: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    in_process(raise_from_a_library)
    assert main(["--config", TINY]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("error: Expecting property name")


def told_to_all(body: Callable[[Config, ProcessInfo], None]) -> Callable[[Config, ProcessInfo], None]:
    """Fails as a rank does whose error all ranks hear of: raised anew in our own code, with the own error as the cause."""

    def raise_together(error: Exception) -> None:
        raise RuntimeError(f"{error} (rank 0 of 2)") from error

    def call(config: Config, info: ProcessInfo) -> None:
        try:
            body(config, info)
        except Exception as error:
            raise_together(error)

    return call


def test_an_error_told_to_all_ranks_shows_where_it_was_only_if_we_did_not_write_it(
    in_process: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    in_process(told_to_all(raise_runtime_error))
    assert main(["--config", TINY]) == 1
    assert capsys.readouterr().err == "error: the disk is full: free some (rank 0 of 2)\n"
    in_process(told_to_all(raise_from_a_library))
    assert main(["--config", TINY]) == 1
    assert capsys.readouterr().err.startswith("Traceback")


def test_other_ranks_say_who_they_are(
    in_process: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_process(raise_value_error)
    rank = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**rank, "MASTER_ADDR": "here", "MASTER_PORT": "7"}.items():
        monkeypatch.setenv(name, value)
    assert main(["--config", TINY]) == 2
    assert capsys.readouterr().err.startswith("error (rank 1): streams")


def test_ctrl_c_is_no_good_end_in_a_container_whose_first_process_cannot_kill_itself(
    in_process: Callable[[Callable[[Config, ProcessInfo], None]], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    def interrupted(config: Config, info: ProcessInfo) -> None:
        raise KeyboardInterrupt

    def leave(code: int) -> None:
        raise SystemExit(code)

    in_process(interrupted)
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(os, "kill", lambda pid, number: None)  # as the kernel does for process 1 and a default action
    monkeypatch.setattr(os, "_exit", leave)
    try:
        with pytest.raises(SystemExit, match="130"):
            main(["--config", TINY])
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == "error: interrupted: the same command goes on from the last whole checkpoint\n"
