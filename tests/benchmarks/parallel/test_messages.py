"""The formulas of the exchange's bytes, against messages written out by hand."""

from collections import Counter

import pytest

from benchmarks.parallel.messages import Bank, Choices, Message, counts, messages, sent, undeduplicated

# two ranks with two groups each. Token 0 chose groups 0 and 3, token 1 chose 2 and 3: of V, head 0 and head 1 of each token
MINE = Choices(sources=[0, 0, 1, 1], outputs=[0, 1, 2, 3], groups=[[0], [3], [2], [3]])
NOTHING = Choices(sources=[], outputs=[], groups=[])
VALUE = Bank(num_groups=4, row_dim=10, output_dim=3)


def test_a_row_counts_once_for_each_rank_however_many_of_its_experts_are_there():
    (part,) = messages(MINE, VALUE, ranks=2)
    assert part == [Message(rows=1, outputs=1, copies=1), Message(rows=2, outputs=3, copies=3)]


def test_a_row_in_two_parts_counts_in_both():
    parts = list(messages(MINE, VALUE, ranks=2, chunks=3))
    assert [part[1] for part in parts] == [
        Message(1, 1, 1),
        Message(1, 2, 2),
        Message(0, 0, 0),
    ]  # 4 entries: 2, 2 and none


def test_without_rows_there_are_as_many_parts():
    assert list(messages(NOTHING, VALUE, ranks=2, chunks=3)) == [[Message(0, 0, 0)] * 2] * 3


def test_bytes_of_a_forward_and_a_backward_pass():
    mine, other = sent([MINE, NOTHING], VALUE)
    assert mine == Counter(
        {
            ("plan", False): 4 * (2 + 2 * 3),  # two rows' numbers of copies; group and output row of three copies
            ("gates", False): 4 * 3,
            ("dispatch", False): 4 * 2 * 10,
            ("combine", True): 4 * 3 * 3,
        }
    )
    assert other == Counter({("combine", False): 4 * 3 * 3, ("dispatch", True): 4 * 2 * 10, ("gates", True): 4 * 3})


def test_one_space_needs_no_output_rows_in_the_metadata():
    tokens = Choices(sources=[0, 1], outputs=[0, 1], groups=[[2, 3], [0, 3]])
    mine, _ = sent([tokens, NOTHING], Bank(num_groups=4, row_dim=10, output_dim=10, same_rows=True))
    assert mine["plan", False] == 4 * (2 + 3)


def test_the_last_rank_owns_the_rest_of_an_uneven_bank():
    (part,) = messages(Choices([0], [0], [[2, 4]]), Bank(num_groups=5, row_dim=1, output_dim=1), ranks=2)
    assert [message.copies for message in part] == [1, 1]  # groups 0 to 2, then 3 and 4


def test_without_deduplication_each_remote_copy_is_a_row_and_a_result():
    assert undeduplicated([MINE, NOTHING], VALUE) == [
        4 * 3 * 13,
        4 * 3 * 13,
    ]  # forward out and home, backward the other way


@pytest.mark.parametrize(("routings", "ranks", "chunks"), [(1, 2, 1), (2, 4, 3)])
def test_counts_are_three_numbers_to_each_other_rank(routings, ranks, chunks):
    assert counts(routings=routings, ranks=ranks, chunks=chunks) == 8 * 3 * routings * chunks * (ranks - 1)
