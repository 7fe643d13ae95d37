"""How fast shift_mix is on a GPU, beside a shift, two products and a sum one after the other, and beside what the GPU could attain.

Owns: shapes, inputs and the rival. Does not own: checking, timing and the table (benchmarks/gpu/kernel_bench.py), the bytes and FLOPs
(kernels/shift_mix/traffic.py), the CPU's backend (bench_keys_and_shifts_cpu.py, which runs instead where there is no GPU).
Called by: anyone, from the root of the clone: `python -m benchmarks.kernels.bench_shift_mix > FILE.md`; --smoke needs no GPU.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.kernel_bench import Bench, Inputs, Work, main
from kernels.shift_mix import shift_mix, traffic
from kernels.shift_mix.reference import reference
from model.hsm.shift import shift


@dataclass(frozen=True)
class Layer:
    """A layer's mix with factors for all channels, or with one for each."""

    name: str
    batch: int
    length: int
    width: int
    shift: int
    per_channel: bool = False

    def shape(self) -> traffic.Shape:
        factors = self.width if self.per_channel else 1
        return traffic.Shape(batch=self.batch, length=self.length, width=self.width, factors=factors, itemsize=2)


LAYERS = (
    Layer("D 412, shift 1", 64, 256, 412, 1),
    Layer("D 412, shift 64", 64, 256, 412, 64),
    Layer("D 1024, shift 16", 16, 1024, 1024, 16),
    Layer("D 1024, shift 256", 16, 1024, 1024, 256),
    Layer("D 2048, shift 16, a factor for each channel", 8, 2048, 2048, 16, per_channel=True),
)


def make(layer: Layer, *, zipf: bool, seed: int, device: torch.device) -> Inputs:
    """leaves: u, a, b. zipf: documents of 1, 2, 4 .. positions, else one for each row."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (layer.batch, layer.length, layer.width)
    position = torch.arange(layer.length, device=device)
    documents = (position + 1).log2().int() if zipf else position * 0
    factors = layer.shape().factors
    leaves = (
        torch.randn(shape, generator=generator, device=device).bfloat16().requires_grad_(),
        torch.randn(factors, generator=generator, device=device).requires_grad_(),
        torch.randn(factors, generator=generator, device=device).requires_grad_(),
    )
    gradient = torch.randn(shape, generator=generator, device=device).bfloat16()
    return Inputs(leaves, gradient, (layer.shift, documents.expand(shape[:2]).contiguous()))


def mixed(inputs: Inputs, backend: str) -> Tensor:
    amount, documents = inputs.rest
    return shift_mix(*inputs.leaves, shifts=(amount,), document_ids_BS=documents, backend=backend)


def by_us(inputs: Inputs) -> Tensor:
    return mixed(inputs, "triton")


def by_blocks(inputs: Inputs) -> Tensor:
    return mixed(inputs, "torch")


def one_after_the_other(inputs: Inputs) -> Tensor:
    (u, a, b), (amount, documents) = inputs.leaves, inputs.rest
    return (a * u + b * shift(u, amount, boundary="zero", document_ids_BS=documents)).to(u.dtype)


def by_reference(inputs: Inputs) -> Tensor:
    amount, documents = inputs.rest
    return reference(*inputs.leaves, shifts=(amount,), boundary="zero", document_ids_BS=documents)


def work(layer: Layer, *, backward: bool) -> Work:
    shape = layer.shape()
    return Work.of(traffic.flops(shape, backward=backward), traffic.passes(shape), backward=backward)


BENCH = Bench(
    op="shift_mix",
    layers=LAYERS,
    smoke_layers=(Layer("tiny", 2, 9, 12, 2), Layer("tiny, a factor for each channel", 2, 9, 12, 1, per_channel=True)),
    leaf_names=("u", "a", "b"),
    make=make,
    functions={"operators": one_after_the_other, "blocks": by_blocks, "ours": by_us},
    ours=("ours", "blocks"),
    judged="ours",
    faster="ours",
    rival="operators",
    reference=by_reference,
    work=work,
    notes=(
        "factors in float32; a document for each row, or (Zipf) documents of 1, 2, 4 .. positions",
        "operators: shift, two products, sum; blocks: the backend torch; both of ours find first where documents begin",
    ),
)


if __name__ == "__main__":
    if torch.cuda.is_available() or "--smoke" in sys.argv:
        main(BENCH)
    else:
        from benchmarks.kernels.bench_keys_and_shifts_cpu import main as main_on_cpu

        main_on_cpu()
