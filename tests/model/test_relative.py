"""Relative positions: the table of distances, the shift, the biases and the scale, and how they begin."""

import math

import pytest
import torch

from model.parameters import materialize, truncated_normal
from model.relative import RelativeCache, RelativePositions, shift, sinusoids
from tests.model import by_hand
from tests.model.build import attention, normal, switchhead


@pytest.mark.parametrize("dim", [6, 7])
def test_sinusoids_are_sine_and_cosine_in_turns_with_growing_wavelengths(dim: int):
    distances = torch.tensor([5.0, 0.0, 700.0], dtype=torch.float64)
    expected = torch.stack([by_hand.sinusoid(distance, dim) for distance in (5, 0, 700)])
    torch.testing.assert_close(sinusoids(distances, dim), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(5, 5), (3, 7), (1, 4), (1, 1)])
def test_the_shift_gives_each_key_that_is_not_ahead_the_product_for_its_distance(num_queries: int, num_keys: int):
    products = normal(2, 3, num_queries, num_keys)  # column p: distance num_keys - 1 - p
    shifted = shift(products)
    assert shifted.shape == products.shape
    for i in range(num_queries):
        own = num_keys - num_queries + i
        for j in range(own + 1):
            assert torch.equal(shifted[..., i, j], products[..., i, num_keys - 1 - (own - j)])


def test_the_table_holds_the_projected_distances_the_farthest_first():
    relative = RelativePositions(d_model=6, num_heads=2, head_dim=3, draw=truncated_normal(1.0), learned=False)
    materialize(relative, seed=1, dtype=torch.float64)
    table_HMC = relative.table(4, None)
    for h in range(2):
        for row, distance in enumerate((3, 2, 1, 0)):
            expected = relative.weight[3 * h : 3 * h + 3] @ by_hand.sinusoid(distance, 6)
            torch.testing.assert_close(table_HMC[h, row], expected, rtol=0, atol=1e-13)


def test_a_cache_keeps_the_table_and_computes_it_rarely(monkeypatch: pytest.MonkeyPatch):
    relative = RelativePositions(d_model=6, num_heads=2, head_dim=3, draw=truncated_normal(1.0), learned=False)
    materialize(relative, seed=1, dtype=torch.float64)
    cache, sizes, project = RelativeCache(block_length=100, memory_blocks=0), [], relative._project
    monkeypatch.setattr(relative, "_project", lambda size: (sizes.append(size), project(size))[1])
    for num_keys in range(1, 40):
        torch.testing.assert_close(relative.table(num_keys, cache), project(num_keys), rtol=0, atol=1e-15)
    assert sizes == [1, 2, 4, 8, 16, 32, 64]


def test_the_dense_form_begins_with_zero_biases_and_one_over_the_root_of_the_width_as_scale():
    fresh = RelativePositions(d_model=32, num_heads=2, head_dim=40, draw=truncated_normal(0.25), learned=True)
    materialize(fresh, seed=1)
    assert not fresh.content_bias.any()
    assert not fresh.position_bias.any()
    assert fresh.scale.item() == pytest.approx(1 / math.sqrt(40))
    assert fresh.weight.std().item() == pytest.approx(0.25, rel=1e-6)


def test_switchhead_has_no_biases_and_no_scale_and_draws_w_pos_like_its_other_inputs():
    names = dict(switchhead(positions="xl").attend.named_parameters())
    assert list(names) == ["relative.weight"]
    wide = switchhead(positions="xl", d_model=64, head_dim=40).attend.relative.weight
    assert wide.shape == (80, 64)
    assert wide.std().item() == pytest.approx(math.sqrt(2 / 2 / 64), rel=5 / math.sqrt(2 * wide.numel()))
    dense = dict(attention(positions="xl").attend.named_parameters())
    assert {name: tuple(value.shape) for name, value in dense.items()} == {
        "relative.weight": (20, 6),
        "relative.content_bias": (20,),
        "relative.position_bias": (20,),
        "relative.scale": (1,),
    }


def test_biases_and_scale_do_not_decay():
    from train.optimizer import parameter_groups

    layer = attention(positions="xl")
    decaying = {id(value) for value in parameter_groups(layer, weight_decay=0.1)[0]["params"]}
    relative = layer.attend.relative
    assert id(relative.weight) in decaying
    assert not decaying & {id(relative.content_bias), id(relative.position_bias), id(relative.scale)}
