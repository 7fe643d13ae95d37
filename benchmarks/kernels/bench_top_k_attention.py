"""How fast top-k attention is on a GPU, beside torch's flash attention over all keys and our chunks of queries in torch.

Owns: shapes, inputs, rivals and the bar. Does not own: checking, timing and the table (benchmarks/gpu/kernel_bench.py), the bytes and
FLOPs (kernels/top_k_attention/traffic.py).
Called by: anyone with a GPU, from the root of the clone: `python -m benchmarks.kernels.bench_top_k_attention > FILE.md`; --smoke needs
none.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.kernel_bench import Bench, Inputs, Work, main
from kernels.top_k_attention import top_k_attention, traffic
from kernels.top_k_attention.reference import reference

JUDGED = 16_384  # the length that the bar is about
CHUNKED = 4096  # the longest for the torch backend, which waits for the device at each chunk (WAITS of benchmarks/gpu/timing.py)
CHECKED = 1024  # positions of the check, whose reference holds all scores in float64


@dataclass(frozen=True)
class Layer:
    """One causal attention layer, `tokens` positions long."""

    name: str
    tokens: int
    heads: int
    width: int
    top_k: int

    def shape(self) -> traffic.Shape:
        return traffic.Shape(1, self.heads, self.tokens, self.tokens, self.width, self.width, itemsize=2)


LAYERS = (
    Layer("S 4,096, 12 x 64, top 64", 4096, 12, 64, 64),
    Layer("S 16,384, 12 x 64, top 64", 16384, 12, 64, 64),
    Layer("S 16,384, 12 x 64, top 128", 16384, 12, 64, 128),
    Layer("S 16,384, 16 x 128, top 64", 16384, 16, 128, 64),
    Layer("S 32,768, 4 x 112, top 64", 32768, 4, 112, 64),
)


@dataclass(frozen=True)
class Settings:
    top_k: int
    first_BS: Tensor | None


def make(layer: Layer, *, zipf: bool, seed: int, device: torch.device) -> Inputs:
    """leaves: q, k, v. zipf: the row is cut into 16 documents, the i-th in proportion to 1 / (i + 1)."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (1, layer.heads, layer.tokens, layer.width)
    q, k, v, gradient = (torch.randn(shape, generator=generator, device=device).bfloat16() for _ in range(4))
    first_BS = None
    if zipf:
        shares = 1 / torch.arange(1, 17, device=device)
        starts = ((shares.cumsum(0) - shares) / shares.sum() * layer.tokens).int()
        place = torch.searchsorted(starts, torch.arange(layer.tokens, device=device, dtype=torch.int32), right=True) - 1
        first_BS = starts[place][None]
    leaves = tuple(each.requires_grad_() for each in (q, k, v))
    return Inputs(leaves, gradient, Settings(layer.top_k, first_BS))


def short_and_on_a_grid(inputs: Inputs) -> Inputs:
    """The first positions, q and k in a few bits: scores are exact in any order, and many are equal. Not for the clock."""
    q, k, v = (leaf.detach()[:, :2, :CHECKED] for leaf in inputs.leaves)
    q, k = ((2 * each).round() / 2 for each in (q, k))
    settings: Settings = inputs.rest
    first_BS = None if settings.first_BS is None else settings.first_BS[:, :CHECKED]
    leaves = tuple(each.contiguous().requires_grad_() for each in (q, k, v))
    return replace(
        inputs, leaves=leaves, gradient=inputs.gradient[:, :2, :CHECKED], rest=replace(settings, first_BS=first_BS)
    )


def by_us(inputs: Inputs, *, backend: str = "triton") -> Tensor:
    settings: Settings = inputs.rest
    scale = inputs.leaves[0].shape[-1] ** -0.5
    return top_k_attention(
        *inputs.leaves, top_k=settings.top_k, scale=scale, first_BS=settings.first_BS, backend=backend
    )


def by_chunks(inputs: Inputs) -> Tensor:
    return by_us(inputs, backend="torch")


def all_keys(inputs: Inputs) -> Tensor:
    return by_us(replace(inputs, rest=replace(inputs.rest, top_k=None)))


def by_flash(inputs: Inputs) -> Tensor:
    """On a GPU by flash attention or not at all: torch chooses among its forms by rules of its own."""
    q, k, v = inputs.leaves
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_reference(inputs: Inputs) -> Tensor:
    settings: Settings = inputs.rest
    scale = inputs.leaves[0].shape[-1] ** -0.5
    return reference(*inputs.leaves, top_k=settings.top_k, scale=scale, first_BS=settings.first_BS)


def work(layer: Layer, *, backward: bool) -> Work:
    """Of a row that is one document."""
    shape = layer.shape()
    return Work.of(traffic.flops(shape, backward=backward), traffic.passes(shape), backward=backward)


BENCH = Bench(
    op="top_k_attention",
    layers=LAYERS,
    smoke_layers=(Layer("tiny", 70, 2, 16, 5),),
    leaf_names=("q", "k", "v"),
    make=make,
    functions={"flash": by_flash, "chunks": by_chunks, "all keys": all_keys, "ours": by_us},
    ours=("ours",),
    judged="ours",
    faster="ours",
    rival="flash",
    reference=by_reference,
    work=work,
    notes=(
        "flash: F.scaled_dot_product_attention by torch's flash attention, over all keys of the row, also where the row has documents; "
        f"chunks: the torch backend, up to {CHUNKED:,} positions; all keys: our kernels without a selection",
        f"the bar is judged at {JUDGED:,} positions in one document: by documents ours skips what flash does not",
        "routing: uniform is a row of one document, Zipf 1.0 a row of 16 whose lengths follow it, where ours skips what is not seen; "
        "FLOPs and share are those of exact attention in a row of one document, as for flash",
        f"checked on the first {CHECKED} positions of two heads",
    ),
    checked=short_and_on_a_grid,
    only={"chunks": lambda layer: layer.tokens <= CHUNKED},
    speedup=1 / 3,
    bars=lambda layer, zipf: layer.tokens == JUDGED and not zipf,
)


if __name__ == "__main__":
    main(BENCH)
