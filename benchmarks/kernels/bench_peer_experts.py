"""How fast peer_experts is on a GPU, beside gather and einsum, as a share of the bandwidth of a copy.

Owns: shapes, inputs and the rival. Does not own: timing and the table (benchmarks/gpu/table_bench.py), the bytes (kernels/peer_experts/
traffic.py). Called by: anyone with a GPU, from the root of the clone: `python -m benchmarks.kernels.bench_peer_experts > FILE.md`; --smoke
needs none.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.kernel_bench import Bench, Inputs
from benchmarks.gpu.table_bench import Layer, choose, few_tokens, main, work
from kernels.peer_experts import peer_experts, traffic
from kernels.peer_experts.reference import reference

LAYERS = (
    Layer("PEER, 1,024^2 experts, h 8, k 16, D 1,024", 8192, 1024, 1024**2, 128),
    Layer("PEER, 1,024^2 experts, h 8, k 16, 128 columns", 8192, 128, 1024**2, 128),
    # at D 1,024 the rotating inputs and what the rival keeps of them would be 69 of an H100's 78 GiB
    Layer("PEER, 1,024^2 experts, h 8, k 16, D 512, tables fp32", 8192, 512, 1024**2, 128, torch.float32),
)


def make(layer: Layer, *, zipf: bool, seed: int, device: torch.device) -> Inputs:
    """leaves: rows, up, down, gates."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    d, length = layer.d_model, layer.num_entries
    leaves = (
        normal(layer.tokens, d).requires_grad_(),
        (normal(length, d) / d**0.5).to(layer.dtype).requires_grad_(),
        normal(length, d).to(layer.dtype).requires_grad_(),
        torch.rand(layer.tokens * layer.choices, generator=generator, device=device).requires_grad_(),
    )
    return Inputs(leaves, normal(layer.tokens, d), choose(layer, zipf=zipf, generator=generator))


def by_torch(inputs: Inputs) -> Tensor:
    rows, up, down, gates = inputs.leaves
    entry_TA = inputs.rest.entry_TA
    z_TA = torch.einsum("td,tad->ta", rows, F.embedding(entry_TA, up).to(rows.dtype))
    weights_TA = gates.view(entry_TA.shape) * F.gelu(z_TA.float())
    return torch.einsum("ta,tad->td", weights_TA.to(rows.dtype), F.embedding(entry_TA, down).to(rows.dtype))


def by_us(inputs: Inputs) -> Tensor:
    return peer_experts(*inputs.leaves, routes=inputs.rest.routes, activation="gelu", backend="triton")


def by_reference(inputs: Inputs) -> Tensor:
    return reference(*inputs.leaves, routes=inputs.rest.routes, activation="gelu")


BENCH = Bench(
    op="peer_experts",
    layers=LAYERS,
    smoke_layers=(Layer("tiny", 6, 16, 64, 8), Layer("tiny, tables fp32", 6, 16, 64, 8, torch.float32)),
    leaf_names=("rows", "up", "down", "gates"),
    make=make,
    functions={"torch": by_torch, "ours": by_us},
    ours=("ours",),
    judged="ours",
    faster="ours",
    rival="torch",
    reference=by_reference,
    work=partial(work, traffic),
    notes=(
        "torch: two F.embedding, two einsum, dense gradients; keeps both gathered (tokens, choices, D) for its backward pass",
        "the bars are judged on tables of both dtypes: a run holds its parameters in fp32 and its kernels read them so; bf16 is what "
        "they read where weights travel (gathered from other ranks in bf16), and the harder case, with half of the bytes in a row",
    ),
    checked=partial(few_tokens, tables=(1, 2)),
    share={"fwd": 0.75, "bwd": 0.50},
)


if __name__ == "__main__":
    main(BENCH)
