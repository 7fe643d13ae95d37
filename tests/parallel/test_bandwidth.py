"""The ring of pairs, and the figures that two processes measure between them."""

import socket
import threading
from collections import Counter
from dataclasses import replace

import pytest
import torch

from parallel.bandwidth import Link, Rate, exchange, measure, open_store, ring_rounds


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def link(port: int, **changes) -> Link:
    made = Link(
        ranks=(0, 1),
        rank=0,
        backend="gloo",
        local_rank=0,
        megabytes=4.0,
        address="127.0.0.1",
        port=port,
        seconds=90.0,
    )
    return replace(made, **changes)


@pytest.mark.parametrize("size", range(1, 12))
def test_each_node_meets_its_two_neighbours_and_one_at_a_time(size: int):
    rounds = ring_rounds(size)
    for pairs in rounds:
        assert max(Counter(rank for pair in pairs for rank in pair).values()) == 1
    found = sorted(pair for pairs in rounds for pair in pairs)
    neighbours = {tuple(sorted((rank, (rank + 1) % size))) for rank in range(size)} if size > 1 else set()
    assert found == sorted(neighbours)
    assert len(rounds) <= 3


def test_two_processes_measure_a_sane_number():
    """Between 1 MB/s and 1 TB/s: a wrong unit is a factor of 1000 or more off, and no machine is."""
    port = free_port()
    store = open_store("127.0.0.1", port, seconds=90)
    found: dict[int, Rate] = {}

    def run(rank: int) -> None:
        found[rank] = measure(link(port, rank=rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del store
    for rank in (0, 1):
        rate = found[rank]
        assert rate.problem is None
        assert rate.all_reduce_gb is not None
        assert rate.all_to_all_gb is not None
        assert 1e-3 < rate.all_reduce_gb < 1e3
        assert 1e-3 < rate.all_to_all_gb < 1e3


def test_both_verbs_show_the_rate_at_which_a_node_sends_and_no_warm_up_counts(monkeypatch: pytest.MonkeyPatch):
    """On a clock of its own: each call takes what this rank sends at 2 GB/s; the first two are slow, the others unequal."""
    clock, calls = [0.0], Counter()
    slowness = [50.0, 50.0, 1.0, 0.6, 1.4, 0.8, 1.2]  # median of the last five: 1; of all seven: 1.2

    def take(verb: str, num_bytes: float) -> None:
        clock[0] += slowness[calls[verb]] * num_bytes / 2e9
        calls[verb] += 1

    def num_bytes(tensor: torch.Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    # A ring of two sends half of the tensor to reduce it and half to gather it; an all-to-all keeps the half that is one's own.
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: take("reduce", num_bytes(tensor)))
    monkeypatch.setattr("torch.distributed.all_to_all_single", lambda out, sent: take("all", num_bytes(sent) / 2))
    for name in ("init_process_group", "destroy_process_group", "barrier"):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda *args, **kwargs: None)
    for name in ("TCPStore", "PrefixStore"):
        monkeypatch.setattr(f"torch._C._distributed_c10d.{name}", lambda *args: None)
    monkeypatch.setattr("parallel.bandwidth.time.perf_counter", lambda: clock[0])
    assert exchange(link(1)) == Rate(pytest.approx(2.0), pytest.approx(2.0))  # pyright: ignore[reportArgumentType]


def test_a_partner_that_never_comes_is_not_waited_for_without_end():
    port = free_port()
    store = open_store("127.0.0.1", port, seconds=90)
    assert measure(link(port, seconds=1.5)) == Rate(problem="it has not ended within 2 s")
    del store


def test_a_port_that_is_taken_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"port {port} of 127.0.0.1 must be free") as caught:
            open_store("127.0.0.1", port, seconds=5)
    assert "\n" not in str(caught.value)
