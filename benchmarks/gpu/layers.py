"""One SwitchHead layer beside the dense attention layer that it replaces, on a GPU: time and peak memory of forward and backward.

Owns the pairs, their inputs, what is compared and the bars: the dense layer's time / SwitchHead's at least 1.4, SwitchHead's peak / the
dense layer's at most 0.65. Does not own clocks and profiles (timing.py). The layers are those of configs/paper, under bf16 autocast, on
the rows of one step of their configuration; Transformer-XL layers with their memory full. A pair with a layer that differs from its
reference gets no row and ends the table. Called by: anyone with a GPU: `python -m benchmarks.gpu.layers > FILE.md`; --smoke needs none.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.timing import (
    CALLS,
    NOT_MEASURED,
    QUEUE_NOTE,
    ROOT,
    Bar,
    Machine,
    Times,
    find_machine,
    header,
    hosts,
    median,
    milliseconds,
    num_sets,
    profile,
    run_once,
    time_all,
)
from kernels.availability import interpreted
from kernels.tuning import measuring
from model.context import BatchContext, Memory
from model.expert_choice import BankWork
from model.parameters import materialize
from train.backends import choose_backends
from train.config import Config, Layout, load_config
from train.engine import LocalMesh
from train.works import bank_works

PAIRS = (
    ("switchhead_xl_47m_wt103", "dense_xl_47m_10heads"),
    ("switchhead_xl_47m_c4", "dense_xl_47m_10heads"),
    ("switchhead_xl_262m_c4", "dense_xl_262m_16heads"),
    ("switchhead_xl_262m_wt103", "dense_xl_262m_16heads"),
    ("switchhead_rope_45m", "dense_rope_45m_10heads"),
    ("switchhead_rope_243m", "dense_rope_243m_16heads"),
)
MIXER = "layers.0.mixer."
SMOKE_PAIRS = (PAIRS[0],)
NAMED = ("triton", "triton_dense", "torch")
SPEED = Bar("dense layer's time / SwitchHead's", "at least", 1.4)
MEMORY = Bar("SwitchHead's peak / the dense layer's", "at most", 0.65)
TOLERANCE = 5e-2  # of the largest element: V, the mixed values and O are each rounded to bf16, in another order
COLUMNS = ("layer", "ms", "dense, ms", "host, ours / dense", "dense / ours", "peak, MB", "dense, MB", "ours / dense")
NOTES = (
    f"bf16 autocast, float32 weights; milliseconds: median of {CALLS} forward and backward passes ± half the distance of the quartiles; "
    "all layers of a pair in turn, inputs rotate through more than twice the L2 cache",
    QUEUE_NOTE,
    "peak: the most memory that is held during a forward and a backward pass beyond what is held before it; the weights, their "
    "gradients and the input are held before it, so they are not counted",
    "as a run: torch.use_deterministic_algorithms(True), as train/build.py has it; free: without. Tiles are chosen before the clock starts",
)


@dataclass(frozen=True)
class Subject:
    """The first mixer of a published config, on the rows of one of its steps. banks: what its experts do, by their path in the model."""

    name: str
    config: Config
    banks: Mapping[str, BankWork]

    @property
    def rows(self) -> int:
        return self.config.data.global_batch_size

    @property
    def length(self) -> int:
        return self.config.data.sequence_length

    @property
    def num_memory(self) -> int:
        return self.config.model.memory_blocks().get(0, 0) * self.length

    def serving(self, machine: Machine) -> list[str]:
        """Backends by name that can compute all of its experts here; in Triton's interpreter also those of a GPU."""
        kind = "cuda" if interpreted() else machine.device.type
        return [name for name in NAMED if all(name in work.candidates(kind) for work in self.banks.values())]


