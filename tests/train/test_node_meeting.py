"""Who speaks for all nodes, and what a node without the others does."""

import threading
import time
from pathlib import Path

import pytest

from train.node_meeting import FolderMeeting, seen_marks


def together(*calls):
    """Each call in a thread of its own; their results in order."""
    results: dict[int, object] = {}

    def run(number: int) -> None:
        results[number] = calls[number]()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in range(len(calls))]


def meetings(folder: Path, size: int) -> list[FolderMeeting]:
    return [FolderMeeting(folder / "meeting", rank=rank, size=size) for rank in range(size)]


def test_everyone_hears_what_everyone_told(tmp_path: Path):
    nodes = meetings(tmp_path, 3)
    heard = together(*(lambda node=node: node.gather("facts", [node.rank], patience_s=20) for node in nodes))
    assert heard == [{0: [0], 1: [1], 2: [2]}] * 3


def test_a_node_that_tells_nothing_is_waited_for_and_then_missed(tmp_path: Path):
    node = meetings(tmp_path, 3)[1]
    began = time.monotonic()
    assert node.gather("facts", "x", patience_s=0.3) == {1: "x"}
    assert time.monotonic() - began >= 0.3
    began = time.monotonic()
    assert node.gather("seen", "x", ranks=[1], patience_s=30) == {1: "x"}
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("rank", "size", "seen", "leads"),
    [
        (0, 1, [0], True),
        (0, 2, [0], True),  # half of the nodes, with the first
        (1, 2, [1], None),  # the other half
        (0, 3, [0], None),
        (1, 3, [1, 2], True),
        (2, 3, [1, 2], False),
        (0, 4, [0, 3], True),
        (1, 4, [1, 2], None),
        (1, 4, [1, 2, 3], True),
    ],
)
def test_of_groups_that_do_not_see_each_other_one_decides(
    tmp_path: Path, rank: int, size: int, seen: list[int], leads: bool | None
):
    node = FolderMeeting(tmp_path, rank=rank, size=size)
    if leads is None:
        with pytest.raises(RuntimeError, match=rf"only {len(seen)} of {size} are seen from here"):
            node.leads(seen)
    else:
        assert node.leads(seen) is leads


def test_the_first_decision_counts_for_all(tmp_path: Path):
    first, late, other = meetings(tmp_path, 3)
    first.gather("facts", 0, ranks=[0], patience_s=1)
    assert first.settle("plan", {"by": 0}, patience_s=1) == {"by": 0}
    assert late.settle("plan", {"by": 1}, patience_s=1) == {"by": 0}
    assert other.settle("plan", None, patience_s=1) == {"by": 0}


def test_a_node_without_a_verdict_ends(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"must decide within 0\.2 s"):
        meetings(tmp_path, 2)[1].settle("verdict", None, patience_s=0.2)


def test_nothing_is_left_behind(tmp_path: Path):
    nodes = meetings(tmp_path, 2)

    def attend(node: FolderMeeting) -> None:
        (tmp_path / "meeting").mkdir(exist_ok=True)
        (tmp_path / "meeting" / f"mark-{node.rank}").touch()
        node.gather("facts", 1, patience_s=20)
        node.settle("verdict", 3 if node.rank == 0 else None, patience_s=20)
        node.leave()

    together(*(lambda node=node: attend(node) for node in nodes))
    assert list(tmp_path.iterdir()) == []


def test_a_node_alone_in_a_folder_takes_its_files_away(tmp_path: Path):
    node = FolderMeeting(tmp_path / "meeting", rank=3, size=20)
    node.gather("facts", 1, patience_s=0)
    (tmp_path / "meeting" / "mark-3").touch()
    node.leave()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match="must be a folder that this node can write") as caught:
        FolderMeeting(tmp_path / "file" / "meeting", rank=0, size=2).gather("facts", 1, patience_s=1)
    assert "choose another run.dir" in str(caught.value)


def test_marks_are_waited_for_and_missed_ones_left_out(tmp_path: Path):
    (tmp_path / "mark-0").touch()
    threading.Timer(0.3, (tmp_path / "mark-2").touch).start()
    assert seen_marks(tmp_path, [0, 2], patience_s=20) == [0, 2]
    assert seen_marks(tmp_path, [0, 1, 2], patience_s=0.2) == [0, 2]
    assert seen_marks(tmp_path / "none", [0], patience_s=0) == []
