"""Ranges inside boxes of a tensor: which elements they mean, and whether together they hold each element once.

A box is one [first, end) per dimension of a logical tensor; None is the whole tensor. A range [start, end) counts in the box flattened
row-major. Owns this arithmetic alone: no file, no tensor data. Called by train/manifest.py and train/coverage.py (what must be there)
and train/storage.py (what meets what).
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from model.parameters import Box


class Span(NamedTuple):
    """Elements [start, end) of the flattened `box`."""

    box: Box | None
    start: int
    end: int


def box_of(sides: Iterable[Iterable[int]] | None, shape: Sequence[int]) -> Box | None:
    """`sides` as a Box; None if it is the whole tensor."""
    box = None if sides is None else tuple((first, end) for first, end in sides)
    return None if box == whole(shape) else box


def whole(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)


def sizes_of(box: Box) -> tuple[int, ...]:
    return tuple(end - first for first, end in box)


def numel(box: Box) -> int:
    return math.prod(sizes_of(box))


def text(box: Box) -> str:
    return str([list(side) for side in box])


def meeting(left: Box, right: Box) -> Box | None:
    """The elements in both, if there are any."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(left, right, strict=True))
    return both if all(first < end for first, end in both) else None


def rectangles(box: Box, start: int, end: int) -> Iterator[Box]:
    """The boxes that, one after the other, are the elements [start, end) of the flat `box`: at most 2 d - 1 for d dimensions."""
    if start >= end:
        return
    if not box:
        yield ()
        return
    (first, _), inner = box[0], box[1:]
    size = numel(inner)
    head, tail = -(-start // size), end // size  # slabs [head, tail) of the first dimension are wanted whole
    if head > tail:  # inside one slab
        yield from _in_slab(first + tail, rectangles(inner, start - tail * size, end - tail * size))
        return
    yield from _in_slab(first + head - 1, rectangles(inner, start - (head - 1) * size, size))
    if head < tail:
        yield ((first + head, first + tail), *inner)
    yield from _in_slab(first + tail, rectangles(inner, 0, end - tail * size))


def _in_slab(slab: int, boxes: Iterable[Box]) -> Iterator[Box]:
    for box in boxes:
        yield ((slab, slab + 1), *box)


class Window(NamedTuple):
    """Some elements of a flat tensor: those at `part` of its range [start, end) in the shape `sizes`."""

    start: int
    end: int
    sizes: tuple[int, ...]
    part: tuple[slice, ...]

    def of(self, flat: Any) -> Tensor:
        """A view of `flat`: a 1-D tensor, or a slice of a file, of which only [start, end) is asked."""
        return flat[self.start : self.end].view(self.sizes)[self.part]


def common(left: Span, right: Span, shape: Sequence[int]) -> Iterator[tuple[Window, Window]]:
    """The elements that two spans of a tensor have in common, as windows of equal sizes; they count from the spans' starts."""
    if left.box == right.box:
        start, end = max(left.start, right.start), min(left.end, right.end)
        if start < end:
            yield _run(start - left.start, end - start), _run(start - right.start, end - start)
        return
    for left_offset, left_box in _placed(left, shape):
        for right_offset, right_box in _placed(right, shape):
            both = meeting(left_box, right_box)
            if both is not None:
                yield _window(left_box, left_offset, both), _window(right_box, right_offset, both)


def _run(start: int, length: int) -> Window:
    return Window(start, start + length, (length,), (slice(None),))


def _placed(span: Span, shape: Sequence[int]) -> Iterator[tuple[int, Box]]:
    """The rectangles of a span, each with its offset from the span's start."""
    offset = 0
    for rectangle in rectangles(whole(shape) if span.box is None else span.box, span.start, span.end):
        yield offset, rectangle
        offset += numel(rectangle)


def _window(rectangle: Box, offset: int, both: Box) -> Window:
    """`both` inside a rectangle that lies at `offset`: the slabs of the first dimension that have some of it, and that part of them."""
    (first, _), inner = rectangle[0], rectangle[1:]
    (head, tail), slab = both[0], numel(inner)
    part = (slice(a - begin, b - begin) for (a, b), (begin, _) in zip(both[1:], inner, strict=True))
    start, end = offset + (head - first) * slab, offset + (tail - first) * slab
    return Window(start, end, (tail - head, *sizes_of(inner)), (slice(None), *part))


def check_cover(name: str, shape: Sequence[int], spans: Iterable[Span], *, replicas: bool = False, remedy: str) -> None:
    """The spans hold each element of a tensor of `shape` exactly once (at least once if `replicas`).

    No mask of the tensor is made: spans of one box are joined, and what remains is counted on the grid of their edges.

    Raises:
        RuntimeError: a gap, an overlap, a box or a range beyond the end, with the tensor's name, the elements and `remedy`.
    """
    by_box: dict[Box | None, list[tuple[int, int]]] = defaultdict(list)
    for box, start, end in spans:
        _check_inside(name, shape, box, end, remedy)
        by_box[box_of(box, shape)].append((start, end))
    if by_box.keys() <= {None}:
        _check_ranges(name, math.prod(shape), by_box[None], replicas, remedy)
        return
    held = [
        rectangle
        for box, ranges in by_box.items()
        for start, end in _joined(ranges, replicas)
        for rectangle in rectangles(whole(shape) if box is None else box, start, end)
    ]
    _check_rectangles(name, shape, held, replicas, remedy)


def _check_inside(name: str, shape: Sequence[int], box: Box | None, end: int, remedy: str) -> None:
    if box is None:
        return
    if len(box) != len(shape) or any(not 0 <= a <= b <= size for (a, b), size in zip(box, shape, strict=True)):
        raise RuntimeError(
            f"{name} has shape {list(shape)}, and a box of it must lie inside, but one is {text(box)}: {remedy}"
        )
    if end > numel(box):
        raise RuntimeError(
            f"{name} has a box {text(box)} of {numel(box)} elements, but a range ends at {end}: {remedy}"
        )


def _check_ranges(name: str, total: int, ranges: Iterable[tuple[int, int]], replicas: bool, remedy: str) -> None:
    covered = 0
    for start, end in sorted(ranges):
        if start == end:
            continue
        if start > covered:
            raise RuntimeError(
                f"{name} must be covered exactly, but elements [{covered}, {start}) of {total} are missing: {remedy}"
            )
        if start < covered and not replicas:
            overlap = f"[{start}, {min(covered, end)})"
            raise RuntimeError(
                f"{name} must be covered exactly, but elements {overlap} of {total} are there twice: {remedy}"
            )
        covered = max(covered, end)
    if covered < total:
        raise RuntimeError(
            f"{name} must be covered exactly, but elements [{covered}, {total}) of {total} are missing: {remedy}"
        )
    if covered > total:
        raise RuntimeError(f"{name} has {total} elements, but a range ends at {covered}: {remedy}")


def _joined(ranges: Iterable[tuple[int, int]], replicas: bool) -> list[tuple[int, int]]:
    """The same elements in fewer ranges: those that touch become one, and if replicas are allowed those that overlap."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if joined and (start == joined[-1][1] or (replicas and start < joined[-1][1])):
            start, before = joined.pop()
            end = max(before, end)
        if start < end:
            joined.append((start, end))
    return joined


def _check_rectangles(name: str, shape: Sequence[int], held: Sequence[Box], replicas: bool, remedy: str) -> None:
    cuts = [sorted({0, size, *itertools.chain.from_iterable(box[d] for box in held)}) for d, size in enumerate(shape)]
    number = [{cut: index for index, cut in enumerate(of_one)} for of_one in cuts]
    count = np.zeros([len(of_one) - 1 for of_one in cuts], dtype=np.int32)  # of each cell between neighbouring cuts
    for box in held:
        count[tuple(slice(number[d][first], number[d][end]) for d, (first, end) in enumerate(box))] += 1
    for wrong, what in ((count == 0, "missing"), (count > 1, "there twice")):
        if wrong.any() and not (replicas and what == "there twice"):
            cell = np.argwhere(wrong)[0].tolist()
            place = text(tuple((cuts[d][index], cuts[d][index + 1]) for d, index in enumerate(cell)))
            raise RuntimeError(
                f"{name} must be covered exactly, but the elements {place} of its shape {list(shape)} are {what}: {remedy}"
            )
