"""Where the tests that are marked gpu run: on a GPU; tiny in Triton's interpreter with SWITCHYARD_GPU_SMOKE=1; else they are skipped.

The tiny form (benchmarks/gpu_suite.sh with SMOKE=1) shows that the tests themselves run. Called by: pytest.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.gpu.cases import SMOKE

# cuBLAS is deterministic only with it, and it is read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SMOKE or torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(
                pytest.mark.skip(reason="gpu: torch sees none; benchmarks/gpu_suite.sh runs it on a machine with one")
            )


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if SMOKE else "cuda")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """A run sets torch up for itself."""
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.set_num_threads(before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill  # pyright: ignore[reportAttributeAccessIssue]
