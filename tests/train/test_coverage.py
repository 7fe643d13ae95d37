"""train/coverage.py: a save or load in which the ranks do not hold a model once and whole is refused, by all ranks, before it starts."""

import dataclasses
from pathlib import Path

import pytest
import torch

from model.fragments import Fragment
from model.parameters import Box
from tests.train.thread_mesh import STATE, on_ranks, try_ranks
from train.checkpoint import load, save


def fragment(
    start: int, end: int, *, shape: tuple[int, ...] = (4, 5), name: str = "w", box: Box | None = None
) -> Fragment:
    return Fragment(name, shape, start, {"master": torch.zeros(end - start)}, box)


LEFT, RIGHT = ((0, 4), (0, 2)), ((0, 4), (2, 5))


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [
        (
            [[fragment(0, 5)], [fragment(9, 20)]],
            r"master/w must be covered exactly, but elements \[5, 9\) of 20 are missing",
        ),
        ([[fragment(0, 5)], [fragment(5, 18)]], r"master/w .* elements \[18, 20\) of 20 are missing"),
        ([[fragment(3, 20)], []], r"master/w .* elements \[0, 3\) of 20 are missing"),
        ([[fragment(0, 12)], [fragment(9, 20)]], r"master/w .* elements \[9, 12\) of 20 are there twice"),
        ([[fragment(0, 20)], [fragment(0, 20)]], r"master/w .* elements \[0, 20\) of 20 are there twice"),
        ([[fragment(0, 20)], [fragment(20, 24)]], r"master/w has 20 elements, but a range ends at 24"),
        (
            [[fragment(0, 5)], [fragment(5, 20, shape=(5, 4))]],
            r"F32 \[4, 5\] on an earlier rank and F32 \[5, 4\] on rank 1",
        ),
        ([[fragment(0, 20)], [fragment(0, 20, name="../w")]], r"must have a name like"),
        (
            [[fragment(0, 8, box=LEFT)], [fragment(0, 8, box=LEFT)]],
            r"master/w .* the elements \[\[0, 4\], \[2, 5\]\] of its shape \[4, 5\] are missing",
        ),
        (
            [[fragment(0, 8, box=LEFT)], [fragment(0, 9, box=RIGHT)]],
            r"master/w .* the elements \[\[3, 4\], \[2, 5\]\] of its shape \[4, 5\] are missing",
        ),
        (
            [[fragment(0, 8, box=LEFT)], [fragment(0, 20)]],
            r"master/w .* the elements \[\[0, 4\], \[0, 2\]\] of its shape \[4, 5\] are there twice",
        ),
        (
            [[fragment(0, 8, box=LEFT)], [fragment(0, 13, box=RIGHT)]],
            r"master/w has a box \[\[0, 4\], \[2, 5\]\] of 12 elements, but a range ends at 13",
        ),
        (
            [[fragment(0, 8, box=LEFT)], [fragment(0, 12, box=((0, 4), (2, 6)))]],
            r"master/w has shape \[4, 5\], and a box of it must lie inside, but one is \[\[0, 4\], \[2, 6\]\]",
        ),
        ([[fragment(-1, 20)], []], r"a start of at least 0, but has 'master/w' and -1"),
        (
            [[Fragment("w", (2,), 0, {"master": torch.zeros(2), "exp_avg": torch.zeros(1)})], []],
            r"float32, 1-D and equally long, but w has .*\[2\].*\[1\]",
        ),
        ([[Fragment("w", (2,), 0, {"master": torch.zeros(2).double()})], []], r"float32, .* but w has .*float64"),
    ],
)
def test_a_save_that_is_not_whole_is_refused_by_all_ranks(
    tmp_path: Path, ranks: list[list[Fragment]], sentence: str
) -> None:
    outcome = try_ranks(2, lambda m: save(tmp_path / "c", state=STATE, fragments=ranks[m.rank], mesh=m, keep=1))
    for error in outcome.errors:
        with pytest.raises(RuntimeError, match=sentence):
            raise error or AssertionError("a rank did not notice")
    assert outcome.calls[0] == outcome.calls[1]
    assert not (tmp_path / "c").exists()


