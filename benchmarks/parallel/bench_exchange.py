"""The exchange beside its rivals: DeepSpeed's mixture of experts, no deduplication, no overlap, weights instead of tokens.

Owns the processes, the one table and the exit code: 1 if a bar is missed. Every layer is first held against one process, and nothing is
printed if one is wrong (the exit code is then 1 too). What is measured is in parts.py. On CPU over gloo, one thread a process.
Called by: anyone, from the root of the clone: `python -m benchmarks.parallel.bench_exchange > FILE.md`. Linux.
"""

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.parallel import parts
from benchmarks.parallel.table import Row, as_table, missed

# as in the Makefile: large tensors are kept for the next step, not given back to the system and zeroed anew
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000", "MALLOC_TOP_PAD_": "67108864"}

PARTS: dict[str, Callable[[Any, parts.Settings], Iterator[Row]]] = {
    "deepspeed": parts.deepspeed,
    "heads": parts.heads,
    "overlap": parts.overlap,
    "carriers": parts.carriers,
}
ON_TWO_ONLY = {"overlap"}  # with more processes than cores nothing can overlap

ABOUT = """# The exchange of routed rows

- command: `python -m benchmarks.parallel.bench_exchange{arguments}`; it exits with 1 where a bar is missed
- python {python}, torch {torch}, deepspeed {deepspeed}, gloo, {cores} cores, 1 thread a process, float32
- load of the machine before and after: {before:.1f} and {after:.1f} (processes that want a core)
- milliseconds: forward and backward on the slowest rank, median ± half the distance of the quartiles over {repetitions} steps taken
  in turn; their ratio: median over neighbouring steps
- bytes: sent to other ranks in one forward and backward pass, mean over the ranks; SwitchHead's: sum over the ranks
"""


def measure(names: Sequence[str], processes: Sequence[int], settings: parts.Settings) -> list[Row]:
    """All rows, part by part. A worker that finds a layer wrong ends it with an error."""
    os.environ.update(MALLOC)
    from tests.pool import Pool  # it reads the environment when it is imported

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        pools = {size: Pool(size, folder=Path(folder)) for size in processes}
        try:
            for name in names:
                for size, pool in pools.items():
                    if name in ON_TWO_ONLY and size != 2:
                        continue
                    for row in PARTS[name](pool, settings):
                        print(row, file=sys.stderr, flush=True)
                        rows.append(row)
                    pool.stop()  # 4 processes keep the memory of their largest layers
        finally:
            for pool in pools.values():
                pool.stop()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--repetitions", type=int, default=7, help="of every timed step (default 7)")
    parser.add_argument("--traces", type=Path, default=Path("runs/exchange_traces"), help="folder of the chrome traces")
    args = parser.parse_args()

    before = os.getloadavg()[0]
    rows = measure(args.parts, args.processes, parts.Settings(args.repetitions, args.traces))
    about = versions() | {"before": before, "after": os.getloadavg()[0], "repetitions": args.repetitions}
    print(ABOUT.format(arguments=" ".join(["", *sys.argv[1:]]), **about))
    print(as_table(rows))
    for sentence in missed(rows):
        print(sentence, file=sys.stderr)
    return 1 if missed(rows) else 0


def versions() -> dict[str, object]:
    from importlib.metadata import version

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    sys.exit(main())
