"""events.jsonl: which documents an event names, what a torn line does, and how the rollbacks in it are counted."""

import json
from pathlib import Path

import pytest
import torch

from train.engine import LocalMesh
from train.incident import SHOWN, bad_step, count_rollbacks, sentence_of, write_event
from train.run_folder import RunFolder
from train.step import StepResult
from train.watch import Finding

WORLD = LocalMesh(torch.device("cpu"))


class Ranks(LocalMesh):
    """This rank and those whose documents are given."""

    def __init__(self, *others: list[int]) -> None:
        super().__init__(torch.device("cpu"))
        self.others = others

    def all_gather_object(self, value: list) -> list:
        return [value, *([len(ids), sorted(ids)[:SHOWN]] for ids in self.others)]


def event_of(world: LocalMesh, ids: list[int], action: str = "skip") -> dict:
    finding = Finding("nonfinite", action, "the loss must be finite")  # pyright: ignore[reportArgumentType]
    result = StepResult(1.0, 0.0, 1.0, 1.0, 1, 1, {}, finding=finding, document_ids=frozenset(ids))
    return bad_step(result, world, step=5, position=16, rows=4)


@pytest.mark.parametrize(
    ("ids", "others", "shown", "more"),
    [
        ([7, 3], [], [3, 7], False),
        (list(range(32)), [], list(range(32)), False),
        (list(range(33)), [], list(range(32)), True),
        ([5, 1], [[2, 5]], [1, 2, 5], False),
        (list(range(20)), [list(range(10, 32))], list(range(32)), False),
        (list(range(20)), [list(range(20, 40))], list(range(32)), True),
        ([9], [list(range(33))], list(range(32)), True),
    ],
)
def test_the_first_32_documents_of_all_ranks_are_named_and_whether_there_are_more(
    ids: list[int], others: list[list[int]], shown: list[int], more: bool
):
    event = event_of(Ranks(*others), ids)
    assert (event["document_ids"], event["more_documents"]) == (shown, more)
    assert sentence_of(event).endswith(f"{shown[-1]}{' and more' if more else ''}")


def test_a_line_that_a_kill_cut_short_does_not_swallow_the_next(tmp_path: Path):
    folder = RunFolder(tmp_path)
    for cut in (0, 10):
        write_event(folder, WORLD, event_of(WORLD, [1]), say=print)
        folder.events.write_bytes(folder.events.read_bytes()[: -cut or None])
    for _ in range(2):
        write_event(folder, WORLD, event_of(WORLD, [1]) | {"action": "rollback", "back_to": 4}, say=print)
    lines = folder.events.read_text().splitlines()
    assert len(lines) == 4
    assert [json.loads(lines[number])["action"] for number in (0, 2, 3)] == ["skip", "rollback", "rollback"]
    assert folder.events.read_bytes().endswith(b"}\n")
    assert count_rollbacks(folder) == 2


def test_without_events_nothing_went_back(tmp_path: Path):
    assert count_rollbacks(RunFolder(tmp_path)) == 0
