"""How fast grouped_matmul's kernels are on a GPU, beside gather + torch's grouped matmul + index_add, and beside one dense matmul.

Owns: shapes, inputs and rivals. Does not own: checking, timing and the table (benchmarks/gpu/kernel_bench.py), the bytes
(kernels/grouped_matmul/traffic.py), the CPU's backends (bench_grouped_matmul_cpu.py, which runs instead where there is no GPU).
Called by: anyone, from the root of the clone: `python -m benchmarks.kernels.bench_grouped_matmul > FILE.md`; --smoke needs no GPU.
"""

import sys
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.kernel_bench import Bench, Inputs, Work, main
from benchmarks.gpu.routes import sorted_copies
from kernels.grouped_matmul import grouped_matmul, traffic
from kernels.grouped_matmul.reference import reference
from kernels.sum_copies import RowCopies


@dataclass(frozen=True)
class Layer:
    """A projection of SwitchHead and the tokens of one step of its configuration: E experts per head, of which a token takes K.

    values: reads the token, writes (token, head), gate after the product; outputs: the reverse, gate before it.
    """

    name: str
    side: str  # "values" or "outputs"
    tokens: int
    heads: int
    num_experts: int
    top_k: int
    width_in: int
    width_out: int

    @property
    def num_rows(self) -> int:
        return self.tokens * (self.heads if self.side == "outputs" else 1)

    @property
    def num_outputs(self) -> int:
        return self.tokens * (self.heads if self.side == "values" else 1)


LAYERS = (
    Layer("SwitchHead 47M, V", "values", 16384, 2, 5, 2, 412, 76),
    Layer("SwitchHead 47M, O", "outputs", 16384, 2, 5, 2, 76, 412),
    Layer("SwitchHead 262M, V", "values", 32768, 4, 4, 2, 1024, 112),
    Layer("SwitchHead 262M, O", "outputs", 32768, 4, 4, 2, 112, 1024),
    Layer("one head, 64 experts, up", "values", 16384, 1, 64, 4, 512, 128),
    Layer("one head, 64 experts, down", "outputs", 16384, 1, 64, 4, 128, 512),
)


@dataclass(frozen=True)
class Routes:
    """Copies sorted by group: the row that each reads, the output row that it adds to."""

    row_index_C: Tensor
    output_index_C: Tensor
    offsets_G: Tensor
    num_outputs: int
    gate_side: str
    row_copies: RowCopies
    output_copies: RowCopies


def make(layer: Layer, *, zipf: bool, seed: int, device: torch.device) -> Inputs:
    """leaves: rows, weights, gates."""
    generator = torch.Generator(device).manual_seed(seed)
    heads, groups = layer.heads, layer.heads * layer.num_experts

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    copies = sorted_copies(
        tokens=layer.tokens, heads=heads, num_experts=layer.num_experts, top_k=layer.top_k, zipf=zipf, generator=generator
    )  # fmt: skip
    pair_C, token_C = copies.pair_C, copies.pair_C // heads
    row_index_C, output_index_C = (token_C, pair_C) if layer.side == "values" else (pair_C, token_C)
    routes = Routes(
        row_index_C, output_index_C, copies.offsets_G, layer.num_outputs, "after" if layer.side == "values" else "before",
        RowCopies.of(row_index_C, num_rows=layer.num_rows), RowCopies.of(output_index_C, num_rows=layer.num_outputs),
    )  # fmt: skip
    leaves = (
        normal(layer.num_rows, layer.width_in).bfloat16().requires_grad_(),
        (normal(groups, layer.width_in, layer.width_out) / layer.width_in**0.5).bfloat16().requires_grad_(),
        torch.rand(len(pair_C), generator=generator, device=device).requires_grad_(),
    )
    return Inputs(leaves, normal(layer.num_outputs, layer.width_out).bfloat16(), routes)


def padded(inputs: Inputs) -> Inputs:
    """Both widths rounded up to 16 bytes, as F.grouped_mm wants them."""
    rows, weights, gates = (leaf.detach() for leaf in inputs.leaves)
    more_in, more_out = (-width % 8 for width in weights.shape[1:])
    rows, weights = F.pad(rows, (0, more_in)), F.pad(weights, (0, more_out, 0, more_in))
    leaves = tuple(leaf.requires_grad_() for leaf in (rows, weights, gates))
    return replace(inputs, leaves=leaves, gradient=F.pad(inputs.gradient, (0, more_out)))


