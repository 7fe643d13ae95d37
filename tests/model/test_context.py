"""Dropout masks as a pure function of coordinates, and the document mask."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.context import BatchContext, dropout, keep_mask
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
