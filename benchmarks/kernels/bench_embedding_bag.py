"""How fast embedding_bag is on a GPU, beside torch's, as a share of the bandwidth of a copy.

Owns: shapes, inputs and the rival. Does not own: timing and the table (benchmarks/gpu/table_bench.py), the bytes (kernels/embedding_bag/
traffic.py). Called by: anyone with a GPU, from the root of the clone: `python -m benchmarks.kernels.bench_embedding_bag > FILE.md`; --smoke
needs none.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.kernel_bench import Bench, Inputs
from benchmarks.gpu.table_bench import Layer, choose, few_tokens, main, work
from kernels.embedding_bag import embedding_bag, traffic
from kernels.embedding_bag.reference import reference

LAYERS = (
    Layer("Memory+, 1,024^2 values, 4 heads, k 32, D 1,024", 8192, 1024, 1024**2, 128),
    Layer("PKM, 512^2 values, 4 heads, k 32, D 1,024", 8192, 1024, 512**2, 128),
)


def make(layer: Layer, *, zipf: bool, seed: int, device: torch.device) -> Inputs:
    """leaves: table, gates."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    leaves = (
        normal(layer.num_entries, layer.d_model).requires_grad_(),
        torch.rand(layer.tokens * layer.choices, generator=generator, device=device).requires_grad_(),
    )
    return Inputs(leaves, normal(layer.tokens, layer.d_model), choose(layer, zipf=zipf, generator=generator))


def by_torch(inputs: Inputs) -> Tensor:
    table, gates = inputs.leaves
    entry_TA = inputs.rest.entry_TA
    return F.embedding_bag(entry_TA, table, mode="sum", per_sample_weights=gates.view(entry_TA.shape).to(table.dtype))


def by_us(inputs: Inputs) -> Tensor:
    return embedding_bag(*inputs.leaves, routes=inputs.rest.routes, backend="triton")


def by_reference(inputs: Inputs) -> Tensor:
    table, gates = inputs.leaves
    return reference(table, gates, inputs.rest.routes)


BENCH = Bench(
    op="embedding_bag",
    layers=LAYERS,
    smoke_layers=(Layer("tiny", 6, 16, 64, 8),),
    leaf_names=("table", "gates"),
    make=make,
    functions={"torch": by_torch, "ours": by_us},
    ours=("ours",),
    judged="ours",
    faster="ours",
    rival="torch",
    reference=by_reference,
    work=partial(work, traffic),
    notes=("torch: F.embedding_bag with per_sample_weights in bf16 and a dense gradient",),
    checked=partial(few_tokens, tables=(0,)),
    share={"fwd": 0.75, "bwd": 0.50},
)


if __name__ == "__main__":
    main(BENCH)
