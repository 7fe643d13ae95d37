"""What every test may ask for: warm pools of processes, and the amount of property testing.

Owns: the session's pools and the hypothesis profiles. Does not own: how a pool works (tests/pool.py).
Called by: pytest.
"""

import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from tests.pool import Pool

POOL_SIZES = (1, 2, 4)

# ci: few examples, the same ones on every run, so that a red run is red again. fuzz: new examples each time; a failing
# one is printed with the @reproduce_failure line that repeats it (`--hypothesis-seed=N` repeats a whole run).
settings.register_profile("ci", max_examples=10, deadline=None, derandomize=True)
settings.register_profile("fuzz", max_examples=200, deadline=None, print_blob=True)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
settings.load_profile(PROFILE)
# What the drills of tests/end_to_end leave to chance. In the environment, where those that wish to repeat a drill put it.
DRILLS_SEED = os.environ.setdefault("DRILLS_SEED", "1")


def pytest_report_header() -> str:
    chosen = settings.get_profile(PROFILE)
    examples = "the same every time" if chosen.derandomize else "new ones every time"
    return f"property tests: profile {PROFILE}, {chosen.max_examples} examples each, {examples}; drills: DRILLS_SEED={DRILLS_SEED}"


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Pool]]:
    """`pool(4).run(function, *args, timeout=60)` calls a module-level function on 4 ranks: see tests.pool.Pool.run.

    A pool starts with its first job and serves the whole session; a session without such tests starts none.
    """
    folder = tmp_path_factory.mktemp("pools")
    pools = {size: Pool(size, folder=folder) for size in POOL_SIZES}

    def of_size(size: int) -> Pool:
        if size not in pools:
            raise ValueError(f"pool({size}) does not exist: the sizes are {POOL_SIZES}, each kept warm for all tests")
        return pools[size]

    yield of_size
    for each in pools.values():
        each.stop()
