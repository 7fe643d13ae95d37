"""The benchmark of one op on a GPU, from its command line to its table: what benchmarks/kernels/bench_OP.py share.

Owns the order: check output and gradients against the reference in float64, and print nothing if one is wrong; time all functions in
turn over rotating inputs; the table, each row as soon as it is measured; a line for each bar; the profile. Does not own shapes, functions
and FLOPs (the `Bench` of each op), nor clocks (timing.py). Called by: benchmarks/kernels/bench_*.py, and by warm.py, which compiles before
anything is timed.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.gpu.timing import (
    CALLS,
    QUEUE_NOTE,
    Bar,
    Machine,
    Speeds,
    Times,
    add_speed_arguments,
    find_machine,
    header,
    hosts,
    median,
    milliseconds,
    num_sets,
    profile,
    run_once,
    speeds_of,
    time_all,
)
from kernels.availability import interpreted, why_not_triton
from kernels.traffic import Pass

TOLERANCE = 2e-2  # of the largest element: a few roundings to bf16, and a sum of up to 20 such numbers


class Layer(Protocol):
    """A frozen dataclass of sizes."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Inputs:
    """leaves: what gets a gradient. gradient: of the output. rest: indices, offsets and what else the functions of a bench read."""

    leaves: tuple[Tensor, ...]
    gradient: Tensor
    rest: Any

    @property
    def num_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves)

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers, as leaves of their own."""
        leaves = tuple(leaf.detach().to(dtype, copy=True).requires_grad_() for leaf in self.leaves)
        return replace(self, leaves=leaves, gradient=self.gradient.to(dtype))


Function = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Work:
    """Of one pass. bound: bytes of inputs and results, moved once. own: bytes of our launches."""

    flops: int
    bound: int
    own: int

    @classmethod
    def of(cls, flops: int, passes: Mapping[str, Pass], *, backward: bool) -> "Work":
        """Of the forward pass, or of both. flops: of the same."""
        chosen = passes.values() if backward else [passes["forward"]]
        return cls(flops, sum(each.bound for each in chosen), sum(each.total for each in chosen))


@dataclass(frozen=True)
class Bench:
    """make(layer, zipf=, seed=, device=) gives bf16 inputs; work(layer, backward=).

    functions: by column. ours: those that are checked, twice, and must give the same bits. judged: the one whose share of the attainable
    rate counts. faster, rival: the ratio column is rival's time / faster's. leaf_names: for the check's message. adapt: other inputs
    for a function that needs them, made before the clock starts. checked: the inputs as `check` takes them. only: the layers that a
    function is timed on, where not on all. share: bars of the share by pass; speedup: of the ratio, in both; bars: the rows
    that they are judged on, by layer and zipf.
    """

    op: str
    layers: Sequence[Any]
    smoke_layers: Sequence[Any]
    leaf_names: tuple[str, ...]
    make: Callable[..., Inputs]
    functions: Mapping[str, Function]
    ours: tuple[str, ...]
    judged: str
    faster: str
    rival: str
    reference: Function
    work: Callable[..., Work]
    notes: tuple[str, ...] = ()
    adapt: Mapping[str, Callable[[Inputs], Inputs]] = field(default_factory=dict)
    checked: Callable[[Inputs], Inputs] = field(default=lambda inputs: inputs)
    only: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    share: Mapping[str, float] = field(default_factory=dict)
    speedup: float | None = None
    bars: Callable[[Any, bool], bool] = field(default=lambda layer, zipf: True)

    def timed(self, layer: Layer) -> list[str]:
        """The functions that are timed on a layer."""
        return [name for name in self.functions if self.only.get(name, lambda layer: True)(layer)]


def with_gradients(function: Function, inputs: Inputs) -> tuple[Tensor, ...]:
    """The output and the gradient of each leaf."""
    output = function(inputs)
    return output.detach(), *torch.autograd.grad(output, inputs.leaves, inputs.gradient)


def check(bench: Bench, layer: Layer, *, zipf: bool, device: torch.device) -> None:
    """Raises RuntimeError unless each of our functions gives the reference's output and gradients, and the same bits twice."""
    inputs = bench.checked(bench.make(layer, zipf=zipf, seed=0, device=device))
    expected = with_gradients(bench.reference, inputs.to(torch.float64))
    for name in bench.ours:
        first, second = (with_gradients(bench.functions[name], inputs) for _ in range(2))
        for part, found, again, wanted in zip(("output", *bench.leaf_names), first, second, expected, strict=True):
            error = ((found.double() - wanted).abs().max() / wanted.abs().max()).item()
            if not error <= TOLERANCE or not torch.equal(found, again):
                raise RuntimeError(
                    f"{bench.op} is wrong, so its time means nothing: by {name}, {part} of {layer}, zipf {zipf}, is off by {error:.1e} of "
                    f"the largest element, allowed is {TOLERANCE:.0e}, and two runs are equal: {torch.equal(found, again)}; run the tests "
                    "of the kernels first"
                )


