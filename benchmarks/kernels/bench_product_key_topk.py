"""How fast the choice by product keys is on a GPU, beside all sub-scores at once with torch's topk, and beside what the GPU could attain.

Owns: shapes, inputs and the rival. Does not own: checking, timing and the table (benchmarks/gpu/kernel_bench.py), the bytes and FLOPs
(kernels/product_key_topk/traffic.py), the CPU's backend (bench_keys_and_shifts_cpu.py, which runs instead where there is no GPU).
Called by: anyone, from the root of the clone: `python -m benchmarks.kernels.bench_product_key_topk > FILE.md`; --smoke needs no GPU.
"""

import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu.kernel_bench import Bench, Inputs, Work, main
from kernels.product_key_topk import product_key_topk, traffic
from kernels.product_key_topk.cpu import staircase
from kernels.product_key_topk.reference import reference

# The products are float32 without tensor cores, 67 TFLOP/s of an H100 where bf16 has 989: so many FLOPs of bf16 each of theirs is.
OF_BF16 = 989 / 67


@dataclass(frozen=True)
class Layer:
    """The choice of one layer. shared: one set of sub-keys for all heads; width: of half a query."""

    name: str
    tokens: int
    heads: int
    picks: int
    num_keys: int
    width: int
    shared: bool

    def shape(self) -> traffic.Shape:
        return traffic.Shape(
            tokens=self.tokens, heads=self.heads, picks=self.picks, num_keys=self.num_keys, width=self.width,
            shared_keys=self.shared,
        )  # fmt: skip


LAYERS = (
    Layer("PEER 1024^2", 8192, 8, 16, 1024, 64, True),
    Layer("PEER 256^2", 8192, 4, 8, 256, 64, True),
    Layer("PKM 512^2", 8192, 4, 32, 512, 128, False),
    Layer("one head, K 64", 8192, 1, 64, 1024, 64, True),
)


def make(layer: Layer, *, zipf: bool, seed: int, device: torch.device) -> Inputs:
    """leaves: queries, keys. zipf: sub-keys shrink as 1 / sqrt(j), so that few are chosen often."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    keys = normal(1 if layer.shared else layer.heads, 2, layer.num_keys, layer.width) / layer.width**0.5
    if zipf:
        keys /= torch.arange(1, layer.num_keys + 1, device=device)[:, None] ** 0.5
    queries = normal(layer.tokens, layer.heads, 2, layer.width)
    gradient = normal(layer.tokens, layer.heads, layer.picks)
    return Inputs((queries.requires_grad_(), keys.requires_grad_()), gradient, layer.picks)


def on_a_grid(inputs: Inputs) -> Inputs:
    """Numbers of a few bits, whose products are exact in any order, so that equal scores are equal everywhere and the lowest id wins."""
    queries, keys = (leaf.detach() for leaf in inputs.leaves)
    keys = (keys * keys.shape[3] ** 0.5 * 4).round() / 4
    return replace(inputs, leaves=((queries * 4).round().div(4).requires_grad_(), keys.requires_grad_()))


def by_us(inputs: Inputs) -> Tensor:
    return product_key_topk(*inputs.leaves, top_k=inputs.rest, backend="triton").scores_THK


def by_chunks(inputs: Inputs) -> Tensor:
    return product_key_topk(*inputs.leaves, top_k=inputs.rest, backend="torch").scores_THK


def whole(inputs: Inputs) -> Tensor:
    """All sub-scores, torch.topk, and autograd through what is gathered; whichever of equal scores torch takes."""
    queries, keys = inputs.leaves
    num_keys = keys.shape[2]
    scores = torch.einsum("thzc,hzjc->thzj", queries, keys.expand(queries.shape[1], -1, -1, -1))
    best = scores.detach().topk(min(inputs.rest, num_keys), dim=-1).indices
    first, second = (torch.tensor(ranks, device=keys.device) for ranks in staircase(inputs.rest, num_keys))
    a, b = best[..., 0, :][..., first], best[..., 1, :][..., second]
    sums = scores.detach()[..., 0, :].gather(-1, a) + scores.detach()[..., 1, :].gather(-1, b)
    picked = sums.topk(inputs.rest, dim=-1).indices
    return scores[..., 0, :].gather(-1, a.gather(-1, picked)) + scores[..., 1, :].gather(-1, b.gather(-1, picked))


def by_reference(inputs: Inputs) -> Tensor:
    return reference(*inputs.leaves, top_k=inputs.rest)[0]


def work(layer: Layer, *, backward: bool) -> Work:
    shape = layer.shape()
    return Work.of(int(OF_BF16 * traffic.flops(shape, backward=backward)), traffic.passes(shape), backward=backward)


BENCH = Bench(
    op="product_key_topk",
    layers=LAYERS,
    smoke_layers=(Layer("tiny", 6, 2, 4, 5, 8, True), Layer("tiny, own keys", 6, 2, 3, 4, 8, False)),
    leaf_names=("queries", "keys"),
    make=make,
    functions={"whole": whole, "chunks": by_chunks, "ours": by_us},
    ours=("ours", "chunks"),
    judged="ours",
    faster="ours",
    rival="whole",
    reference=by_reference,
    work=work,
    notes=(
        "not bf16: queries, sub-keys and scores are float32, and their products use no tensor cores: FLOPs are counted as the "
        f"{OF_BF16:.1f} of bf16 that take as long on an H100; Zipf: sub-keys whose length falls",
        "whole: all sub-scores, torch.topk, and autograd through what is gathered; chunks: the backend torch",
        "ours: with the sort of the picks for the sub-keys' gradient",
    ),
    checked=on_a_grid,
)


if __name__ == "__main__":
    if torch.cuda.is_available() or "--smoke" in sys.argv:
        main(BENCH)
    else:
        from benchmarks.kernels.bench_keys_and_shifts_cpu import main as main_on_cpu

        main_on_cpu()
