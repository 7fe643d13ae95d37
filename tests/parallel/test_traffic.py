"""The `exchange` of a metrics record: means over ranks and steps, of the steps alone, and the same kinds on every rank."""

import time
from typing import Any

import pytest

from parallel.ledger import Ledger, Sent, Where
from tests.parallel.two_steps import open_world

VALUE = Where("layers.0.mixer", "value", "dispatch")
DEEPER = Where("layers.1.mixer", "value", "dispatch")
BACK = Where("layers.0.mixer", "value", "dispatch", backward=True)
HOME = Where("layers.0.mixer", "output", "combine")
REDUCE = Where("optimizer", "", "reduce")


def send(ledger: Ledger, where: Where, sent: Sent, *, wait: float = 0.0) -> None:
    with ledger.collective(where, sent):
        time.sleep(wait)


def two_steps() -> tuple[dict[str, Any], dict[str, Any], int]:
    """Rank r sends r times as much and waits (1 + r) times as long; between the steps it evaluates."""
    with open_world(1) as mesh:
        for step in (7, 8):
            mesh.begin_step(step)
            send(mesh.ledger, VALUE, Sent(1000 * mesh.rank, 10), wait=0.05 * (1 + mesh.rank))
            send(mesh.ledger, DEEPER, Sent(0, 4))
            send(mesh.ledger, BACK, Sent(6, 0))
            send(mesh.ledger, HOME, Sent(8, 0))
            if step == 8:
                send(mesh.ledger, REDUCE, Sent(0, 50))
            mesh.end_step()
            send(mesh.ledger, VALUE, Sent(10**9, 10**9), wait=0.2)  # an evaluation
        first = mesh.exchange()
        mesh.begin_step(9)
        send(mesh.ledger, HOME, Sent(2, 0))
        mesh.end_step()
        return first, mesh.exchange(), mesh.ledger.step


def test_a_record_has_the_mean_over_ranks_and_steps_and_leaves_out_what_is_no_step(pool):
    for first, second, step in pool(2).run(two_steps):
        assert first["bytes"] == {
            "combine": {"near": 8.0, "far": 0.0},
            "dispatch": {"near": 500.0, "far": 14.0},
            "dispatch_backward": {"near": 6.0, "far": 0.0},
            "reduce": {"near": 0.0, "far": 25.0},
        }
        assert first["banks"] == {"output": {"near": 8.0, "far": 0.0}, "value": {"near": 506.0, "far": 14.0}}
        assert sorted(first["seconds"]) == ["combine", "dispatch", "reduce"]
        assert first["seconds"]["dispatch"]["mean"] == pytest.approx(0.075, abs=0.02)
        assert first["seconds"]["dispatch"]["max"] == pytest.approx(0.1, abs=0.03)
        assert second["bytes"] == {"combine": {"near": 2.0, "far": 0.0}}
        assert step == 9


def one_rank_alone() -> str:
    with open_world(1) as mesh:
        mesh.begin_step(1)
        if mesh.rank == 1:
            send(mesh.ledger, VALUE, Sent(5, 0))
        mesh.end_step()
        try:
            return str(mesh.exchange())
        except RuntimeError as error:
            return str(error)


def test_a_collective_that_only_some_ranks_made_is_an_error_on_all(pool):
    first, second = pool(2).run(one_rank_alone)
    assert "this rank's are []" in first
    assert "this rank's are ['dispatch']" in second
