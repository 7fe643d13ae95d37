"""The benchmark of an op over a table: forward and backward apart, as a share of the bandwidth of a copy that is measured beside it.

Owns: the copy, the backward pass by itself, the table and the bars of bench_peer_experts and bench_embedding_bag; their routes.
Does not own: the check before it (kernel_bench.py), clocks (timing.py), shapes, rivals and bytes: the `Bench` of each op, whose
work(backward=True) is that of the backward pass alone, and whose `share` has the passes "fwd" and "bwd".
Called by: benchmarks/kernels/bench_peer_experts.py and bench_embedding_bag.py.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.gpu import kernel_bench
from benchmarks.gpu.kernel_bench import Bench, Inputs, Work, check
from benchmarks.gpu.timing import (
    CALLS,
    NOT_MEASURED,
    QUEUE_NOTE,
    Bar,
    Machine,
    Speeds,
    header,
    hosts,
    median,
    milliseconds,
    num_sets,
    run_once,
    time_all,
)
from kernels.tables.routes import TableRoutes

COPIED = 1 << 30  # bytes read, and as many written: many times the cache
ROUTES = "routes"
SCATTER = 0x9E3779B1  # an odd number: neighbours in popularity are not neighbours in memory


@dataclass(frozen=True)
class Layer:
    """A table layer and the tokens of one step. num_entries: a power of two. dtype: of the tables; rows are bf16."""

    name: str
    tokens: int
    d_model: int
    num_entries: int
    choices: int
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Routes:
    """entry_TA as a rival takes them; the routes of the same copies."""

    entry_TA: Tensor
    routes: TableRoutes


def choose(layer: Layer, *, zipf: bool, generator: torch.Generator) -> Routes:
    """Entries of each token, chosen alike, or the i-th most popular in proportion to 1 / i."""
    chances = torch.rand(layer.tokens, layer.choices, generator=generator, device=generator.device, dtype=torch.float64)
    if zipf:
        entry_TA = ((layer.num_entries**chances).long() - 1).clamp(0, layer.num_entries - 1)
        entry_TA = entry_TA * SCATTER % layer.num_entries
    else:
        entry_TA = (chances * layer.num_entries).long()
    return Routes(entry_TA, routes_of(entry_TA))


def routes_of(entry_TA: Tensor) -> TableRoutes:
    tokens, choices = entry_TA.shape
    token_C = torch.arange(tokens, device=entry_TA.device).repeat_interleave(choices)
    return TableRoutes.of(entry_TA.flatten(), token_C, token_C, num_rows=tokens, num_outputs=tokens)


def work(traffic: ModuleType, layer: Layer, *, backward: bool) -> Work:
    """Of one pass. traffic: kernels/<op>/traffic.py."""
    shape = traffic.layer(tokens=layer.tokens, choices=layer.choices, entries=layer.num_entries, d_model=layer.d_model)
    shape = replace(shape, table_size=layer.dtype.itemsize)
    own = traffic.passes(shape)["backward" if backward else "forward"].total
    return Work(traffic.flops(shape, backward=backward), traffic.must_move(shape, backward=backward), own)


def copy_bandwidth(machine: Machine) -> float | None:
    """Bytes per second, read and written, of torch's copy of a GiB."""
    if not machine.measures:
        return None
    source, target = (torch.zeros(COPIED, dtype=torch.uint8, device=machine.device) for _ in range(2))
    seconds = median(time_all({"copy": lambda turn: target.copy_(source)})["copy"].gpu)
    return None if seconds is None else 2 * COPIED / (seconds * 1e-3)


