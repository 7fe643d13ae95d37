"""train/boxes.py: coverage and meeting of ranges inside boxes, against masks and index arrays of small tensors."""

import itertools
import json
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.parameters import Box
from train.boxes import Span, box_of, check_cover, common, numel, rectangles, text, whole

SHAPES = st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple)


def elements(shape: tuple[int, ...], span: Span) -> np.ndarray:
    """The flat indices in the logical tensor of a span, by numpy's own slicing."""
    index = np.arange(math.prod(shape)).reshape(shape)
    box = whole(shape) if span.box is None else span.box
    return index[(*(slice(*side) for side in box), ...)].ravel()[span.start : span.end]


@st.composite
def boxes(draw: Any, shape: tuple[int, ...]) -> Box:
    return tuple(tuple(sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size))))) for size in shape)


@st.composite
def spans(draw: Any, shape: tuple[int, ...]) -> Span:
    box = draw(boxes(shape))
    start, end = sorted(draw(st.tuples(st.integers(0, numel(box)), st.integers(0, numel(box)))))
    return Span(box_of(box, shape), start, end)


@st.composite
def tilings(draw: Any, shape: tuple[int, ...]) -> list[Span]:
    """A grid of boxes, each cut into ranges: each element once, in any order."""
    sides = []
    for size in shape:
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))})
        sides.append(list(itertools.pairwise(cuts)) or [(0, 0)])
    found = []
    for box in itertools.product(*sides):
        cuts = sorted([0, numel(box), *draw(st.lists(st.integers(0, numel(box)), max_size=2))])
        found += [Span(box_of(box, shape), start, end) for start, end in itertools.pairwise(cuts)]
    return draw(st.permutations(found))


@given(data=st.data(), replicas=st.booleans())
def test_spans_are_accepted_if_and_only_if_a_mask_counts_each_element_once(data: Any, replicas: bool) -> None:
    """A tiling, whole or damaged: spans dropped, doubled, or others put in."""
    shape = data.draw(SHAPES)
    given_spans = data.draw(tilings(shape))
    for _ in range(data.draw(st.integers(0, 2))):
        change = data.draw(st.sampled_from(["drop", "double", "add"]))
        if change == "add" or not given_spans:
            given_spans = [*given_spans, data.draw(spans(shape))]
        else:
            place = data.draw(st.integers(0, len(given_spans) - 1))
            twice = [given_spans[place]] if change == "double" else []
            given_spans = [*given_spans[:place], *twice, *twice, *given_spans[place + 1 :]]
    count = np.zeros(math.prod(shape), dtype=int)
    for span in given_spans:
        count[elements(shape, span)] += 1
    if (count >= 1).all() if replicas else (count == 1).all():
        check_cover("w", shape, given_spans, replicas=replicas, remedy="")
        return
    with pytest.raises(RuntimeError, match=r"^w .* are (missing|there twice): $") as caught:
        check_cover("w", shape, given_spans, replicas=replicas, remedy="")
    named = re.search(r"the elements (\[\[.*\]\]) of its shape", str(caught.value))
    if named is not None:
        box = tuple(map(tuple, json.loads(named.group(1))))
        bad = count[elements(shape, Span(box, 0, numel(box)))]
        assert bad.size
        assert (bad == 0).all() if "missing" in str(caught.value) else (bad > 1).all()


@given(data=st.data())
def test_the_rectangles_of_a_range_are_its_elements_in_order_and_few(data: Any) -> None:
    shape = data.draw(SHAPES)
    span = data.draw(spans(shape))
    box = whole(shape) if span.box is None else span.box
    found = list(rectangles(box, span.start, span.end))
    in_order = [elements(shape, Span(one, 0, numel(one))) for one in found]
    assert np.array_equal(np.concatenate([np.empty(0, int), *in_order]), elements(shape, span))
    assert len(found) <= max(1, 2 * len(shape) - 1)


@given(data=st.data())
def test_what_two_spans_have_in_common_is_copied_to_its_place_and_nothing_else(data: Any) -> None:
    shape = data.draw(SHAPES)
    left, right = data.draw(spans(shape)), data.draw(spans(shape))
    target, source = elements(shape, left), elements(shape, right)
    found, stored = torch.full((target.size,), -1), torch.from_numpy(source)
    for to, of in common(left, right, shape):
        to.of(found).copy_(of.of(stored))
    assert found.tolist() == [index if index in source else -1 for index in target.tolist()]


@pytest.mark.parametrize("ranges", [[], [(0, 0)], [(3, 3)]])
def test_nothing_is_covered_by_nothing(ranges: list[tuple[int, int]]) -> None:
    empty = [Span(None, start, end) for start, end in ranges]
    check_cover("w", (0,), empty, remedy="")
    with pytest.raises(RuntimeError, match=r"\[0, 5\) of 5 are missing"):
        check_cover("w", (5,), empty, remedy="")


@pytest.mark.parametrize(
    ("box", "end", "sentence"),
    [
        (((0, 3), (0, 3), (0, 1)), 9, r"shape \[4, 6\], and a box of it must lie inside, but one is \[\[0, 3\], \["),
        (((0, 3),), 3, r"but one is \[\[0, 3\]\]: ask"),
        (((0, 5), (0, 3)), 1, r"but one is \[\[0, 5\], \[0, 3\]\]: ask"),
        (((0, 4), (4, 3)), 0, r"but one is \[\[0, 4\], \[4, 3\]\]: ask"),
        (((0, 4), (0, 3)), 13, r"w has a box \[\[0, 4\], \[0, 3\]\] of 12 elements, but a range ends at 13: ask"),
    ],
)
@pytest.mark.parametrize("replicas", [False, True])
def test_a_box_outside_the_tensor_and_a_range_outside_its_box_are_refused(
    box: Box, end: int, sentence: str, replicas: bool
) -> None:
    every = [Span(None, 0, 24), Span(box, 0, end)]
    with pytest.raises(RuntimeError, match=sentence):
        check_cover("w", (4, 6), every, replicas=replicas, remedy="ask")


def test_a_table_of_a_thousand_million_elements_on_256_ranks_needs_no_mask() -> None:
    """64 row shards of 4 columns, each cut into 8 partitions."""
    rows, width, share = 2**20 // 64, 256, 2**20 // 64 * 256 // 8
    parts = [
        Span(((r * rows, (r + 1) * rows), (c * width, (c + 1) * width)), k * share, (k + 1) * share)
        for r, c, k in itertools.product(range(64), range(4), range(8))
    ]
    check_cover("w", (2**20, 1024), parts, remedy="")
    gone = parts.pop(1000)
    assert gone.box is not None
    with pytest.raises(RuntimeError, match="are missing") as caught:
        check_cover("w", (2**20, 1024), parts, remedy="")
    first = gone.box[0][0] + gone.start // width
    assert text(((first, first + rows // 8), gone.box[1])) in str(caught.value)
