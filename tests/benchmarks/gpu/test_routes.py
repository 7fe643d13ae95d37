"""Routes of the GPU benchmarks."""

import pytest
import torch

from benchmarks.gpu import routes


def test_experts_are_distinct_and_zipf_prefers_the_first():
    for zipf in (False, True):
        generator = torch.Generator().manual_seed(1)
        ids = routes.choose_experts(tokens=20_000, num_experts=8, top_k=2, zipf=zipf, generator=generator)
        assert (ids[:, 0] != ids[:, 1]).all()
        first = torch.bincount(ids[:, 0], minlength=8) / len(ids)
        harmonic = sum(1 / (i + 1) for i in range(8))
        wanted = [1 / (i + 1) / harmonic if zipf else 1 / 8 for i in range(8)]
        assert first.tolist() == pytest.approx(wanted, abs=0.015)


def test_copies_are_sorted_by_head_and_expert_and_tell_their_pair():
    generator = torch.Generator().manual_seed(2)
    copies = routes.sorted_copies(tokens=5, heads=3, num_experts=4, top_k=2, zipf=True, generator=generator)
    wanted = sorted(
        (pair % 3 * 4 + expert, pair * 2 + choice, pair)
        for pair, experts in enumerate(copies.ids_PK.tolist())
        for choice, expert in enumerate(experts)
    )
    groups, order, pairs = zip(*wanted, strict=True)
    assert copies.order_C.tolist() == list(order)
    assert copies.pair_C.tolist() == list(pairs)
    assert copies.offsets_G.tolist() == [sum(group <= last for group in groups) for last in range(12)]
