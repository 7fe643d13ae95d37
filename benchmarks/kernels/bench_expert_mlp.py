"""How fast expert_mlp is on a GPU, beside gather + torch's grouped matmul + index_add, and beside what the GPU could attain.

Owns: shapes, timing and the table. It checks output and every gradient against the reference in float64 first, and prints no number
if one is wrong. Does not own: the bytes and FLOPs (kernels/expert_mlp/traffic.py).
Called by: anyone with a GPU, from the root of the clone: `python -m benchmarks.kernels.bench_expert_mlp > FILE.md`.
"""

import argparse
import itertools
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.availability import why_not_triton
from kernels.expert_mlp import expert_mlp, traffic
from kernels.sum_copies import RowCopies

CALLS, WARM_UP = 30, 5
TOLERANCE = 2e-2  # of the largest element: three roundings to bf16 and a sum of up to 20 such numbers
NAMES = ("output", "rows", "up", "down", "gates")
SPEEDS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}  # bf16 FLOP/s without sparsity, bytes/s


@dataclass(frozen=True)
class Layer:
    """A sigma-MoE layer and the tokens of one step of its configuration."""

    name: str
    tokens: int
    d_model: int
    num_experts: int
    expert_dim: int
    top_k: int

    def shape(self) -> traffic.Shape:
        copies = self.tokens * self.top_k
        return traffic.Shape(
            copies, self.tokens, self.tokens, self.num_experts, self.d_model, self.expert_dim, itemsize=2
        )


LAYERS = (
    Layer("sigma-MoE 47M", 16384, 412, 16, 128, 4),
    Layer("sigma-MoE 237M", 16384, 412, 128, 128, 4),
    Layer("sigma-MoE enwik8", 16384, 512, 16, 128, 4),
    Layer("sigma-MoE 262M", 32768, 1024, 32, 128, 4),
    Layer("switchall_1b", 16384, 1024, 128, 128, 4),
    Layer("MoEUT 244M", 16384, 1024, 387, 128, 16),
)