def calls(
    bench: Bench, layer: Layer, machine: Machine, *, zipf: bool, backward: bool
) -> dict[str, Callable[[int], object]]:
    """What is timed, by name: the function, or only its backward pass; turn after turn other inputs. And the routes of ours."""
    names, first = list(bench.functions), bench.make(layer, zipf=zipf, seed=0, device=machine.device)
    count = num_sets(first.num_bytes, machine, functions=len(names))
    sets = [first, *(bench.make(layer, zipf=zipf, seed=seed, device=machine.device) for seed in range(1, count))]

    def place(name: str, turn: int) -> int:
        return (turn + names.index(name) * count // len(names)) % count

    found: dict[str, Callable[[int], object]]
    found = {ROUTES: lambda turn: routes_of(sets[place(bench.judged, turn)].rest.entry_TA)}
    if not backward:
        return {name: lambda turn, name=name: bench.functions[name](sets[place(name, turn)]) for name in names} | found
    outputs = {name: [bench.functions[name](each) for each in sets] for name in names}

    def gradients(name: str, turn: int) -> object:
        inputs, output = sets[place(name, turn)], outputs[name][place(name, turn)]
        return torch.autograd.grad(output, inputs.leaves, inputs.gradient, retain_graph=True)

    return {name: lambda turn, name=name: gradients(name, turn) for name in names} | found


@dataclass(frozen=True)
class Row:
    """One line of the table. share: of the copy's bandwidth, on the bytes that must move; None: not measured."""

    layer: str
    zipf: bool
    part: str
    text: str
    share: float | None


def measure(
    bench: Bench, layer: Layer, machine: Machine, bandwidth: float | None, *, zipf: bool, backward: bool
) -> Row:
    work = bench.work(layer, backward=backward)
    functions = calls(bench, layer, machine, zipf=zipf, backward=backward)
    times = time_all(functions) if machine.measures else run_once(functions)
    ours, rival, routes = (median(times[name].gpu) for name in (bench.judged, bench.rival, ROUTES))
    part, routing = "bwd" if backward else "fwd", "Zipf 1.0" if zipf else "uniform"
    cells = [layer.name, routing, part, *(milliseconds(each.gpu) for each in times.values()), hosts(times.values())]
    if ours is None or rival is None or routes is None or bandwidth is None:
        return Row(layer.name, zipf, part, f"| {' | '.join([*cells, *[NOT_MEASURED] * 5])} |", None)
    speeds = [moved / (ours * 1e-3) for moved in (work.bound, work.own)]
    cells += [
        f"{rival / ours:.2f}",
        f"{rival / (ours + routes):.2f}",
        f"{speeds[0] / 1e9:,.0f}",
        *(f"{speed / bandwidth:.0%}" for speed in speeds),
    ]
    return Row(layer.name, zipf, part, f"| {' | '.join(cells)} |", speeds[0] / bandwidth)


def head(bench: Bench, machine: Machine, bandwidth: float | None, speeds: Speeds) -> str:
    """What stands above the rows."""
    copied = NOT_MEASURED if bandwidth is None else f"{bandwidth / 1e12:.3f} TB/s"
    notes = [
        "bf16, tables too where the layer does not say else; bwd: the backward pass alone, with the gradient of every input",
        f"milliseconds: median of {CALLS} calls ± half the distance of the quartiles; all functions in turn, over inputs of their own",
        QUEUE_NOTE,
        *bench.notes,
        f"{ROUTES}: the stable sort by entry and the ends of the ranges, which a layer makes once for both passes; in no time of ours. "
        "torch sorts inside its own backward pass, so the ratio stands there with the routes, too",
        f"copy: {copied}, of 1 GiB by torch, read and written, in this run; the peak is {speeds.bandwidth / 1e12:.2f} TB/s",
        "must move: inputs and results once, a row of a table for each copy that reads it, a gradient of the size of the table written "
        "once; GB/s and share are of these bytes, share of own of the bytes of our launches where entries are chosen alike. By Zipf's law "
        "many rows come from the cache and fewer are written: more than 100 % is possible, and the bars are held on the uniform rows alone",
    ]
    columns = [
        "layer",
        "routing",
        "pass",
        *bench.functions,
        ROUTES,
        "host",
        f"{bench.rival} / {bench.judged}",
        f"{bench.rival} / ({bench.judged} + {ROUTES})",
        "GB/s",
        "share of copy",
    ]
    return header(machine, title=f"{bench.op} on {machine.name}", notes=notes, columns=[*columns, "share of own"])


def verdicts(bench: Bench, rows: Sequence[Row]) -> list[str]:
    """A line for each bar, on the rows with uniform routing: by Zipf's law a cache serves rows that `must_move` counts."""
    lines = []
    for part, limit in bench.share.items():
        found = {f"{row.layer} uniform": row.share for row in rows if row.part == part and not row.zipf}
        lines.append(Bar(f"{bench.op} {part}, share of copy,", "at least", limit, percent=True).verdict(found))
    return lines


def report(bench: Bench, layers: Sequence[Layer], machine: Machine, speeds: Speeds) -> None:
    """Checks every layer, then prints its rows and the verdicts."""
    for layer, zipf in itertools.product(layers, (False, True)):
        check(bench, layer, zipf=zipf, device=machine.device)
    bandwidth, rows = copy_bandwidth(machine), []
    print(head(bench, machine, bandwidth, speeds), flush=True)
    for layer, zipf, backward in itertools.product(layers, (False, True), (False, True)):
        rows.append(measure(bench, layer, machine, bandwidth, zipf=zipf, backward=backward))
        print(rows[-1].text, flush=True)
    print("", *verdicts(bench, rows), sep="\n", flush=True)


main = partial(kernel_bench.main, report=report)


def few_tokens(inputs: Inputs, *, tables: tuple[int, ...], entries: int = 4096, tokens: int = 128) -> Inputs:
    """The same in a size that the check can do in float64; tables: which leaves are tables. The routes follow."""
    entry_TA = inputs.rest.entry_TA[:tokens] % entries
    leaves = []
    for place, leaf in enumerate(inputs.leaves):
        length = entries if place in tables else entry_TA.numel() if leaf.ndim == 1 else tokens
        leaves.append(leaf.detach()[:length].clone().requires_grad_())
    return Inputs(tuple(leaves), inputs.gradient[:tokens], Routes(entry_TA, routes_of(entry_TA)))
