"""Bars, rows and what the times of several ranks become."""

import pytest

from benchmarks.parallel import bench_exchange
from benchmarks.parallel.table import Bar, Row, as_table, missed
from benchmarks.parallel.timing import as_milliseconds, median_ratio, slowest


def row(ratio: float | None, bar: Bar | None) -> Row:
    return Row("case", 2, "time", ("1 ms", "2 ms"), ratio, bar)


@pytest.mark.parametrize(
    ("bar", "ratio", "is_missed"),
    [
        (Bar("at least", 3.0), 3.0, False),
        (Bar("at least", 3.0), 2.999, True),
        (Bar("at most", 0.55), 0.55, False),
        (Bar("at most", 0.55), 0.551, True),
        (Bar("at least", 3.0), float("nan"), True),
        (Bar("at most", 0.55), float("nan"), True),
        (Bar("at most", 0.55), None, True),
        (None, 0.0, False),
    ],
)
def test_a_bar_includes_its_limit_and_no_nan(bar, ratio, is_missed):
    assert row(ratio, bar).missed == is_missed
    assert bool(missed([row(ratio, bar)])) == is_missed


def test_one_line_for_each_row():
    head, rule, *lines = as_table([row(2.0, Bar("at least", 3.0)), row(None, None)]).splitlines()
    assert head.count("|") == rule.count("|") == lines[0].count("|") == lines[1].count("|")
    assert lines[0] == "| case | 2 | time | 1 ms | 2 ms | 2 | at least 3 | **missed** |"


@pytest.mark.parametrize(("ratio", "code"), [(3.5, 0), (2.5, 1)])
def test_the_exit_code_says_whether_a_bar_was_missed(monkeypatch, capsys, ratio, code):
    monkeypatch.setattr(bench_exchange, "measure", lambda *_: [row(ratio, Bar("at least", 3.0)), row(None, None)])
    monkeypatch.setattr("sys.argv", ["bench_exchange"])
    assert bench_exchange.main() == code
    assert capsys.readouterr().out.count("| case |") == 3


def test_nothing_is_printed_where_a_layer_is_wrong(monkeypatch, capsys):
    def wrong(*_):
        raise RuntimeError("must equal one process")

    monkeypatch.setattr(bench_exchange, "measure", wrong)
    monkeypatch.setattr("sys.argv", ["bench_exchange"])
    with pytest.raises(RuntimeError):
        bench_exchange.main()
    assert capsys.readouterr().out == ""


def test_the_slowest_rank_of_each_repetition_counts():
    assert slowest([{"a": [1.0, 5.0], "b": [0.5, 0.5]}, {"a": [2.0, 3.0], "b": [0.25, 1.0]}]) == {
        "a": [2.0, 5.0],
        "b": [0.5, 1.0],
    }


def test_the_ratio_is_of_neighbours_in_time():
    # medians alone would say 4 / 2: the machine was busy in the last two repetitions
    assert median_ratio([1.0, 2.0, 10.0], [3.0, 4.0, 30.0]) == 3.0


def test_milliseconds_are_the_median_and_half_the_distance_of_the_quartiles():
    assert as_milliseconds([0.001, 0.002, 0.003, 0.004, 0.005]) == "3.0 ± 1.5 ms"
