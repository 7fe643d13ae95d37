"""Rotary positions against complex multiplication."""

import pytest
import torch

from model.rope import rotate
from tests.model import by_hand
from tests.model.build import normal


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize(("head_dim", "width"), [(2, 2), (4, 2), (8, 8), (10, 4), (41, 20), (64, 32)])
def test_rotation_is_complex_multiplication_of_the_first_channels(head_dim: int, width: int, first: int):
    x = normal(2, 3, 7, head_dim)
    expected = [torch.stack([by_hand.rope(head, width=width, first=first) for head in row]) for row in x]
    torch.testing.assert_close(rotate(x, width=width, first=first), torch.stack(expected), rtol=0, atol=1e-13)


def test_scores_depend_on_the_distance_of_positions_only():
    q, k = normal(16, seed=1), normal(16, seed=2)
    turned_q = rotate(q.expand(1, 1, 9, 16), width=8)[0, 0]
    scores = turned_q @ rotate(k.expand(1, 1, 9, 16), width=8)[0, 0].T
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-12)
    assert scores[0].std() > 0.1


def test_narrow_dtypes_are_rotated_with_float32_angles():
    """In bfloat16, position 257 does not exist."""
    x = normal(1, 1, 600, 8).bfloat16()
    rotated = rotate(x, width=4)
    assert rotated.dtype == torch.bfloat16
    torch.testing.assert_close(rotated.double(), rotate(x.double(), width=4), rtol=2**-8, atol=1e-4)
