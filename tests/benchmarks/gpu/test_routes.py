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
