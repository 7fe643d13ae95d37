"""The benchmark of PEER and PKM on a CPU: it times nothing that is wrong, and counts what is saved."""

from dataclasses import replace

import pytest
import torch

from benchmarks.kernels.bench_peer_cpu import (
    PEER_CONTESTANTS,
    PKM_CONTESTANTS,
    TINY,
    Contestant,
    Inputs,
    Result,
    bars,
    beside_the_bar,
    check,
    measure,
    peer_by_einsum,
    saved_bytes,
)


@pytest.mark.parametrize("contestants", [PEER_CONTESTANTS, PKM_CONTESTANTS], ids=["PEER", "PKM"])
def test_all_forms_are_right_and_ours_saves_numbers_per_copy(contestants: tuple[Contestant, ...]):
    results = measure(contestants, replace(TINY, width=64), turns=2)
    assert [one.name for one in results] == [one.name for one in contestants]
    assert results[-1].saved < 0.2 * results[0].saved


@pytest.mark.parametrize(("clock", "cpu", "met"), [(2.82, 3.35, True), (3.35, 2.82, False)])
def test_the_bar_of_time_is_judged_by_the_cpu_which_counts_no_other_process(clock: float, cpu: float, met: bool):
    results = [
        Result(name, 1.0, 1.0, 0.0, 1.0, factor, of_cpu, saved)
        for name, factor, of_cpu, saved in (("dense", 1.0, 1.0, 10.0), ("ours", clock, cpu, 1.0))
    ]
    found, line = bars(results)
    assert found is met
    assert f"by the CPU: {'met' if met else '**missed**'}, {cpu} (by the clock {clock})" in line
    assert bars([results[0], replace(results[1], saved=1.1)])[0] is False


def test_beside_the_bar_stand_the_ratios_against_the_other_forms():
    times = {"dense": 60.0, "sparse": 17.0, "coalesced": 23.0, "ours": 10.0}
    results = [Result(name, 1.0, both, 0.0, 2 * both + 4, 1.0, 1.0, 1.0) for name, both in times.items()]
    assert beside_the_bar(results).endswith("times as fast: 1.70 (1.58) as 'sparse'; 2.30 (2.08) as 'coalesced'.")


def test_a_form_with_a_wrong_gradient_is_not_timed():
    wrong = Contestant("detached", lambda inputs: peer_by_einsum(inputs) + 0.01 * inputs.leaves["x"])
    with pytest.raises(RuntimeError, match="detached is wrong, so its time means nothing"):
        measure([PEER_CONTESTANTS[0], wrong], TINY, turns=2)
    check(PEER_CONTESTANTS, Inputs.of(TINY))


def test_a_storage_that_is_saved_twice_counts_once_and_inputs_not_at_all():
    inputs = Inputs.of(TINY)

    def forward(given: Inputs) -> torch.Tensor:
        made = given.leaves["x"] * 2.0
        return made * made * given.leaves["x"]  # saves `made` twice, its square once, and x

    assert saved_bytes(Contestant("made", forward), inputs) == 2 * 4 * inputs.leaves["x"].numel()
