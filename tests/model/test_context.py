"""Dropout masks as a pure function of coordinates, and the document mask."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.context import BatchContext, dropout, gaussian_noise, hash_with, keep_channels, keep_mask, token_hashes
from tests.model.build import context, normal

SIZE = 64  # of each axis of the masks whose statistics are taken: 262,144 bits, so a correlation has a spread of 1/512
FIVE_SIGMA = 5 / 512
PINNED_MASK = ["11100010", "11010011", "00010110", "10100110", "00100101", "01101001"]


def mask(facts: BatchContext, *, probability: float = 0.5, site: str = "mixer", depth: int = 0, length: int = SIZE) -> Tensor:  # fmt: skip
    return keep_mask(replace(facts, depth=depth), length, SIZE, probability=probability, site=site)


def correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.flatten().double(), second.flatten().double()]))[0, 1])


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_an_element_is_kept_with_chance_one_minus_p_along_every_axis(probability: float):
    kept = mask(context(SIZE), probability=probability).double()
    spread = (probability * (1 - probability)) ** 0.5
    assert abs(kept.mean() - (1 - probability)) < 5 * spread / SIZE**1.5
    for axes in ((0, 1), (0, 2), (1, 2)):
        assert (kept.mean(axes) - (1 - probability)).abs().max() < 5 * spread / SIZE


def test_neighbours_in_row_offset_and_channel_are_uncorrelated():
    kept = mask(context(SIZE))
    for axis in range(3):
        length = kept.shape[axis] - 1
        assert abs(correlation(kept.narrow(axis, 0, length), kept.narrow(axis, 1, length))) < FIVE_SIGMA


@pytest.mark.parametrize(
    ("facts", "names"),
    [
        pytest.param(context(SIZE), {"depth": 1}, id="depth"),
        pytest.param(context(SIZE), {"site": "feedforward"}, id="site"),
        pytest.param(context(SIZE, step=1), {}, id="step"),
        pytest.param(context(SIZE, seed=2), {}, id="seed"),
        pytest.param(context([p + SIZE for p in range(SIZE)]), {}, id="position"),
        pytest.param(context([p + 2**32 for p in range(SIZE)]), {}, id="position_above_32_bits"),
        pytest.param(context([p + 2**33 for p in range(SIZE)]), {}, id="position_far_above_32_bits"),
    ],
)
def test_masks_of_another_depth_site_step_seed_or_position_are_uncorrelated(facts, names):
    assert abs(correlation(mask(context(SIZE)), mask(facts, **names))) < FIVE_SIGMA


def test_positions_above_32_bits_are_uncorrelated_with_each_other():
    first, second = (mask(context([p + k * 2**32 for p in range(SIZE)])) for k in (5, 6))
    assert abs(correlation(first, second)) < FIVE_SIGMA
    assert abs(correlation(first[:-1], first[1:])) < FIVE_SIGMA


def test_a_row_has_the_same_mask_whatever_rows_it_is_batched_with():
    positions = [3, 2**40 + 1, 0, 77, 12]
    together = mask(context(positions))
    for index, position in enumerate(positions):
        assert torch.equal(together[index], mask(context([position]))[0])


def test_a_shorter_row_has_the_beginning_of_the_longer_rows_mask():
    assert torch.equal(mask(context(3), length=5), mask(context(3))[:, :5])


def test_masks_are_what_they_were_in_every_earlier_version():
    """A run resumed by a later version must drop the same elements. From the hash of the coordinates in exact integers."""
    facts = context([0, 7, 2**32 + 7], seed=3, step=11, depth=4)
    kept = keep_mask(facts, 2, 8, probability=0.5, site="mixer")
    assert ["".join(str(int(bit)) for bit in row) for row in kept.flatten(0, 1)] == PINNED_MASK


def test_dropout_zeroes_or_scales_and_its_gradient_does_the_same():
    x = normal(4, 5, SIZE).requires_grad_()
    y = dropout(x, context(4), probability=0.2, site="mixer")
    kept = mask(context(4), probability=0.2, length=5)
    torch.testing.assert_close(y, torch.where(kept, x / 0.8, 0.0), rtol=1e-15, atol=0)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(kept, 1 / 0.8, 0.0).double(), rtol=1e-15, atol=0)


def test_dropout_keeps_the_mean():
    y = dropout(torch.ones(SIZE, SIZE, SIZE), context(SIZE), probability=0.2, site="mixer")
    assert abs(y.mean() - 1) < 5 * (0.2 / 0.8) ** 0.5 / SIZE**1.5


def test_dropout_with_probability_zero_is_the_input_itself():
    x = normal(2, 3, 4)
    assert dropout(x, context(2), probability=0.0, site="mixer") is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_dtype(dtype: torch.dtype):
    assert dropout(torch.ones(2, 3, 4, dtype=dtype), context(2), probability=0.1, site="mixer").dtype == dtype


def test_a_context_never_changes():
    facts = context(1)
    with pytest.raises(AttributeError):
        facts.step = 2  # type: ignore[misc]
    assert replace(facts, step=2).step == 2


def test_noise_is_standard_normal_and_uncorrelated_along_every_axis():
    noise = gaussian_noise(context(SIZE), SIZE, SIZE, site="mlp_noise").double()
    assert noise.shape == (SIZE, SIZE, SIZE)
    count = noise.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((noise**power).mean() - moment) < 5 * (variance / count) ** 0.5
    assert noise.abs().max() > 4
    for axis in range(3):
        assert abs(correlation(noise.narrow(axis, 0, SIZE - 1), noise.narrow(axis, 1, SIZE - 1))) < FIVE_SIGMA


def test_noise_is_a_function_of_seed_step_site_depth_and_the_coordinates():
    noise = gaussian_noise(context([5, 2**40]), 6, 7, site="mlp_noise")
    assert torch.equal(gaussian_noise(context([2**40]), 4, 7, site="mlp_noise")[0], noise[1, :4])
    others = [context([5, 2**40], seed=3), context([5, 2**40], step=3), context([5, 2**40], depth=3)]
    for other in (
        *(gaussian_noise(facts, 6, 7, site="mlp_noise") for facts in others),
        gaussian_noise(context([5, 2**40]), 6, 7, site="x"),
    ):
        assert not torch.isclose(other, noise).any()


def test_a_mask_made_from_the_hashes_of_tokens_far_from_their_context_is_the_one_made_with_it():
    hashes = token_hashes(context([5, 2**40]), 6, site="mlp_expert_hidden")
    assert torch.equal(hashes, hashes.double().long()), "they travel as float64"
    expected = keep_mask(context([5, 2**40]), 6, 7, probability=0.5, site="mlp_expert_hidden")
    assert torch.equal(keep_channels(hashes.flatten()[[3, 8]], 7, probability=0.5), expected.flatten(0, 1)[[3, 8]])
    further = keep_channels(hash_with(hashes, torch.tensor(4)), 7, probability=0.5)
    assert not torch.equal(further, expected)
