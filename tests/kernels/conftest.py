"""Triton's interpreter for the tests of the kernels: a process of its own, since TRITON_INTERPRET=1 decides at triton's import.

Owns: that process. Does not own: how a pool works (tests/pool.py). Called by: pytest.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.pool import Pool


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`interpreted(function, *args)` returns what a module-level function returns where kernels run in the interpreter.

    Compare what it returns in the test, not in the function: an exception there costs a new process (3 s).
    """
    pool = Pool(1, folder=tmp_path_factory.mktemp("interpreter"), environment={"TRITON_INTERPRET": "1"})
    yield lambda function, *args, timeout=60.0: pool.run(function, *args, timeout=timeout)[0]
    pool.stop()
