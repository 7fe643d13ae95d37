"""How fast SwitchHead's V and O are on a GPU: all experts by our kernels or by torch, the chosen ones by grouped_matmul, or no experts.

Owns: shapes, inputs and rivals. Does not own: checking, timing and the table (benchmarks/gpu/kernel_bench.py), the bytes and FLOPs
(kernels/switchhead_project/traffic.py).
Called by: anyone with a GPU, from the root of the clone: `python -m benchmarks.kernels.bench_switchhead_project > FILE.md`; --smoke needs
none.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.kernel_bench import Bench, Inputs, Work, main
from benchmarks.gpu.routes import sorted_copies
from kernels.grouped_matmul import grouped_matmul
from kernels.sum_copies import RowCopies
from kernels.switchhead_project import project_outputs, project_values, reference, traffic


@dataclass(frozen=True)
class Layer:
    """A projection of SwitchHead and the tokens of one step of its configuration. side: "values" or "outputs"."""

    name: str
    side: str
    tokens: int
    heads: int
    num_experts: int
    top_k: int
    d_model: int
    head_dim: int

    def shape(self) -> traffic.Shape:
        return traffic.Shape(
            tokens=self.tokens, heads=self.heads, experts=self.num_experts, choices=self.top_k, d_model=self.d_model,
            head_dim=self.head_dim,
        )  # fmt: skip


def both(name: str, *sizes: int) -> tuple[Layer, Layer]:
    """V and O of an attention layer."""
    return Layer(f"{name}, V", "values", *sizes), Layer(f"{name}, O", "outputs", *sizes)


LAYERS = (
    *both("SwitchHead 47M", 16384, 2, 5, 2, 412, 76),
    *both("SwitchHead 47M, K 3", 16384, 2, 5, 3, 412, 76),
    *both("SwitchHead 262M", 32768, 4, 4, 2, 1024, 112),
    *both("switchall_7b", 16384, 8, 8, 2, 2048, 128),
)


@dataclass(frozen=True)
class Routes:
    """What was chosen, and the same as copies sorted by group, as the layer's dispatcher plans them."""

    side: str
    experts_THK: Tensor
    order_C: Tensor
    row_index_C: Tensor
    output_index_C: Tensor
    offsets_G: Tensor
    row_copies: RowCopies
    output_copies: RowCopies


def make(layer: Layer, *, zipf: bool, seed: int, device: torch.device) -> Inputs:
    """leaves: rows, weights, gates."""
    generator = torch.Generator(device).manual_seed(seed)
    heads, groups = layer.heads, layer.heads * layer.num_experts
    values = layer.side == "values"

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    copies = sorted_copies(
        tokens=layer.tokens, heads=heads, num_experts=layer.num_experts, top_k=layer.top_k, zipf=zipf, generator=generator
    )  # fmt: skip
    index = {"wide": (copies.pair_C // heads, layer.tokens), "narrow": (copies.pair_C, layer.tokens * heads)}
    (row_index_C, num_rows), (output_index_C, num_outputs) = (
        index[name] for name in (("wide", "narrow") if values else ("narrow", "wide"))
    )
    routes = Routes(
        layer.side, copies.ids_PK.view(layer.tokens, heads, layer.top_k), copies.order_C, row_index_C, output_index_C,
        copies.offsets_G,
        RowCopies.of(row_index_C, num_rows=num_rows), RowCopies.of(output_index_C, num_rows=num_outputs),
    )  # fmt: skip
    wide, narrow = (layer.tokens, layer.d_model), (layer.tokens, heads, layer.head_dim)
    rows, results = (wide, narrow) if values else (narrow, wide)
    leaves = (
        normal(*rows).bfloat16().requires_grad_(),
        (normal(groups, rows[-1], results[-1]) / rows[-1] ** 0.5).bfloat16().requires_grad_(),
        torch.rand(routes.experts_THK.shape, generator=generator, device=device).requires_grad_(),
    )
    return Inputs(leaves, normal(*results).bfloat16(), routes)


def project(inputs: Inputs, *, backend: str) -> Tensor:
    function = project_values if inputs.rest.side == "values" else project_outputs
    return function(*inputs.leaves, experts_THK=inputs.rest.experts_THK, backend=backend)


def by_us(inputs: Inputs) -> Tensor:
    return project(inputs, backend="triton")


def by_torch(inputs: Inputs) -> Tensor:
    return project(inputs, backend="torch")


def routed(inputs: Inputs) -> Tensor:
    rows, weights, gates = inputs.leaves
    routes: Routes = inputs.rest
    sums = grouped_matmul(
        rows.view(-1, rows.shape[-1]), weights, offsets_G=routes.offsets_G, backend="triton",
        row_index_C=routes.row_index_C, gates_C=gates.flatten()[routes.order_C],
        gate_side="after" if routes.side == "values" else "before", output_index_C=routes.output_index_C,
        num_outputs=inputs.gradient.numel() // weights.shape[2], row_copies=routes.row_copies,
        output_copies=routes.output_copies,
    )  # fmt: skip
    return sums.view(inputs.gradient.shape)


def plain(inputs: Inputs) -> Tensor:
    rows, weights = inputs.leaves
    return rows @ weights


def without_experts(inputs: Inputs) -> Inputs:
    """The projection of attention that is no mixture: D to H C, or back."""
    rows, weights, _ = (leaf.detach() for leaf in inputs.leaves)
    rows, gradient = rows.flatten(1), inputs.gradient.flatten(1)
    matrix = weights.flatten()[: rows.shape[1] * gradient.shape[1]].view(rows.shape[1], gradient.shape[1]).clone()
    return Inputs((rows.requires_grad_(), matrix.requires_grad_()), gradient, None)


def by_reference(inputs: Inputs) -> Tensor:
    """Not through the public functions, whose gates are float32."""
    function = reference.project_values if inputs.rest.side == "values" else reference.project_outputs
    rows, weights, gates = inputs.leaves
    return function(rows, weights, gates, inputs.rest.experts_THK)


def work(layer: Layer, *, backward: bool) -> Work:
    shape = layer.shape()
    passes = traffic.passes(shape, values=layer.side == "values")
    return Work.of(traffic.flops(shape, backward=backward), passes, backward=backward)


BENCH = Bench(
    op="switchhead_project",
    layers=LAYERS,
    smoke_layers=both("tiny", 6, 2, 3, 2, 16, 12),
    leaf_names=("rows", "weights", "gates"),
    make=make,
    functions={"plain": plain, "torch": by_torch, "routed": routed, "ours": by_us},
    ours=("ours", "routed"),
    judged="ours",
    faster="ours",
    rival="routed",
    reference=by_reference,
    work=work,
    notes=(
        "plain: one matmul D to H C, or back, without experts; torch: one matmul over all experts, then gather or scatter",
        "routed: grouped_matmul on sorted copies; the plan and its RowCopies are made beforehand",
        "ours: all experts, with the sort of the routes for the weights' gradient; the FLOPs of share and TFLOP/s are those of the chosen "
        "experts, ours multiplies by all: see kernels/switchhead_project/traffic.py",
    ),
    adapt={"plain": without_experts},
)


if __name__ == "__main__":
    main(BENCH)
