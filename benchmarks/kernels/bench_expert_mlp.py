"""How fast expert_mlp is on a GPU, beside gather + torch's grouped matmul + index_add, and beside what the GPU could attain.

Owns: shapes, inputs, the rival and the bars. Does not own: checking, timing and the table (benchmarks/gpu/kernel_bench.py), the bytes and
FLOPs (kernels/expert_mlp/traffic.py).
Called by: anyone with a GPU, from the root of the clone: `python -m benchmarks.kernels.bench_expert_mlp > FILE.md`; --smoke needs none.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.kernel_bench import Bench, Inputs, Work, main
from benchmarks.gpu.routes import sorted_copies
from kernels.expert_mlp import expert_mlp, traffic
from kernels.expert_mlp.reference import reference
from kernels.sum_copies import RowCopies


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


@dataclass(frozen=True)
class Routes:
    """Copies sorted by expert."""

    index_C: Tensor
    offsets_L: Tensor
    copies: RowCopies


def make(layer: Layer, *, zipf: bool, seed: int, device: torch.device) -> Inputs:
    """leaves: rows, up, down, gates."""
    generator = torch.Generator(device).manual_seed(seed)
    d, f, num_experts = layer.d_model, layer.expert_dim, layer.num_experts

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    copies = sorted_copies(
        tokens=layer.tokens, num_experts=num_experts, top_k=layer.top_k, zipf=zipf, generator=generator
    )
    index_C = copies.pair_C
    leaves = (
        normal(layer.tokens, d).bfloat16().requires_grad_(),
        (normal(num_experts, d, f) / d**0.5).bfloat16().requires_grad_(),
        (normal(num_experts, f, d) / f**0.5).bfloat16().requires_grad_(),
        torch.rand(len(index_C), generator=generator, device=device).requires_grad_(),
    )
    routes = Routes(index_C, copies.offsets_G, RowCopies.of(index_C, num_rows=layer.tokens))
    return Inputs(leaves, normal(layer.tokens, d).bfloat16(), routes)


def padded(inputs: Inputs) -> Inputs:
    """D rounded up to 16 bytes, as F.grouped_mm wants it."""
    rows, up, down, gates = (leaf.detach() for leaf in inputs.leaves)
    more = -rows.shape[1] % 8
    rows, up, down = F.pad(rows, (0, more)), F.pad(up, (0, 0, 0, more)), F.pad(down, (0, more))
    leaves = tuple(leaf.requires_grad_() for leaf in (rows, up, down, gates))
    return replace(inputs, leaves=leaves, gradient=F.pad(inputs.gradient, (0, more)))


def on_a_grid(inputs: Inputs) -> Inputs:
    """Rows and up in a few bits, so that their products are exact in any order: among 8 million hidden activations some are within a
    rounding of zero, and relu would let them through on one side only. Not for the clock: such numbers cost less power.
    """
    rows, up, down, gates = (leaf.detach() for leaf in inputs.leaves)
    scale = 2 ** round(math.log2(up.shape[1]) / 2)
    up = ((up * up.shape[1] ** 0.5 * 4).round() / 4 / scale).to(up.dtype)
    leaves = tuple(leaf.requires_grad_() for leaf in ((rows * 2).round() / 2, up, down, gates))
    return replace(inputs, leaves=leaves)


def by_torch(inputs: Inputs) -> Tensor:
    rows, up, down, gates = inputs.leaves
    routes: Routes = inputs.rest
    hidden = F.grouped_mm(rows.index_select(0, routes.index_C), up, offs=routes.offsets_L).relu()
    results = F.grouped_mm((hidden * gates[:, None]).to(hidden.dtype), down, offs=routes.offsets_L)
    sums = rows.new_zeros(rows.shape, dtype=torch.float32).index_add(0, routes.index_C, results.float())
    return sums.to(rows.dtype)


def by_us(inputs: Inputs, *, copies: RowCopies | None = None) -> Tensor:
    index_C, offsets_L = inputs.rest.index_C, inputs.rest.offsets_L
    return expert_mlp(
        *inputs.leaves, row_index_C=index_C, output_index_C=index_C, offsets_L=offsets_L, num_outputs=len(inputs.gradient),
        output_copies=copies, row_copies=copies, backend="triton",
    )  # fmt: skip


def prepared(inputs: Inputs) -> Tensor:
    return by_us(inputs, copies=inputs.rest.copies)


def by_reference(inputs: Inputs) -> Tensor:
    """Not through the public function, whose gates are float32."""
    index_C, offsets_L = inputs.rest.index_C, inputs.rest.offsets_L
    return reference(
        *inputs.leaves, row_index_C=index_C, output_index_C=index_C, offsets_L=offsets_L, num_outputs=len(inputs.gradient)
    )  # fmt: skip


def work(layer: Layer, *, backward: bool) -> Work:
    shape = layer.shape()
    return Work.of(traffic.flops(shape, backward=backward), traffic.passes(shape), backward=backward)


BENCH = Bench(
    op="expert_mlp",
    layers=LAYERS,
    smoke_layers=(Layer("tiny", 12, 16, 3, 16, 2),),
    leaf_names=("rows", "up", "down", "gates"),
    make=make,
    functions={"torch": by_torch, "ours": by_us, "prepared": prepared},
    ours=("ours", "prepared"),
    judged="prepared",
    faster="ours",
    rival="torch",
    reference=by_reference,
    work=work,
    notes=(
        "torch: index_select, F.grouped_mm, relu, gate, F.grouped_mm, index_add in fp32 (atomics); D 412 is padded to 416 for it "
        "beforehand",
        "ours: with the sort of the routes; prepared: with RowCopies that the layer has made once",
    ),
    adapt={"torch": padded},
    checked=on_a_grid,
    share={"fwd": 0.80, "fwd+bwd": 0.65},
    speedup=1.3,
)


if __name__ == "__main__":
    main(BENCH)