def gathered(inputs: Inputs) -> Inputs:
    """As many rows as there are copies, and one matrix: a dense matmul of the same FLOPs."""
    rows, weights, _ = (leaf.detach() for leaf in inputs.leaves)
    routes: Routes = inputs.rest
    leaves = (rows[routes.row_index_C].requires_grad_(), weights[0].clone().requires_grad_())
    return Inputs(leaves, inputs.gradient[routes.output_index_C], None)


def dense(inputs: Inputs) -> Tensor:
    rows, weights = inputs.leaves
    return rows @ weights


def by_torch(inputs: Inputs) -> Tensor:
    rows, weights, gates = inputs.leaves
    routes: Routes = inputs.rest
    copies = rows.index_select(0, routes.row_index_C)
    if routes.gate_side == "before":
        copies = (copies * gates[:, None]).to(copies.dtype)
    results = F.grouped_mm(copies, weights, offs=routes.offsets_G)
    results = results * gates[:, None] if routes.gate_side == "after" else results.float()
    sums = results.new_zeros(routes.num_outputs, results.shape[1]).index_add(0, routes.output_index_C, results)
    return sums.to(rows.dtype)


def by_us(inputs: Inputs, *, row_copies: RowCopies | None = None, output_copies: RowCopies | None = None) -> Tensor:
    rows, weights, gates = inputs.leaves
    routes: Routes = inputs.rest
    return grouped_matmul(
        rows, weights, offsets_G=routes.offsets_G, backend="triton", row_index_C=routes.row_index_C, gates_C=gates,
        gate_side=routes.gate_side, output_index_C=routes.output_index_C, num_outputs=routes.num_outputs, row_copies=row_copies,
        output_copies=output_copies,
    )  # fmt: skip


def prepared(inputs: Inputs) -> Tensor:
    return by_us(inputs, row_copies=inputs.rest.row_copies, output_copies=inputs.rest.output_copies)


def by_reference(inputs: Inputs) -> Tensor:
    rows, weights, gates = inputs.leaves
    routes: Routes = inputs.rest
    copies = rows[routes.row_index_C]
    copies = copies * gates[:, None] if routes.gate_side == "before" else copies
    results = reference(copies, weights, offsets_G=routes.offsets_G)
    results = results * gates[:, None] if routes.gate_side == "after" else results
    return results.new_zeros(routes.num_outputs, results.shape[1]).index_add(0, routes.output_index_C, results)


def work(layer: Layer, *, backward: bool) -> Work:
    copies, groups = layer.tokens * layer.heads * layer.top_k, layer.heads * layer.num_experts
    shape = traffic.Shape(
        sizes=(copies // groups,) * groups, rows=layer.num_rows, outputs=layer.num_outputs, width_in=layer.width_in,
        width_out=layer.width_out,
    )  # fmt: skip
    flops = 2 * copies * layer.width_in * layer.width_out * (3 if backward else 1)
    return Work.of(flops, traffic.passes(shape), backward=backward)


BENCH = Bench(
    op="grouped_matmul",
    layers=LAYERS,
    smoke_layers=(Layer("tiny V", "values", 6, 2, 3, 2, 16, 12), Layer("tiny O", "outputs", 6, 2, 3, 2, 12, 16)),
    leaf_names=("rows", "weights", "gates"),
    make=make,
    functions={"dense": dense, "torch": by_torch, "ours": by_us, "prepared": prepared},
    ours=("ours", "prepared"),
    judged="prepared",
    faster="ours",
    rival="torch",
    reference=by_reference,
    work=work,
    notes=(
        "dense: one matmul of the gathered copies and one matrix; torch: index_select, F.grouped_mm, gate, index_add in fp32 (atomics), "
        "widths padded to 16 bytes beforehand",
        "ours: with the sorts of the routes; prepared: with RowCopies that the layer has made once",
    ),
    adapt={"torch": padded, "dense": gathered},
)


if __name__ == "__main__":
    if torch.cuda.is_available() or "--smoke" in sys.argv:
        main(BENCH)
    else:
        from benchmarks.kernels.bench_grouped_matmul_cpu import main as main_on_cpu

        main_on_cpu()