def subject(name: str, machine: Machine) -> Subject:
    """Narrow, and on two short rows, where nothing is measured."""
    tiny = {"run.dir": "/nonexistent", "run.device": machine.device.type}  # no kernels.json of another run
    kind = "switchhead" if name.startswith("switchhead") else "attention"
    if not machine.measures:
        tiny |= {"model.d_model": 16, f"model.{kind}.num_heads": 2, f"model.{kind}.head_dim": 8}
        tiny |= {"data.sequence_length": 5, "data.global_batch_size": 2, "data.streams": 2}
    sets = [f"{key}={value}" for key, value in tiny.items()]
    config = load_config(ROOT / f"configs/paper/{name}.yaml", sets)
    works = bank_works(config, Layout(ep_size=1, node_size=1), {}, processes=1)
    return Subject(name, config, {path: work for path, work in works.items() if path.startswith(MIXER)})


@dataclass(frozen=True)
class Step:
    """A forward and backward pass of a layer over one of its inputs; the gradients of weights are added to what is there."""

    layer: nn.Module
    context: BatchContext
    inputs: list[Tensor]
    gradient: Tensor

    def __call__(self, turn: int) -> Tensor:
        x_BMD = self.inputs[turn % len(self.inputs)]
        x_BMD.grad = None
        with torch.autocast(x_BMD.device.type, torch.bfloat16):
            y_BSD = self.layer(x_BMD, self.context).y_BSD
        y_BSD.backward(self.gradient.to(y_BSD.dtype))
        return y_BSD.detach()


def choose(of: Subject, machine: Machine) -> dict[str, str]:
    """The backend of each bank as a run would choose it, by a measurement."""
    chosen = choose_backends(of.config, of.banks, LocalMesh(machine.device))
    print(*chosen.notes(), sep="\n", file=sys.stderr, flush=True)
    return chosen.of_module


def step_of(of: Subject, backends: Mapping[str, str], machine: Machine) -> Step:
    """backends: of each bank by its path."""
    place = of.config.model.places(backend="reference")[0]
    layer: Any = getattr(of.config.model, place.mixers[0]).build(place)
    materialize(layer, seed=1, device=machine.device)
    for path, name in backends.items():
        layer.get_submodule(path.removeprefix(MIXER)).backend = name
    shape = (of.rows, of.num_memory + of.length, place.d_model)
    generator = torch.Generator(machine.device).manual_seed(2)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=machine.device)

    first = normal(*shape)
    count = num_sets(first.nbytes, machine)
    inputs = [first, *(normal(*shape) for _ in range(count - 1))]
    memory = None
    if of.num_memory:
        state_BMD = torch.zeros(of.rows, of.num_memory, 1, device=machine.device)  # a mixer asks for its length alone
        memory = Memory({0: state_BMD}, torch.full((of.rows,), of.num_memory, device=machine.device))
    context = BatchContext(torch.arange(of.rows, device=machine.device), None, 1, 0, memory, depth=0)
    gradient = normal(of.rows, of.length, place.d_model)
    return Step(layer.train(), context, [x.requires_grad_() for x in inputs], gradient)


def check(of: Subject, backends: Mapping[str, str], machine: Machine) -> None:
    """RuntimeError unless output and gradients of a layer are those of its reference."""
    found, wanted = (step_of(of, names, machine) for names in (backends, dict.fromkeys(backends, "reference")))
    pairs = {"the output": (found(0), wanted(0)), "the input's gradient": (found.inputs[0].grad, wanted.inputs[0].grad)}
    for (name, one), other in zip(found.layer.named_parameters(), wanted.layer.parameters(), strict=True):
        pairs[f"the gradient of {name}"] = one.grad, other.grad
    for name, (one, other) in pairs.items():
        if one is None or other is None:
            continue  # a router whose choice has no gradient
        error = float((one - other).abs().max() / other.abs().max().clamp_min(1e-20))
        if not error <= TOLERANCE:
            raise RuntimeError(
                f"{of.name} by {backends} must equal its reference within {TOLERANCE:.0e} of the largest element, but {name} is off by "
                f"{error:.1e}: run tests/gpu first"
            )


def peak_bytes(step: Step) -> int:
    """Beyond what is held before the pass; the first pass leaves the weights' gradients."""
    step(0)
    step.inputs[0].grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@dataclass(frozen=True)