def test_a_kind_that_one_rank_lacks_is_a_gap(tmp_path: Path) -> None:
    views = [{"master": torch.zeros(2), "exp_avg": torch.zeros(2)}, {"master": torch.zeros(2)}]
    with pytest.raises(RuntimeError, match=r"exp_avg/w .* elements \[2, 4\) of 4 are missing"):
        on_ranks(
            2,
            lambda m: save(
                tmp_path, state=STATE, fragments=[Fragment("w", (4,), 2 * m.rank, views[m.rank])], mesh=m, keep=1
            ),
        )


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [
        ([[fragment(0, 5)], [fragment(9, 20)]], r"master/w in the model .* \[5, 9\) of 20 are missing"),
        ([[fragment(0, 20)], [fragment(20, 24)]], r"master/w in the model has 20 elements, but a range ends at 24"),
        (
            [[fragment(0, 20, shape=(5, 4))], []],
            r"master/w is F32 \[4, 5\] in the checkpoint .* and F32 \[5, 4\] in the model",
        ),
        ([[fragment(0, 20)], [fragment(0, 20, name="v")]], r"1 are missing in the checkpoint, the first master/v"),
        ([[], []], r"1 are missing in the model, the first master/w"),
        (
            [[fragment(0, 8, box=LEFT)], [fragment(0, 8, box=LEFT)]],
            r"master/w in the model .* the elements \[\[0, 4\], \[2, 5\]\] of its shape \[4, 5\] are missing",
        ),
    ],
)
def test_a_load_that_does_not_fit_is_refused_by_all_ranks(
    tmp_path: Path, ranks: list[list[Fragment]], sentence: str
) -> None:
    path = on_ranks(1, lambda m: save(tmp_path, state=STATE, fragments=[fragment(0, 20)], mesh=m, keep=1))[0]
    outcome = try_ranks(2, lambda m: load(path, fragments=ranks[m.rank], mesh=m))
    for error in outcome.errors:
        with pytest.raises(RuntimeError, match=sentence):
            raise error or AssertionError("a rank did not notice")
    assert outcome.calls[0] == outcome.calls[1]


def test_a_named_tensor_with_two_dtypes_is_refused_even_if_it_is_empty(tmp_path: Path) -> None:
    tensors = [{"none": torch.zeros(0)}, {"none": torch.zeros(0, dtype=torch.int64)}]
    with pytest.raises(RuntimeError, match=r"state/none .* F32 \[0\] on an earlier rank and I64 \[0\] on rank 1"):
        on_ranks(2, lambda m: save(tmp_path, state=STATE, fragments=[], mesh=m, keep=1, tensors=tensors[m.rank]))


def test_ranks_at_different_steps_do_not_save(tmp_path: Path) -> None:
    states = [STATE, dataclasses.replace(STATE, position=1616)]
    with pytest.raises(RuntimeError, match="rank 0 is at 100 and 1600, rank 1 at 100 and 1616"):
        on_ranks(2, lambda m: save(tmp_path, state=states[m.rank], fragments=[], mesh=m, keep=1))


def test_replicas_of_boxes_and_of_the_whole_may_all_be_filled(tmp_path: Path) -> None:
    path = on_ranks(1, lambda m: save(tmp_path, state=STATE, fragments=[fragment(0, 20)], mesh=m, keep=1))[0]
    ranks = [[fragment(0, 8, box=LEFT), fragment(0, 12, box=RIGHT)], [fragment(2, 8, box=LEFT), fragment(0, 20)]]
    on_ranks(2, lambda m: load(path, fragments=ranks[m.rank], mesh=m))


def test_an_empty_range_is_no_fault(tmp_path: Path) -> None:
    ranks = [[fragment(0, 20)], [fragment(20, 20), fragment(0, 0), fragment(7, 7)]]
    path = on_ranks(2, lambda m: save(tmp_path, state=STATE, fragments=ranks[m.rank], mesh=m, keep=1))[0]
    on_ranks(2, lambda m: load(path, fragments=ranks[m.rank], mesh=m))
