"""PEER and PKM lookups on a CPU, forward and backward: time and saved memory beside torch's own ways, in one run on one thread.

Owns: the sizes, the rivals, and the bars: at least 3 times as fast as gathering the rows and einsum (CPU time), a tenth of the memory it
saves for the backward pass. Ours is all that a layer does after its router: sort the picks, then kernels/peer_experts or
kernels/embedding_bag. Routers are not timed. Values and gradients are compared first, and nothing is printed on stdout if they differ.
Called by: anyone, from the root of the clone, with the malloc settings of the Makefile in the environment (MALLOC_MMAP_MAX_=0,
MALLOC_TRIM_THRESHOLD_=1000000000000, MALLOC_TOP_PAD_=67108864): `python -m benchmarks.kernels.bench_peer_cpu`. --smoke: tiny, no bars.
Exits with 1 if a bar is missed.

Without those settings the pages of each 64 MiB gradient come from the system in every step, for all of them.
Shape letters: T tokens, H heads, K picks, D width, A picks of all heads.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.dispatch import LocalDispatcher, LocalPlan
from model.lookup import neurons, table_routing, weighted_rows
from model.parameters import Table

WARM_UP = 2
BAR_TIME, BAR_MEMORY = 3.0, 0.1
TOLERANCE = 1e-5  # of the largest element


@dataclass(frozen=True)
class Sizes:
    """Tokens T, heads H, picks K of each, width D, rows L of a table."""

    tokens: int
    heads: int
    picks: int
    width: int
    rows: int

    def __str__(self) -> str:
        return f"{self.rows:,} rows of {self.width}, h {self.heads}, k {self.picks}, {self.tokens:,} tokens"


PEER, PKM = Sizes(2048, 4, 8, 256, 256**2), Sizes(2048, 4, 32, 256, 256**2)
TINY = Sizes(8, 2, 3, 4, 16)


@dataclass(frozen=True)
class Inputs:
    """Leaves by name, picks, and the gradient of the output. Picks are uniform over the rows: nothing is read twice by luck."""

    leaves: dict[str, Tensor]
    rows_THK: Tensor
    gradient_TD: Tensor

    @staticmethod
    def of(sizes: Sizes) -> "Inputs":
        draws = torch.Generator().manual_seed(1)
        shape = (sizes.tokens, sizes.heads, sizes.picks)
        leaves = {
            "x": torch.randn(sizes.tokens, sizes.width, generator=draws),
            "gates": torch.randn(shape, generator=draws).softmax(-1),
            "up": torch.randn(sizes.rows, sizes.width, generator=draws) / sizes.width**0.5,
            "down": torch.randn(sizes.rows, sizes.width, generator=draws) / sizes.width**0.5,
        }
        rows_THK = torch.randint(0, sizes.rows, shape, generator=draws)
        gradient_TD = torch.randn(sizes.tokens, sizes.width, generator=draws)
        return Inputs({name: leaf.requires_grad_() for name, leaf in leaves.items()}, rows_THK, gradient_TD)


Forward = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Contestant:
    """coalesce: the time includes adding up the rows of the sparse gradients, as torch.optim.SparseAdam does before its step."""

    name: str
    forward: Forward
    coalesce: bool = False


@dataclass(frozen=True)
class Result:
    """Milliseconds forward and both ways (medians), half the distance of the quartiles, and of those the CPU's (where the machine is busy,
    a thread also waits); how many times as long the first contestant takes, by the clock and by the CPU (medians of neighbouring calls);
    MiB saved for the backward pass apart from inputs and parameters.
    """

    name: str
    forward: float
    both: float
    spread: float
    cpu: float
    factor: float
    cpu_factor: float
    saved: float


def peer_by_einsum(inputs: Inputs, *, sparse: bool = False) -> Tensor:
    """Gather both rows of each pick, einsum: the form of the public implementations."""
    x, gates, up, down = inputs.leaves.values()
    hidden_THK = torch.einsum("td,thkd->thk", x, F.embedding(inputs.rows_THK, up, sparse=sparse))
    weights_THK = gates * F.gelu(hidden_THK)
    return torch.einsum("thk,thkd->td", weights_THK, F.embedding(inputs.rows_THK, down, sparse=sparse))


def peer_by_ours(inputs: Inputs) -> Tensor:
    x, gates, up, down = inputs.leaves.values()

    def experts(rows: Tensor, plan: LocalPlan) -> Tensor:
        return neurons(rows, up, down, plan, activation="gelu")

    return by_plan(inputs, x, gates, experts)


def pkm_by_einsum(inputs: Inputs) -> Tensor:
    return torch.einsum("thk,thkd->td", inputs.leaves["gates"], F.embedding(inputs.rows_THK, inputs.leaves["down"]))


def pkm_by_bag(inputs: Inputs, *, sparse: bool = False) -> Tensor:
    gates_TA = inputs.leaves["gates"].flatten(1)
    return F.embedding_bag(
        inputs.rows_THK.flatten(1), inputs.leaves["down"], mode="sum", per_sample_weights=gates_TA, sparse=sparse
    )


def pkm_by_ours(inputs: Inputs) -> Tensor:
    _, gates, _, down = inputs.leaves.values()
    return by_plan(inputs, gates.new_empty(len(gates), 0), gates, lambda rows, plan: weighted_rows(down, plan))


def by_plan(inputs: Inputs, rows: Tensor, gates: Tensor, compute: Callable[[Tensor, LocalPlan], Tensor]) -> Tensor:
    dispatcher, table = LocalDispatcher(), Table(len(inputs.leaves["down"]), {})
    (exchange,) = dispatcher.plan(table_routing(inputs.rows_THK, gates, table))
    return dispatcher.combine(dispatcher.dispatch(exchange, rows, label=""), compute, label="").wait()


PEER_CONTESTANTS = (
    Contestant("gather, einsum, dense gradients", peer_by_einsum),
    Contestant("the same, sparse gradients", lambda inputs: peer_by_einsum(inputs, sparse=True)),
    Contestant("the same, sparse gradients, coalesced", lambda inputs: peer_by_einsum(inputs, sparse=True), True),
    Contestant("peer_experts", peer_by_ours),
)
PKM_CONTESTANTS = (
    Contestant("gather, einsum, dense gradients", pkm_by_einsum),
    Contestant("F.embedding_bag, dense gradients", pkm_by_bag),
    Contestant("F.embedding_bag, sparse gradients", lambda inputs: pkm_by_bag(inputs, sparse=True)),
    Contestant("embedding_bag", pkm_by_ours),
)


def both_ways(contestant: Contestant, inputs: Inputs) -> tuple[float, float, float]:
    """Seconds forward, and forward and backward, and of the latter the CPU's. Gradients are made anew, as after zero_grad."""
    for leaf in inputs.leaves.values():
        leaf.grad = None
    began, began_cpu = time.perf_counter(), time.process_time()
    output = contestant.forward(inputs)
    middle = time.perf_counter()
    output.backward(inputs.gradient_TD)
    if contestant.coalesce:
        for name in ("up", "down"):
            gradient = inputs.leaves[name].grad
            assert gradient is not None
            inputs.leaves[name].grad = gradient.coalesce()
    return middle - began, time.perf_counter() - began, time.process_time() - began_cpu