class Row:
    """One SwitchHead layer beside its dense twin; None: not measured."""

    case: str
    times: tuple[Times, Times]  # ours, dense
    peaks: tuple[int, int] | None

    @property
    def speedup(self) -> float | None:
        ours, dense = (median(times.gpu) for times in self.times)
        return dense / ours if ours and dense else None

    @property
    def memory(self) -> float | None:
        return self.peaks[0] / self.peaks[1] if self.peaks else None

    def __str__(self) -> str:
        peaks = [f"{peak / 1e6:,.0f}" for peak in self.peaks] if self.peaks else [NOT_MEASURED] * 2
        ratios = ["-" if ratio is None else f"{ratio:.2f}" for ratio in (self.speedup, self.memory)]
        times = [*(milliseconds(each.gpu) for each in self.times), hosts(self.times)]
        return f"| {' | '.join([self.case, *times, ratios[0], *peaks, ratios[1]])} |"


def measure(pair: tuple[str, str], machine: Machine, *, as_run: bool) -> list[Row]:
    """A row for each backend."""
    ours, dense = (subject(name, machine) for name in pair)
    mode = "as a run" if as_run else "free"
    with deterministic(as_run):
        backends = {"auto": choose(ours, machine)}
        backends |= {name: dict.fromkeys(ours.banks, name) for name in ours.serving(machine)}
        steps = {}
        for backend, of_bank in backends.items():
            check(ours, of_bank, machine)
            steps[backend] = step_of(ours, of_bank, machine)
        steps["dense"] = step_of(dense, {}, machine)
        with measuring():  # the tiles of kernels, before the clock starts
            for step in steps.values():
                step(0)
        functions: dict[str, Callable[[int], object]] = dict(steps)
        times = time_all(functions) if machine.measures else run_once(functions)
        peaks = {name: peak_bytes(step) for name, step in steps.items()} if machine.measures else {}
    return [
        Row(
            f"{pair[0]} by {backend}, {mode}", (times[backend], times["dense"]),
            (peaks[backend], peaks["dense"]) if peaks else None,
        )
        for backend in backends
    ]  # fmt: skip


def write_profiles(pairs: Sequence[tuple[str, str]], machine: Machine, path: Path) -> None:
    """One forward and backward pass of each layer, as a run has it, appended to the file."""
    for name in dict.fromkeys(itertools.chain.from_iterable(pairs)):
        of = subject(name, machine)
        with deterministic(True), path.open("a") as file:
            step = step_of(of, choose(of, machine), machine)
            with measuring():
                step(0)
            file.write(profile(lambda step=step: step(0), machine, title=f"one layer of {name}, fwd+bwd"))


def verdicts(rows: list[Row]) -> list[str]:
    """Of the backend that a run chooses, as a run computes; the other rows tell where it could be better."""
    judged = [row for row in rows if "by auto, as a run" in row.case]
    speeds, peaks = ({row.case: getattr(row, what) for row in judged} for what in ("speedup", "memory"))
    return [SPEED.verdict(speeds), MEMORY.verdict(peaks)]


def main() -> None:
    parser = argparse.ArgumentParser(description="A SwitchHead layer beside the dense layer that it replaces.")
    add = parser.add_argument
    add("--smoke", action="store_true", help="tiny, on a CPU; with TRITON_INTERPRET=1 the kernels too; no times")
    add("--profile", type=Path, metavar="FILE", help="append the kernels of one forward+backward of each layer to FILE")
    args = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    try:
        machine = find_machine(smoke=args.smoke)
        rows: list[Row] = []
        pairs = SMOKE_PAIRS if args.smoke else PAIRS
        title = f"SwitchHead layers on {machine.name}"
        print(header(machine, title=title, notes=NOTES, columns=COLUMNS), flush=True)
        for pair, as_run in itertools.product(pairs, (True,) if args.smoke else (True, False)):
            print(f"{pair[0]}, deterministic {as_run}", file=sys.stderr, flush=True)
            found = measure(pair, machine, as_run=as_run)
            print(*found, sep="\n", flush=True)
            rows += found
        print("", *verdicts(rows), sep="\n", flush=True)
        if args.profile:
            write_profiles(pairs, machine, args.profile)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
