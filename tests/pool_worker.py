"""One process of a warm test pool: joins its gloo world, then answers one job after the other until the pipe closes.

Owns: what happens inside a worker (rendezvous, loading the job's function, catching what it raises, dying with pytest).
Does not own: starting, timing, judging or killing workers. Called by: tests/pool.py, as `python -m tests.pool_worker`.
"""

import argparse
import ast
import ctypes
import faulthandler
import gc
import importlib
import importlib.util
import operator
import os
import pickle
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from _pytest.assertion.rewrite import rewrite_asserts
from torch.distributed import distributed_c10d

from tests.pool import STACK_SIGNAL, Job

PR_SET_PDEATHSIG = 1  # linux/prctl.h

_stamps: dict[str, int] = {}  # module name -> mtime in nanoseconds of the file it was loaded from


@dataclass(frozen=True, kw_only=True)
class TorchState:
    """The global switches of torch that a job may flip and its successors must not notice."""

    dtype: torch.dtype
    num_threads: int
    deterministic: bool
    warn_only: bool
    grad_enabled: bool

    @classmethod
    def read(cls) -> "TorchState":
        return cls(
            dtype=torch.get_default_dtype(),
            num_threads=torch.get_num_threads(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            grad_enabled=torch.is_grad_enabled(),
        )

    def restore(self) -> None:
        torch.set_default_dtype(self.dtype)
        torch.set_num_threads(self.num_threads)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        torch.set_grad_enabled(self.grad_enabled)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("rank", "world-size", "pipe", "parent"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("rendezvous", "stack"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()

    _die_with(args.parent)
    os.set_inheritable(args.pipe, False)
    connection = Connection(args.pipe)
    faulthandler.enable()  # a segmentation fault leaves its stack in the log
    with open(args.stack, "w") as stack:
        # A handler in C: it also answers while the main thread waits inside gloo.
        faulthandler.register(STACK_SIGNAL, file=stack, all_threads=True)
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{args.rendezvous}", rank=args.rank, world_size=args.world_size
        )
        connection.send_bytes(pickle.dumps((True, None)))
        _serve(connection)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when pytest dies, also in the middle of a job and by SIGKILL."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _serve(connection: Connection) -> None:
    state = TorchState.read()
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)  # the pool is gone; no atexit of torch or DeepSpeed may hold this process back
        torch.manual_seed(0)  # else a job that forgets to seed would depend on the jobs before it
        answer = _answer(request)
        state.restore()
        connection.send_bytes(answer)


def _answer(request: bytes) -> bytes:
    """Run one job. Returns the pickle of (True, result) or (False, traceback text)."""
    try:
        job: Job = pickle.loads(request)
        answer = _run(job)
        if not dist.is_initialized():
            raise RuntimeError(f"{job.name} destroyed the process group, which belongs to the pool: let it stand")
        _drop_groups(job.name)
        return answer
    except BaseException:  # pytest.fail, pytest.skip and sys.exit are no Exceptions, and are failures here too
        return pickle.dumps((False, traceback.format_exc()))


def _run(job: Job) -> bytes:
    """A function of its own: once it has returned, only cycles and globals can hold what the job made."""
    module = _load(job.module, job.file)  # first: the arguments may be instances of its classes
    result = operator.attrgetter(job.name)(module)(*pickle.loads(job.arguments))
    return pickle.dumps((True, result))


def _drop_groups(job: str) -> None:
    """Frees the destroyed groups that the job's cycles hold (each of DeepSpeed's engines is in one); no group may be left after that.

    A gloo group keeps its threads until the last reference to it is gone, and one of them wakes up a hundred times a second: 115 groups
    were 346 threads, which took a sixth of a core from every test that followed.
    """
    if _num_gloo_groups() > 1:  # the world's
        gc.collect()
        gc.freeze()  # what is alive now mostly stays: the next collection looks at new objects only, 0.1 s in place of 0.8
    if (left := _num_gloo_groups() - 1) > 0:
        names = sorted(name for group, name in distributed_c10d._world.pg_names.items() if group != dist.group.WORLD)
        why = f"not destroyed: {', '.join(names)}" if names else "destroyed, but something refers to them still"
        raise RuntimeError(
            f"{job} must leave no process group alive, but it leaves {left} ({why}): close its mesh, drop what holds it"
        )


def _num_gloo_groups() -> int:
    """Groups whose thread is alive, destroyed or not: each has one of that name."""
    count = 0
    for file in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has ended since
            count += file.read_text().strip() == "gloo_tcp_loop"
    return count


def _load(name: str, file: str | None) -> ModuleType:
    """The module called `name` in the pytest process, run from its file once and again only when the file changes.

    The same name on both sides lets pickle carry classes of test modules, which `--import-mode=importlib` puts in
    sys.modules under names that no import statement needs to find. A module that is already here by an ordinary
    import is used as it is: two copies of one module would have two copies of each class. Asserts are rewritten as
    in pytest's own process, so that a failed one shows its values.
    """
    loaded = sys.modules.get(name)
    if file is None:
        return loaded or importlib.import_module(name)
    stamp = os.stat(file).st_mtime_ns
    if loaded is not None and loaded.__file__ == file and _stamps.get(name, stamp) == stamp:
        return loaded
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None:
        raise ImportError(f"{file} cannot be loaded as module {name}: move the function into a .py file")
    source = Path(file).read_bytes()
    tree = ast.parse(source, file)
    rewrite_asserts(tree, source, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        exec(compile(tree, file, "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    _stamps[name] = stamp
    return module


if __name__ == "__main__":
    main()