@dataclass(frozen=True)
class Row:
    """One line of the table. shares: of attainable, by the definition's bytes and by those of our launches; None: not measured. bars: they
    are judged on it."""

    layer: str
    zipf: bool
    backward: bool
    times: Mapping[str, Times]
    attainable: float  # milliseconds
    shares: tuple[float | None, float | None]
    ratio: float | None
    tflops: float | None
    bars: bool

    @property
    def routing(self) -> str:
        return "Zipf 1.0" if self.zipf else "uniform"

    @property
    def part(self) -> str:
        return "fwd+bwd" if self.backward else "fwd"

    def __str__(self) -> str:
        cells = [self.layer, self.routing, self.part, *(milliseconds(times.gpu) for times in self.times.values())]
        cells += [hosts(self.times.values())]
        cells += ["-" if self.ratio is None else f"{self.ratio:.2f}", f"{self.attainable:.3f}"]
        cells += ["-" if share is None else f"{share:.0%}" for share in self.shares]
        return f"| {' | '.join([*cells, '-' if self.tflops is None else f'{self.tflops:.0f}'])} |"


def measure(bench: Bench, layer: Layer, machine: Machine, speeds: Speeds, *, zipf: bool, backward: bool) -> Row:
    work = bench.work(layer, backward=backward)
    bound, own = (1e3 * max(work.flops / speeds.flops, moved / speeds.bandwidth) for moved in (work.bound, work.own))
    functions = calls(bench, layer, machine, zipf=zipf, backward=backward)
    found = time_all(functions) if machine.measures else run_once(functions)
    times = {name: found.get(name, Times((), ())) for name in bench.functions}
    ours, faster, rival = (median(times[name].gpu) for name in (bench.judged, bench.faster, bench.rival))
    return Row(
        layer.name, zipf, backward, times, bound, bars=bench.bars(layer, zipf),
        shares=(None, None) if ours is None else (bound / ours, own / ours),
        ratio=rival / faster if rival and faster else None,
        tflops=work.flops / ours * 1e-9 if ours else None,
    )  # fmt: skip


