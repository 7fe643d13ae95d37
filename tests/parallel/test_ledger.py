"""The ledger: bytes by place, seconds by verb, and where the rank is, also after an error."""

import time

import pytest

from parallel.ledger import Ledger, Sent, Traffic, Where

VALUE = Where("layers.0.mixer", "value", "dispatch")
MLP = Where("layers.0.feedforward", "mlp", "combine", backward=True)


def test_bytes_add_up_by_place_and_are_taken_once():
    ledger = Ledger()
    for sent in (Sent(3, 4), Sent(10, 20)):
        with ledger.collective(VALUE, sent):
            pass
    with ledger.collective(MLP, Sent(near=1)), ledger.waiting(VALUE):
        pass
    assert ledger.take().sent == {VALUE: Sent(13, 24), MLP: Sent(1, 0)}
    assert ledger.take() == Traffic()


def test_seconds_are_those_inside_by_verb():
    ledger = Ledger()
    with ledger.collective(VALUE, Sent()):
        time.sleep(0.02)
    with ledger.waiting(VALUE):
        time.sleep(0.03)
    time.sleep(0.05)  # work between: nobody waits
    seconds = ledger.take().seconds
    assert list(seconds) == ["dispatch"]
    assert 0.05 <= seconds["dispatch"] < 0.09


def test_a_wait_inside_another_is_waited_once_and_seconds_of_both_verbs():
    ledger = Ledger()
    with ledger.waiting(Where("optimizer", "", "step")), ledger.waiting(MLP):
        time.sleep(0.05)
    assert 0.05 <= ledger.waited < 0.1
    assert min(ledger.take().seconds.values()) >= 0.05


def test_the_rank_is_inside_until_the_end_and_an_error_leaves_its_place():
    ledger = Ledger()
    assert (ledger.current, ledger.progress) == (None, 0)
    with ledger.waiting(MLP):
        assert (ledger.current, ledger.progress) == (MLP, 1)
        with ledger.collective(VALUE, Sent()):
            assert (ledger.current, ledger.progress) == (VALUE, 2)
        assert (ledger.current, ledger.progress) == (MLP, 3)
    assert (ledger.current, ledger.last, ledger.progress, ledger.failed) == (None, VALUE, 4, None)
    with pytest.raises(RuntimeError), ledger.collective(VALUE, Sent()):
        raise RuntimeError("connection closed")
    assert (ledger.current, ledger.failed) == (None, VALUE)


def test_a_place_is_said_with_label_and_direction():
    assert str(VALUE) == "dispatch (value) of layers.0.mixer, forward"
    assert str(MLP) == "combine (mlp) of layers.0.feedforward, backward"
    assert str(Where("optimizer", "", "reduce")) == "reduce of optimizer"


def test_traffic_of_several_steps_adds_up():
    one, two = (
        Traffic({VALUE: Sent(1, 2)}, {"dispatch": 0.5}),
        Traffic({VALUE: Sent(2), MLP: Sent(5)}, {"combine": 1.0}),
    )
    assert one + two == Traffic({VALUE: Sent(3, 2), MLP: Sent(5)}, {"dispatch": 0.5, "combine": 1.0})
