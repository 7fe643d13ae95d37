"""Work that fails on one rank fails on all, after the same collectives on each."""

from collections.abc import Iterator

from tests.train.thread_mesh import ThreadMesh, try_ranks
from train.together import on_every_rank, on_rank_zero, read_together


def raise_on(failing: int, rank: int) -> int:
    if rank == failing:
        raise RuntimeError(f"rank {rank} has no disk")
    return rank


def test_every_rank_works_and_gets_its_own_result():
    assert try_ranks(3, lambda mesh: on_every_rank(mesh, lambda: mesh.rank)).results == [0, 1, 2]


def test_only_rank_zero_works():
    worked: list[int] = []
    outcome = try_ranks(3, lambda mesh: on_rank_zero(mesh, lambda: worked.append(mesh.rank) or "done"))
    assert outcome.results == ["done", None, None]
    assert worked == [0]


def test_what_fails_on_one_rank_is_raised_on_all():
    outcome = try_ranks(3, lambda mesh: on_every_rank(mesh, lambda: raise_on(2, mesh.rank)))
    assert [str(error) for error in outcome.errors] == ["rank 2 has no disk"] * 3
    assert outcome.calls == [["raise_together"]] * 3


def test_what_fails_on_rank_zero_alone_is_raised_on_all():
    outcome = try_ranks(3, lambda mesh: on_rank_zero(mesh, lambda: raise_on(0, mesh.rank)))
    assert [str(error) for error in outcome.errors] == ["rank 0 has no disk"] * 3


def rows(mesh: ThreadMesh) -> Iterator[int]:
    yield 10
    yield raise_on(1, mesh.rank)
    yield 30


def test_items_are_read_until_the_end_or_until_one_rank_fails():
    seen: list[list[int]] = [[], []]

    def read_all(mesh: ThreadMesh) -> None:
        seen[mesh.rank].extend(read_together(mesh, iter([1, 2])))
        for item in read_together(mesh, rows(mesh)):
            seen[mesh.rank].append(item)

    outcome = try_ranks(2, read_all)
    assert seen == [[1, 2, 10], [1, 2, 10]]
    assert [str(error) for error in outcome.errors] == ["rank 1 has no disk"] * 2