def calls(
    bench: Bench, layer: Layer, machine: Machine, *, zipf: bool, backward: bool
) -> dict[str, Callable[[int], object]]:
    """What is timed, by name; turn after turn other inputs, and none that another function has just read."""
    names, first = bench.timed(layer), bench.make(layer, zipf=zipf, seed=0, device=machine.device)
    smallest = min(bench.adapt.get(name, lambda same: same)(first).num_bytes for name in names)
    count = num_sets(smallest, machine, functions=len(names))
    sets = [first, *(bench.make(layer, zipf=zipf, seed=seed, device=machine.device) for seed in range(1, count))]
    sets_of = {name: [bench.adapt.get(name, lambda same: same)(each) for each in sets] for name in names}

    def call(name: str, turn: int) -> object:
        inputs = sets_of[name][(turn + names.index(name) * count // len(names)) % count]
        return with_gradients(bench.functions[name], inputs) if backward else bench.functions[name](inputs)

    return {name: lambda turn, name=name: call(name, turn) for name in names}


def verdicts(bench: Bench, rows: Sequence[Row]) -> list[str]:
    """A line for each bar: forward's share, that of both passes, and the ratio."""
    lines, rows = [], [row for row in rows if row.bars]
    for part, limit in bench.share.items():
        found = {f"{row.layer} {row.routing}": row.shares[0] for row in rows if row.part == part}
        lines.append(Bar(f"{bench.op} {part}, share of attainable,", "at least", limit, percent=True).verdict(found))
    if bench.speedup is not None:
        found = {f"{row.layer} {row.routing} {row.part}": row.ratio for row in rows}
        lines.append(Bar(f"{bench.op}, {bench.rival} / {bench.faster},", "at least", bench.speedup).verdict(found))
    return lines


def write_profiles(bench: Bench, layers: Sequence[Layer], machine: Machine, path: Path) -> None:
    """One forward and backward pass of the judged function and of its rival, appended to the file."""
    with path.open("a") as file:
        for layer, name in itertools.product(layers, (bench.judged, bench.rival)):
            call = calls(bench, layer, machine, zipf=False, backward=True)[name]
            file.write(profile(lambda call=call: call(0), machine, title=f"{bench.op}, {layer.name}, {name}, fwd+bwd"))


def head(bench: Bench, machine: Machine, speeds: Speeds) -> str:
    """What stands above the rows."""
    notes = [
        "bf16, weights stored in bf16",
        f"milliseconds: median of {CALLS} calls ± half the distance of the quartiles; all functions in turn; between two "
        "uses of the same inputs, by whichever function, others are read that are more than twice the L2 cache",
        QUEUE_NOTE,
        *bench.notes,
        f"attainable: max(FLOPs / {speeds.flops / 1e12:.0f} TFLOP/s, bytes / {speeds.bandwidth / 1e12:.2f} TB/s); of the definition with "
        f"inputs and results once (share), and with the bytes of our own launches (share of own); TFLOP/s: of {bench.judged}",
    ]
    columns = ["layer", "routing", "pass", *bench.functions, "host", f"{bench.rival} / {bench.faster}", "attainable"]
    columns += ["share", "share of own", "TFLOP/s"]
    return header(machine, title=f"{bench.op} on {machine.name}", notes=notes, columns=columns)


def interpret(op: str) -> None:
    """Starts this command again with Triton's interpreter, which must be chosen before anything imports triton; does not return."""
    command = [sys.executable, "-m", f"benchmarks.kernels.bench_{op}", *sys.argv[1:]]
    os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "1"})


def report(bench: Bench, layers: Sequence[Layer], machine: Machine, speeds: Speeds) -> None:
    """Checks every layer, then prints each row as soon as it is measured, and the verdicts."""
    routings = (False, True) if machine.measures else (True,)
    for layer, zipf in itertools.product(layers, routings):
        check(bench, layer, zipf=zipf, device=machine.device)
    rows = []
    print(head(bench, machine, speeds), flush=True)
    for layer, zipf, backward in itertools.product(layers, routings, (False, True)):
        print(f"{bench.op}: {layer.name}, zipf {zipf}, backward {backward}", file=sys.stderr, flush=True)
        rows.append(measure(bench, layer, machine, speeds, zipf=zipf, backward=backward))
        print(rows[-1], flush=True)
    print("", *verdicts(bench, rows), sep="\n", flush=True)


def main(bench: Bench, *, report: Callable[..., None] = report) -> None:
    """The command line of a bench: prints the table, or exits with one sentence; with no table, if a function is wrong.

    report(bench, layers, machine, speeds): the check, the rows and the verdicts.
    """
    parser = argparse.ArgumentParser(description=f"How fast {bench.op} is on a GPU.")
    add = parser.add_argument
    add("--layers", nargs="+", choices=[layer.name for layer in bench.layers], help="some of them (default all)")
    add(
        "--smoke",
        action="store_true",
        help="tiny, in Triton's interpreter on a CPU: checks, and prints a table without times",
    )
    add("--profile", type=Path, metavar="FILE", help="append the kernels of one forward+backward of each layer to FILE")
    add_speed_arguments(parser)
    args = parser.parse_args()
    try:
        if args.smoke and not interpreted():
            interpret(bench.op)
        machine = find_machine(smoke=args.smoke)
        speeds = speeds_of(machine, args)
        if reason := why_not_triton(machine.device.type):
            raise RuntimeError(reason)
        layers = bench.smoke_layers if args.smoke else bench.layers
        layers = [layer for layer in layers if not args.layers or layer.name in args.layers]
        report(bench, layers, machine, speeds)
        if args.profile:
            write_profiles(bench, layers, machine, args.profile)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