HEADER = """# expert_mlp on {gpu}

- command: `python -m benchmarks.kernels.bench_expert_mlp{arguments}`
- python {python}, torch {torch}, triton {triton}; bf16, weights stored in bf16
- milliseconds: median of {calls} calls ± half the distance of the quartiles; inputs rotate through more than twice the L2 cache
- torch: index_select, F.grouped_mm, relu, gate, F.grouped_mm, index_add in fp32 (atomics); D 412 is padded to 416 for it beforehand
- ours: with the sorts of the routes; prepared: with RowCopies that the layer has made once
- attainable: max(FLOPs / {peak:.0f} TFLOP/s, bytes / {bandwidth:.2f} TB/s); of the definition with inputs and results once (share), and
  with the bytes of our own launches (share of own)

| layer | routing | pass | torch | ours | prepared | torch / ours | attainable | share | share of own |
|---|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Inputs:
    leaves: tuple[Tensor, ...]  # rows, up, down, gates
    gradient_PD: Tensor
    index_C: Tensor
    offsets_L: Tensor
    copies: RowCopies


def make_inputs(layer: Layer, *, zipf: bool, seed: int) -> Inputs:
    """Copies sorted by expert. Zipf: expert i is chosen with a chance in proportion to 1 / (i + 1); else all alike."""
    generator = torch.Generator("cuda").manual_seed(seed)
    d, f, num_experts = layer.d_model, layer.expert_dim, layer.num_experts

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    chances = torch.arange(1, num_experts + 1, device="cuda").float() ** (-1.0 if zipf else 0.0)
    ids_TK = torch.multinomial(chances.expand(layer.tokens, -1), layer.top_k, generator=generator)
    sorted_C, order_C = ids_TK.flatten().sort(stable=True)
    index_C = order_C // layer.top_k
    return Inputs(
        leaves=(
            normal(layer.tokens, d).bfloat16().requires_grad_(),
            (normal(num_experts, d, f) / d**0.5).bfloat16().requires_grad_(),
            (normal(num_experts, f, d) / f**0.5).bfloat16().requires_grad_(),
            torch.rand(len(index_C), generator=generator, device="cuda").requires_grad_(),
        ),
        gradient_PD=normal(layer.tokens, d).bfloat16(),
        index_C=index_C,
        offsets_L=torch.searchsorted(sorted_C, torch.arange(num_experts, device="cuda"), right=True).int(),
        copies=RowCopies.of(index_C, num_rows=layer.tokens),
    )


def padded(inputs: Inputs) -> Inputs:
    """D rounded up to 16 bytes, as F.grouped_mm wants it."""
    rows, up, down, gates = (leaf.detach() for leaf in inputs.leaves)
    more = -rows.shape[1] % 8
    rows, up, down = F.pad(rows, (0, more)), F.pad(up, (0, 0, 0, more)), F.pad(down, (0, more))
    leaves = (rows.requires_grad_(), up.requires_grad_(), down.requires_grad_(), gates.requires_grad_())
    return Inputs(leaves, F.pad(inputs.gradient_PD, (0, more)), inputs.index_C, inputs.offsets_L, inputs.copies)


def by_torch(inputs: Inputs) -> Tensor:
    rows, up, down, gates = inputs.leaves
    hidden = F.grouped_mm(rows.index_select(0, inputs.index_C), up, offs=inputs.offsets_L).relu()
    results = F.grouped_mm((hidden * gates[:, None]).to(hidden.dtype), down, offs=inputs.offsets_L)
    sums = rows.new_zeros(rows.shape, dtype=torch.float32).index_add(0, inputs.index_C, results.float())
    return sums.to(rows.dtype)


def by_us(inputs: Inputs, *, backend: str = "triton", copies: RowCopies | None = None) -> Tensor:
    return expert_mlp(
        *inputs.leaves, row_index_C=inputs.index_C, output_index_C=inputs.index_C, offsets_L=inputs.offsets_L,
        num_outputs=len(inputs.gradient_PD), output_copies=copies, row_copies=copies, backend=backend,
    )  # fmt: skip


def prepared(inputs: Inputs) -> Tensor:
    return by_us(inputs, copies=inputs.copies)


def with_gradients(function: Callable[[Inputs], Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    output = function(inputs)
    return output.detach(), *torch.autograd.grad(output, inputs.leaves, inputs.gradient_PD)


def check(layer: Layer, *, zipf: bool) -> None:
    """Raises RuntimeError unless output and gradients are those of the reference in float64, and the same twice."""
    inputs = make_inputs(layer, zipf=zipf, seed=0)
    first, second = (with_gradients(by_us, inputs) for _ in range(2))
    leaves = tuple(leaf.detach().double().requires_grad_() for leaf in inputs.leaves)
    wide = Inputs(leaves, inputs.gradient_PD.double(), inputs.index_C, inputs.offsets_L, inputs.copies)
    # The reference multiplies group by group; float64 gates are none of the public function's dtypes.
    from kernels.expert_mlp.reference import reference

    expected = with_gradients(
        lambda wide: reference(
            *wide.leaves, row_index_C=wide.index_C, output_index_C=wide.index_C, offsets_L=wide.offsets_L,
            num_outputs=layer.tokens,
        ),
        wide,
    )  # fmt: skip
    for name, found, again, wanted in zip(NAMES, first, second, expected, strict=True):
        error = ((found.double() - wanted).abs().max() / wanted.abs().max()).item()
        if not error <= TOLERANCE or not torch.equal(found, again):
            raise RuntimeError(
                f"expert_mlp is wrong, so its time means nothing: {name} of {layer}, zipf {zipf}, is off by {error:.1e} of the "
                f"largest element, allowed is {TOLERANCE:.0e}, and two runs are equal: {torch.equal(found, again)}; run tests/kernels first"
            )


def time_all(functions: dict[str, Callable[[int], object]]) -> dict[str, list[float]]:
    """Milliseconds of each call. All functions in turn, so that a slow moment of the GPU hits all of them."""
    events = {
        name: [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(CALLS)]
        for name in functions
    }
    for turn in range(-WARM_UP, CALLS):
        for name, function in functions.items():
            # Work that is queued before, so that what is timed are the kernels and not their launches.
            torch.cuda._sleep(5_000_000)
            start, end = events[name][turn]
            start.record()
            function(turn)
            end.record()
        torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def row(layer: Layer, *, zipf: bool, backward: bool, speeds: tuple[float, float]) -> str:
    peak, bandwidth = speeds
    shape = layer.shape()
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    num_sets = 2 + 2 * cache // (2 * shape.matrix_bytes + shape.row_bytes + shape.output_bytes)
    sets = [make_inputs(layer, zipf=zipf, seed=seed) for seed in range(num_sets)]
    sets_of = {"torch": [padded(each) for each in sets], "ours": sets, "prepared": sets}
    functions: dict[str, Callable[[Inputs], Tensor]] = {"torch": by_torch, "ours": by_us, "prepared": prepared}

    def call(name: str, turn: int) -> object:
        inputs = sets_of[name][turn % num_sets]
        return with_gradients(functions[name], inputs) if backward else functions[name](inputs)

    times = time_all({name: lambda turn, name=name: call(name, turn) for name in functions})
    medians = {name: statistics.median(values) for name, values in times.items()}
    own = sum(each.total for each in traffic.forward(shape, held=True).values())
    if backward:
        own += sum(each.total for each in traffic.backward(shape, held=True).values())
    flops = traffic.flops(shape, backward=backward)
    bound = traffic.forward_bound(shape) + (traffic.backward_bound(shape) if backward else 0)
    attainable, of_own = (1e3 * max(flops / peak, moved / bandwidth) for moved in (bound, own))
    cells = [layer.name, "Zipf 1.0" if zipf else "uniform", "fwd+bwd" if backward else "fwd"]
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        cells.append(f"{medians[name]:.3f} ± {(high - low) / 2:.3f}")
    cells += [f"{medians['torch'] / medians['ours']:.2f}", f"{attainable:.3f}"]
    cells += [f"{limit / medians['prepared']:.0%}" for limit in (attainable, of_own)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--layers", nargs="+", choices=[layer.name for layer in LAYERS], help="some of them (default all)"
    )
    parser.add_argument("--peak-tflops", type=float, help="of bf16 products, for a GPU that is not known here")
    parser.add_argument("--bandwidth-gb", type=float, help="of the GPU's memory, in GB/s")
    args = parser.parse_args()
    if not torch.cuda.is_available() or why_not_triton("cuda"):
        sys.exit("bench_expert_mlp measures GPU kernels and needs a GPU with triton: run it on such a machine")
    gpu = torch.cuda.get_device_name()
    speeds = next((speeds for name, speeds in SPEEDS.items() if name in gpu), None)
    if args.peak_tflops and args.bandwidth_gb:
        speeds = (args.peak_tflops * 1e12, args.bandwidth_gb * 1e9)
    if speeds is None:
        sys.exit(f"the speeds of {gpu} are not known here: pass --peak-tflops and --bandwidth-gb")
    layers = [layer for layer in LAYERS if not args.layers or layer.name in args.layers]
    for layer, zipf in itertools.product(layers, (False, True)):
        check(layer, zipf=zipf)
    lines = []
    for layer, zipf, backward in itertools.product(layers, (False, True), (False, True)):
        print(f"{layer.name}, zipf {zipf}, backward {backward}", file=sys.stderr)
        lines.append(row(layer, zipf=zipf, backward=backward, speeds=speeds))
    import triton

    print(
        HEADER.format(
            gpu=gpu, arguments=" ".join(["", *sys.argv[1:]]), python=platform.python_version(), torch=torch.__version__,
            triton=triton.__version__, calls=CALLS, peak=speeds[0] / 1e12, bandwidth=speeds[1] / 1e12,
        )
    )  # fmt: skip
    print("\n".join(lines))


if __name__ == "__main__":
    main()