def check(contestants: Sequence[Contestant], inputs: Inputs) -> None:
    """Raises RuntimeError unless the output and all gradients are those of the first contestant in float64."""
    double = {name: leaf.detach().double().requires_grad_() for name, leaf in inputs.leaves.items()}
    doubled = Inputs(double, inputs.rows_THK, inputs.gradient_TD.double())
    wanted = values_of(contestants[0], doubled)
    for contestant in contestants:
        for name, found in values_of(contestant, inputs).items():
            error = ((found - wanted[name]).abs().max() / wanted[name].abs().max()).item()
            if not error <= TOLERANCE:
                raise RuntimeError(
                    f"{contestant.name} is wrong, so its time means nothing: {name} is off by {error:.1e} of the largest element, allowed "
                    f"is {TOLERANCE:.0e}"
                )


def values_of(contestant: Contestant, inputs: Inputs) -> dict[str, Tensor]:
    for leaf in inputs.leaves.values():
        leaf.grad = None
    output = contestant.forward(inputs)
    output.backward(inputs.gradient_TD)
    gradients = {name: leaf.grad for name, leaf in inputs.leaves.items() if leaf.grad is not None}
    values = {"output": output.detach()} | gradients
    return {name: (value.to_dense() if value.is_sparse else value).double() for name, value in values.items()}


