"""The bytes and multiplications of product_key_topk, from the shapes, beside the sub-scores that it does not write.

Owns: the count of every launch, the lower bound, what is saved for the backward pass. Does not own: the kernels.
Called by: benchmarks/kernels/bench_product_key_topk.py, benchmarks/kernels/compile_table.py (the table in kernels/README.md), the tests.

A launch reads and writes each element once: sub-keys come from the L2 cache after their first time (512 KB for each set of 1,024 of width
64), as queries do that several programs read. Every sub-key is chosen by someone. The sort of the picks in the backward pass is not
counted, nor is the sum over heads that have one query.

Written out, the sub-scores of PEER's published size (8 heads, 1,024 sub-keys) would be 64 KiB per token, written and read again; both
passes here move 19 KB. The scores' gradient, as a matrix of zeros with few numbers in it, would be 64 KiB again, and two more products.
"""

from dataclasses import dataclass

from kernels.traffic import Pass, Traffic, examples

FLOAT, INT, INDEX = 4, 4, 8  # everything; sorted copies; the ids of sub-keys


@dataclass(frozen=True, kw_only=True)
class Shape:
    """H heads with K picks among J + J sub-keys of width C. shared_keys, shared_query: one set of sub-keys, one query for all heads."""

    tokens: int
    heads: int
    picks: int
    num_keys: int
    width: int
    shared_keys: bool
    shared_query: bool = False

    @property
    def copies(self) -> int:
        return self.tokens * self.heads * self.picks

    @property
    def num_rows(self) -> int:
        """Sub-keys of all sets."""
        return (1 if self.shared_keys else self.heads) * 2 * self.num_keys

    @property
    def key_bytes(self) -> int:
        return self.num_rows * self.width * FLOAT

    @property
    def query_bytes(self) -> int:
        """Of a query for each head."""
        return self.tokens * self.heads * 2 * self.width * FLOAT

    @property
    def read_queries(self) -> int:
        return self.query_bytes // (self.heads if self.shared_query else 1)


def forward(shape: Shape) -> dict[str, Traffic]:
    """By launch."""
    return {"choose": Traffic(shape.read_queries + shape.key_bytes, shape.copies * (FLOAT + 2 * INDEX))}


def backward(shape: Shape) -> dict[str, Traffic]:
    """By launch, with the gradients of queries and sub-keys."""
    picks = shape.copies * (FLOAT + 2 * INDEX)
    sorted_copies = shape.copies * 2 * INT + shape.num_rows * INT
    return {
        "queries": Traffic(picks + shape.key_bytes, shape.query_bytes),
        "keys": Traffic(sorted_copies + shape.copies * FLOAT + shape.read_queries, shape.key_bytes),
    }


def forward_bound(shape: Shape) -> int:
    """What any implementation reads and writes: inputs once, results once, nothing between."""
    return sum(each.total for each in forward(shape).values())


def backward_bound(shape: Shape) -> int:
    """The gradient, the ids and the inputs; the gradients of queries and sub-keys."""
    inputs = shape.read_queries + shape.key_bytes
    return shape.copies * (FLOAT + 2 * INDEX) + 2 * inputs


def passes(shape: Shape) -> dict[str, Pass]:
    return {
        "forward": Pass(forward(shape), forward_bound(shape)),
        "backward": Pass(backward(shape), backward_bound(shape)),
    }


def saved(shape: Shape) -> int:
    """Bytes that wait for the backward pass, without the sub-keys: queries and ids."""
    return shape.read_queries + shape.copies * 2 * INDEX


def sub_scores(shape: Shape) -> int:
    """Bytes of all sub-scores, which are not written."""
    return shape.tokens * shape.heads * 2 * shape.num_keys * FLOAT


def flops(shape: Shape, *, backward: bool) -> int:
    """Of all sub-scores, and backward of the chosen ones' products."""
    forward = 2 * shape.tokens * shape.heads * 2 * shape.num_keys * shape.width
    return forward + 2 * 2 * shape.copies * 2 * shape.width if backward else forward


SHAPES = {
    "PEER: 8 heads, K 16 of 1,024^2, C 64": Shape(
        tokens=8192, heads=8, picks=16, num_keys=1024, width=64, shared_keys=True
    ),
    "PKM: 4 heads, K 32 of 512^2, C 128": Shape(
        tokens=8192, heads=4, picks=32, num_keys=512, width=128, shared_keys=False
    ),
}
EXAMPLES = [example for name, shape in SHAPES.items() for example in examples(name, passes(shape), tokens=shape.tokens)]
