"""The buffers of keys and values: what they refuse, and how often they are copied."""

import pytest
import torch

from model.cache import KeyValueCache


def positions(count: int) -> torch.Tensor:
    return torch.zeros(1, 2, count, 3)


def test_with_memory_a_piece_must_end_where_its_block_does():
    cache = KeyValueCache(block_length=4, memory_blocks=1)
    cache.extend(positions(3), positions(3))
    with pytest.raises(ValueError, match="2 come after 3 of a block of 4"):
        cache.extend(positions(2), positions(2))
    assert cache.length == 3


def test_a_growing_text_is_copied_a_logarithmic_number_of_times():
    cache = KeyValueCache(block_length=4, memory_blocks=0)
    buffers = set()
    for _ in range(1000):
        key, _ = cache.extend(positions(1), positions(1))
        buffers.add(key.untyped_storage().data_ptr())
    assert key.shape[2] == 1000
    assert len(buffers) <= 11  # 1, 2, 4 .. 1024


def test_with_memory_the_buffers_stop_growing():
    cache = KeyValueCache(block_length=4, memory_blocks=2)
    sizes = []
    for _ in range(60):
        key, _ = cache.extend(positions(1), positions(1))
        sizes.append(key.untyped_storage().nbytes())
    assert len(set(sizes[12:])) == 1