def saved_bytes(contestant: Contestant, inputs: Inputs) -> int:
    """Bytes of the storages that the backward pass keeps, each once, apart from those of the leaves and the picks."""
    given = [*inputs.leaves.values(), inputs.rows_THK]
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = contestant.forward(inputs)
    for tensor in given:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    del output  # the graph keeps the storages, so no address is met twice
    return sum(sizes.values())


def measure(contestants: Sequence[Contestant], sizes: Sizes, *, turns: int) -> list[Result]:
    """All take steps in turn, so that whatever else the machine does falls on all."""
    inputs = Inputs.of(sizes)
    check(contestants, inputs)
    saved = [saved_bytes(contestant, inputs) for contestant in contestants]
    times = [[both_ways(contestant, inputs) for contestant in contestants] for _ in range(WARM_UP + turns)][WARM_UP:]
    results = []
    for i, contestant in enumerate(contestants):
        forward, both, cpu = ([1e3 * turn[i][part] for turn in times] for part in range(3))
        low, median, high = statistics.quantiles(both, n=4)
        factor, cpu_factor = (statistics.median(turn[0][part] / turn[i][part] for turn in times) for part in (1, 2))
        results.append(
            Result(
                contestant.name,
                forward=statistics.median(forward),
                both=median,
                spread=(high - low) / 2,
                cpu=statistics.median(cpu),
                factor=factor,
                cpu_factor=cpu_factor,
                saved=saved[i] / 2**20,
            )
        )
    return results


def table(results: Sequence[Result]) -> str:
    lines = [
        "| form | forward, ms | both ways, ms | of the CPU, ms | times as fast | by the CPU | saved, MiB | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        times = f"{one.forward:.1f} | {one.both:.1f} ± {one.spread:.1f} | {one.cpu:.1f} | {one.factor:.2f} | {one.cpu_factor:.2f}"
        lines.append(f"| {one.name} | {times} | {one.saved:.2f} | {one.saved / results[0].saved:.4f} |")
    return "\n".join(lines)


def bars(results: Sequence[Result]) -> tuple[bool, str]:
    """Whether both are met, and what to print. Time is the CPU's: all run on one thread, and the clock also counts what else runs."""
    ours, words = results[-1], {True: "met", False: "**missed**"}
    fast, small = ours.cpu_factor >= BAR_TIME, ours.saved <= BAR_MEMORY * results[0].saved
    time_line = f"at least {BAR_TIME} times as fast by the CPU: {words[fast]}, {ours.cpu_factor:.2f} (by the clock {ours.factor:.2f})"
    return fast and small, f"Bars of PEER: {time_line}; at most {BAR_MEMORY} of the memory: {words[small]}."


def beside_the_bar(results: Sequence[Result]) -> str:
    """The bar is against dense gradients; ours beside every other form of the rival too."""
    ours, others = results[-1], results[1:-1]
    ratios = "; ".join(f"{one.both / ours.both:.2f} ({one.cpu / ours.cpu:.2f}) as '{one.name}'" for one in others)
    return f"The bar of time is against dense gradients. By the medians of both ways (of the CPU), times as fast: {ratios}."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, no bars")
    given = parser.parse_args()
    torch.set_num_threads(1)
    before = os.getloadavg()[0]
    peer = measure(PEER_CONTESTANTS, TINY if given.smoke else PEER, turns=given.turns)
    pkm = measure(PKM_CONTESTANTS, TINY if given.smoke else PKM, turns=given.turns)
    print(
        "# PEER and PKM on a CPU\n\n- command: `python -m benchmarks.kernels.bench_peer_cpu`, the malloc settings of the Makefile"
    )
    print(
        f"- python {platform.python_version()}, torch {torch.__version__}, float32, 1 thread of {os.cpu_count()} cores"
    )
    print(
        f"- load of the machine before and after: {before:.1f} and {os.getloadavg()[0]:.1f} (processes that want a core)",
        f"- medians of {given.turns} turns ± half the distance of the quartiles; saved: apart from inputs and parameters",
        sep="\n",
    )
    for name, sizes, results in (("PEER", PEER, peer), ("PKM", PKM, pkm)):
        print(f"\n{name}: {TINY if given.smoke else sizes}\n\n{table(results)}")
    if given.smoke:
        return 0
    met, line = bars(peer)
    print(f"\n{line}", beside_the_bar(peer), sep="\n")
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
