"""How long a process computed while an exchange was under way, against sums of microseconds by hand."""

import json

import pytest

from benchmarks.parallel.trace import Overlap, common, length, read, union


def microseconds(intervals) -> set[int]:
    return {point for begin, end in intervals for point in range(begin, end)}


SOME = [(5, 9), (6, 7), (0, 3), (2, 4), (8, 12), (20, 21), (4, 5), (30, 30)]
OTHERS = [(1, 2), (3, 6), (11, 25)]


def test_a_union_covers_the_same_points_once():
    found = union(SOME)
    assert microseconds(found) == microseconds(SOME)
    assert length(found) == len(microseconds(SOME))


def test_common_is_what_both_cover():
    found = common(union(SOME), union(OTHERS))
    assert microseconds(found) == microseconds(SOME) & microseconds(OTHERS)
    assert length(found) == len(microseconds(SOME) & microseconds(OTHERS))


def event(name: str, begin: int, end: int, kind: str = "X") -> dict[str, object]:
    return {"ph": kind, "name": name, "ts": begin, "dur": end - begin}


def test_operators_count_under_gloos_own_events_and_waits_do_not(tmp_path):
    events = [
        event("gloo:all_to_all", 100, 200),
        event("gloo:all_to_all", 150, 260),
        event("dispatch/mlp", 90, 300),  # a range of ours: neither
        event("c10d::alltoall_base_", 95, 140),  # a collective that blocks is no computing
        event("aten::mm", 110, 160),
        event("aten::copy_", 120, 130),  # inside the other
        event("aten::add", 250, 280),
        event("aten::mm", 100, 200, kind="i"),
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = read(path)
    assert (found.exchange, found.compute, found.both) == pytest.approx((160e-6, 80e-6, 60e-6))


def test_a_trace_without_an_exchange_is_an_error(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [event("aten::mm", 0, 1)]}))
    with pytest.raises(RuntimeError, match="no gloo: event"):
        read(path)


def test_overlaps_add_up():
    assert Overlap(1.0, 2.0, 0.5) + Overlap(3.0, 4.0, 1.5) == Overlap(4.0, 6.0, 2.0)
