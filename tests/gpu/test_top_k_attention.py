"""Top-k attention on a GPU, by real products in each dtype: against the reference in float64, bit for bit twice, and the keys it keeps."""

import pytest
import torch
from torch import Tensor

from kernels.top_k_attention import top_k_attention
from kernels.top_k_attention.reference import reference
from tests.gpu.cases import DTYPES, full_or_tiny, normal, on_a_grid
from tests.gpu.test_kernels import check

pytestmark = pytest.mark.gpu
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# B, H, S, M, C, D, top_k, documents, heads of q for each one of k and v
SIZES = full_or_tiny(
    (
        (2, 3, 512, 512, 64, 64, 64, 1, 1),
        (1, 2, 1000, 1000, 64, 64, 32, 7, 1),
        (2, 6, 300, 777, 76, 41, 100, 1, 3),
        (1, 4, 1, 2000, 128, 128, 64, 1, 4),
        (1, 1, 700, 700, 112, 128, 256, 1, 1),
        (1, 2, 400, 400, 20, 7, 1, 3, 1),
        (1, 4, 500, 500, 64, 64, 500, 4, 2),
        (2, 1, 0, 9, 64, 64, 5, 1, 1),
    ),
    ((1, 2, 20, 24, 12, 5, 4, 1, 2), (1, 1, 18, 18, 12, 5, 18, 2, 1)),
)


def firsts(rows: int, length: int, documents: int, device: torch.device) -> Tensor | None:
    """A row cut into documents of about equal length."""
    if documents == 1:
        return None
    size = -(-length // documents)
    return (torch.arange(length, device=device) // size * size).expand(rows, -1).contiguous()


@every_dtype
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_top_k_attention_equals_its_reference(device: torch.device, sizes: tuple[int, ...], dtype: torch.dtype):
    """On a grid, where scores are exact and many are equal."""
    B, H, S, M, C, D, top_k, documents, sharing = sizes
    options = {"top_k": top_k, "scale": C**-0.5, "first_BS": firsts(B, S, documents, device)}
    shapes = {"q": (B, H, S, C), "k": (B, H // sharing, M, C), "v": (B, H // sharing, M, D)}
    leaves = {name: normal(*shape, seed=seed, device=device) for seed, (name, shape) in enumerate(shapes.items())}
    leaves = {name: (on_a_grid(leaf) if name != "v" else leaf).to(dtype) for name, leaf in leaves.items()}
    check(
        lambda q, k, v: top_k_attention(q, k, v, backend="triton", **options),
        lambda q, k, v: reference(q, k, v, **options),
        leaves,
        dtype,
    )


RAW = pytest.mark.parametrize(
    ("length", "width", "top_k"), full_or_tiny([(2048, 64, 64), (1000, 128, 200), (777, 76, 7)], [(40, 12, 5)])
)
SCALE = 0.01  # all weights of a query are nearly equal, so that each is seen


def raw(length: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """q and k of two heads, whose scores are as they come."""
    q, k = (normal(1, 2, length, width, seed=seed, device=device).to(dtype) for seed in (1, 2))
    return q, k


def one_hot(length: int, first: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1, 2, length, 128): position first + d has channel d for itself, the others have none."""
    channel = torch.arange(length, device=device)[:, None] == torch.arange(first, first + 128, device=device)
    return channel.to(dtype).expand(1, 2, -1, -1)


def kept_forward(q: Tensor, k: Tensor, top_k: int) -> Tensor:
    """(2, S, M): whether a query keeps a key, read off by giving each of 128 keys a value channel of its own."""
    length, found = q.shape[2], []
    for first in range(0, length, 128):
        values = one_hot(length, first, q.dtype, q.device)
        found.append(top_k_attention(q, k, values, top_k=top_k, scale=SCALE, backend="triton")[0] > 0)
    return torch.cat(found, 2)[:, :, :length]


@every_dtype
@RAW
def test_each_query_keeps_exactly_top_k_of_the_keys_that_it_sees(
    device: torch.device, length: int, width: int, top_k: int, dtype: torch.dtype
):
    """One score that differed by a bit between the search and the product would be a key too many or too few."""
    kept = kept_forward(*raw(length, width, dtype, device), top_k).sum(2)
    assert torch.equal(kept[0], torch.arange(1, length + 1, device=device).clamp(max=top_k))
    assert torch.equal(kept[0], kept[1])


@every_dtype
@RAW
def test_the_backward_pass_keeps_the_keys_of_the_forward_pass(
    device: torch.device, length: int, width: int, top_k: int, dtype: torch.dtype
):
    """The gradient of v is the weights, where the output's gradient gives each of 128 queries a channel of its own. That of q is held
    against a softmax over the keys of the forward pass, in float64: a key more or less is 7 % of a query's or more."""
    q, k = raw(length, width, dtype, device)
    kept = kept_forward(q, k, top_k)
    v = normal(1, 2, length, 128, seed=3, device=device).to(dtype).requires_grad_()
    output = top_k_attention(q, k, v, top_k=top_k, scale=SCALE, backend="triton")
    for first in range(0, length, 128):
        gradient = one_hot(length, first, dtype, device)
        (weights,) = torch.autograd.grad(output, v, gradient, retain_graph=True)
        queries = kept[:, first : first + 128]
        assert torch.equal(weights[0].mT[:, : queries.shape[1]] > 0, queries)

    q.requires_grad_()
    gradient = normal(1, 2, length, 128, seed=4, device=device).to(dtype)
    output = top_k_attention(q, k, v, top_k=top_k, scale=SCALE, backend="triton")
    (found,) = torch.autograd.grad(output, q, gradient)
    wide = q.detach().double().requires_grad_()
    scores = (wide @ k.double().mT * SCALE).masked_fill(~kept, float("-inf"))
    (wanted,) = torch.autograd.grad(scores.softmax(-1) @ v.detach().double(), wide, gradient.double())
    off = (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert off[:, :, top_k:].max() < 0.03  # the queries before keep all that they see


def test_more_numbers_than_an_int32_counts(device: torch.device):
    """The last of 17,000 rows of 2,048 positions of width 64: 2.2e9 numbers before its end. All rows are alike."""
    rows, length = full_or_tiny((17_000,), (3,))[0], full_or_tiny((2048,), (20,))[0]
    dtype = DTYPES[-1]
    q, k, v = (normal(1, 1, length, 64, seed=seed, device=device).to(dtype) for seed in range(3))
    alone = top_k_attention(q, k, v, top_k=8, scale=0.1, backend="triton")
    many = top_k_attention(*(each.expand(rows, -1, -1, -1) for each in (q, k, v)), top_k=8, scale=0.1, backend="triton")
    assert torch.equal(many[-1], alone[0])
