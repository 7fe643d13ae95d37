"""The prediction of a step: its rings against what every rank counts, memory and seconds against sums by hand."""

import itertools
from typing import Any

import pytest

from model.config import UsedBank
from model.section import BankShape
from parallel.ledger import Ledger
from parallel.peers import Peers
from parallel.predict import (
    DENSE_GRADIENTS,
    EXPERT_GRADIENTS,
    ZERO_GATHER,
    Hardware,
    Reduction,
    State,
    Topology,
    Work,
    all_gather,
    all_reduce,
    predict,
)
from parallel.volume import BankExchange, Expected

BANK = BankShape(
    name="experts",
    label="mlp",
    num_groups=10,
    num_heads=1,
    top_k=10,
    shares_groups=False,
    row_dim=16,
    output_dim=16,
    rows_per_token=1,
    outputs_per_token=1,
    same_rows=True,
    group_numel=100,
    is_table=False,
    replies=False,
    token_factor=1,
    hashed=False,
)


def counted(topology: Topology, num_bytes: int, *, stride: int, kind: str) -> Expected:
    """The mean of what the ranks' own objects say."""
    near = far = 0
    for rank in range(topology.processes):
        ranks = range(rank % stride, topology.processes, stride)
        is_near = tuple(other // topology.node_size == rank // topology.node_size for other in ranks)
        peers = Peers(None, ranks.index(rank), len(ranks), is_near, Ledger())  # pyright: ignore[reportArgumentType]
        sent = getattr(peers, kind)(num_bytes)
        near, far = near + sent.near, far + sent.far
    return Expected(near / topology.processes, far / topology.processes)


@pytest.mark.parametrize(("processes", "node_size"), [(1, 1), (4, 4), (4, 2), (8, 2), (8, 1), (24, 8), (16, 8)])
def test_a_ring_sends_what_the_ranks_count(processes: int, node_size: int):
    for stride in (size for size in (1, 2, 4, 8) if processes % size == 0):
        topology, num_bytes = Topology(processes, stride, node_size), 24 * 16 * 5
        for formula, kind in ((all_reduce, "all_reduce"), (all_gather, "all_gather")):
            found = formula(topology, num_bytes, stride=stride)
            expected = counted(topology, num_bytes, stride=stride, kind=kind)
            assert (found.near, found.far) == pytest.approx((expected.near, expected.far))


def work(**changes: Any) -> Work:
    settings: dict[str, Any] = {"tokens": 6, "accumulation_steps": 1, "wire_bytes": 2, "chunks": 1, "recompute": False}
    settings["macs_per_token"] = 1000.0
    return Work(**settings | changes)


def state(**changes: Any) -> State:
    settings: dict[str, Any] = {"dense": (400, 80), "experts": (500,), "zero_stage": 1, "moments": 2}
    return State(**settings | changes)


@pytest.mark.parametrize(
    ("zero_stage", "gradients", "master", "moments"),
    [
        # 8 processes, expert-data size 2: a rank's part is (400 + 80) / 8 + 500 / 2 = 310 numbers of 980
        (0, 4 * 980, 0, 8 * 980),
        (1, 4 * 980, 4 * 310, 8 * 310),
        (2, 4 * 310, 4 * 310, 8 * 310),
    ],
)
def test_memory_is_what_each_stage_splits(zero_stage: int, gradients: int, master: int, moments: int):
    memory = predict(Topology(8, 4, 4), work(), state(zero_stage=zero_stage)).memory
    assert memory.weights == 4 * 980
    assert (memory.gradients, memory.master, memory.moments) == (gradients, master, moments)
    assert memory.bucket == (2e9 if zero_stage else 0)
    assert memory.total == 4 * 980 + gradients + master + moments + memory.bucket


def test_plain_sgd_keeps_no_moments_and_odd_sizes_are_padded_to_two_numbers_a_rank():
    memory = predict(Topology(8, 4, 4), work(), state(dense=(401,), moments=0)).memory
    assert (memory.moments, memory.master) == (0, 4 * (416 / 8 + 250))


def two_layers(**changes: Any) -> Work:
    """Two layers gather 10 groups, 3 on each of 4 ranks with the padding, of 100 weights; the second layer is used twice."""
    uses = {"layers.0.feedforward": 1, "layers.1.feedforward": 2}
    banks = [UsedBank(f"{layer}.experts", BANK, (layer,) * number) for layer, number in uses.items()]
    exchanges = {bank.path: BankExchange("weights", 1, 0.0, 0.0) for bank in banks}
    return work(banks=banks, exchanges=exchanges, **changes)


def test_gathered_weights_stay_until_the_backward_pass_unless_recomputed():
    """Their gradients are there for one block at a time."""
    whole = 2 * 100 * 12
    assert predict(Topology(4, 4, 4), two_layers(), state()).memory.gathered == 3 * whole + whole
    assert predict(Topology(4, 4, 4), two_layers(recompute=True), state()).memory.gathered == whole + whole
    assert predict(Topology(4, 1, 4), two_layers(), state()).memory.gathered == 0


def test_weights_travel_once_for_each_use_and_forward_once_more_with_recompute():
    to_others = 3 * 2 * 100 * 3
    for recompute, steps in itertools.product((False, True), (1, 3)):
        done = two_layers(recompute=recompute, accumulation_steps=steps)
        sent = predict(Topology(4, 4, 4), done, state()).sent
        assert sent["weights"] == Expected(near=steps * 3 * (3 if recompute else 2) * to_others)


def test_statistics_are_repeated_where_the_layer_is():
    inside, outside = Reduction(5, 3, backward=True, in_layer=True), Reduction(2, 1, backward=False, in_layer=False)
    for recompute, numbers in ((False, 2 * 3 * 5 + 2), (True, 3 * 3 * 5 + 2)):
        done = work(reductions=(inside, outside), recompute=recompute, accumulation_steps=2)
        sent = predict(Topology(4, 1, 4), done, state()).sent["statistics"]
        assert sent.near == pytest.approx(2 * numbers * 4 * 2 * 3 / 4)


@pytest.mark.parametrize(("zero_stage", "reductions", "gathers"), [(0, 1, 0), (1, 1, 1), (2, 3, 1)])
def test_gradients_are_summed_once_a_step_but_at_stage_2_once_a_micro_step(zero_stage, reductions, gathers):
    sent = predict(Topology(8, 4, 4), work(accumulation_steps=3), state(zero_stage=zero_stage)).sent
    assert sent[DENSE_GRADIENTS].total == pytest.approx(reductions * 2 * 7 / 8 * 480 * 4)
    assert sent[EXPERT_GRADIENTS] == Expected(far=reductions * 500 * 4)  # two ranks, one on each node
    assert sent[ZERO_GATHER].total == pytest.approx(gathers * (7 / 8 * 480 * 4 + 500 * 4 / 2))


def test_seconds_are_bytes_over_rates_and_overlap_hides_the_exchange_alone():
    hardware = Hardware(nvlink_gb=2.0, network_gb=0.5, tflops=3.0)
    assert hardware.seconds(Expected(4e9, 1e9)) == pytest.approx(2 + 2)
    done = two_layers(macs_per_token=1e6, accumulation_steps=2)
    prediction = predict(Topology(8, 4, 4), done, state())
    assert prediction.flops == 6 * 1e6 * 6 * 2
    seconds = prediction.seconds(hardware)
    exchange = prediction.sent["weights"].near / 2e9
    assert seconds.exchange == pytest.approx(exchange)
    assert seconds.compute is not None
    assert seconds.compute == pytest.approx(72e6 / 3e12)
    rest = sum(sent.near / 2e9 + sent.far / 0.5e9 for verb, sent in prediction.sent.items() if verb != "weights")
    assert seconds.without_overlap == pytest.approx(seconds.compute + exchange + rest)
    assert seconds.with_overlap == pytest.approx(max(seconds.compute, exchange) + rest)


def test_recompute_is_one_forward_pass_more_and_an_unknown_cost_is_no_number():
    assert predict(Topology(4, 4, 4), work(recompute=True), state()).flops == 8 * 1000 * 6
    assert predict(Topology(4, 4, 4), work(macs_per_token=None), state()).flops is None
