"""What a test in this process must put back after a run: torch's global switches and the variables of the environment."""

import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch


@pytest.fixture
def torch_as_it_was() -> Iterator[None]:
    """train.build.set_up_torch changes the whole process; a test that calls it asks for this."""
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    with mock.patch.dict(os.environ):
        yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
    torch.utils.deterministic.fill_uninitialized_memory = fills  # pyright: ignore[reportAttributeAccessIssue]
