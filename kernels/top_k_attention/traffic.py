"""The bytes and multiplications of top_k_attention, from the shapes: what a benchmark divides by.

Owns: the count of every launch of the kernels, of what any kernel would move, and of what is saved for the backward pass. Does not own:
the kernels. Called by: benchmarks/kernels/bench_top_k_attention.py, benchmarks/kernels/compile_table.py (the table in kernels/README.md),
and the tests.

A launch reads and writes each element once: a head's keys and values (4 MB for 16,384 of width 64 in bf16) come from the L2 cache after
their first time. At such lengths the multiplications decide, not the bytes: forward 2 products where flash attention has 2 and a search
of 2 sweeps, a product each; backward 7 where it has 5, since the gradients of queries and of keys are two kernels that share no atomics.
"""

from dataclasses import dataclass

from kernels.traffic import Pass, Traffic, examples

FLOAT, INT = 4, 4


@dataclass(frozen=True)
class Shape:
    """B rows of H heads, S queries and M keys, widths C of q and k and D of v; itemsize: bytes of a number. Every query sees > top_k keys.

    selects: not every key is kept. sharing: heads of q for each one of k and v.
    """

    rows: int
    heads: int
    queries: int
    keys: int
    width: int
    value_width: int
    itemsize: int
    selects: bool = True
    sharing: int = 1

    @property
    def per_query(self) -> int:
        """Numbers of one each for every query and head."""
        return self.rows * self.heads * self.queries

    @property
    def q(self) -> int:
        return self.per_query * self.width * self.itemsize

    @property
    def k(self) -> int:
        return self.rows * self.heads // self.sharing * self.keys * self.width * self.itemsize

    @property
    def v(self) -> int:
        return self.rows * self.heads // self.sharing * self.keys * self.value_width * self.itemsize

    @property
    def output(self) -> int:
        return self.per_query * self.value_width * self.itemsize

    @property
    def chosen(self) -> int:
        """The lowest score that is kept, and the last key."""
        return self.selects * self.per_query * (FLOAT + INT)

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees."""
        return (
            self.rows
            * self.heads
            * (self.queries * (self.keys - self.queries) + self.queries * (self.queries + 1) // 2)
        )


def forward(shape: Shape) -> dict[str, Traffic]:
    """By launch."""
    launches = {"thresholds": Traffic(shape.q + shape.k, shape.chosen)} if shape.selects else {}
    inputs = shape.q + shape.k + shape.v
    return launches | {"forward": Traffic(inputs + shape.chosen, shape.output + shape.per_query * FLOAT)}


def backward(shape: Shape) -> dict[str, Traffic]:
    """By launch. The log of the sum and, for the keys, the sum of gradient * output are a number per query each."""
    inputs, numbers = shape.q + shape.k + shape.v + shape.output + shape.chosen, shape.per_query * FLOAT
    return {
        "queries": Traffic(inputs + shape.output + numbers, shape.q + numbers),
        "keys": Traffic(inputs + 2 * numbers, shape.k + shape.v),
    }


def forward_bound(shape: Shape) -> int:
    """What any implementation reads and writes: inputs once, results once, nothing between."""
    return shape.q + shape.k + shape.v + shape.output


def backward_bound(shape: Shape) -> int:
    """The same inputs and the gradient; the gradients of q, k and v."""
    return forward_bound(shape) + shape.q + shape.k + shape.v


def passes(shape: Shape) -> dict[str, Pass]:
    return {
        "forward": Pass(forward(shape), forward_bound(shape)),
        "backward": Pass(backward(shape), backward_bound(shape)),
    }


def saved(shape: Shape) -> int:
    """Bytes that wait for the backward pass beside q, k and v: the output and three numbers per query."""
    return shape.output + shape.chosen + shape.per_query * FLOAT


def flops(shape: Shape, *, backward: bool) -> int:
    """Of exact attention over the keys that are seen, as flash attention is counted: 2 products, and 5 in its backward pass."""
    products = 2 * shape.pairs * (shape.width + shape.value_width)
    return products + backward * 2 * shape.pairs * (3 * shape.width + 2 * shape.value_width)


SHAPES = {
    "16,384 tokens, 12 heads of 64": Shape(1, 12, 16384, 16384, 64, 64, 2),
    "4,096 tokens, 16 heads of 128": Shape(1, 16, 4096, 4096, 128, 128, 2),
}
EXAMPLES = [
    example
    for name, shape in SHAPES.items()
    for example in examples(name, passes(shape), tokens=shape.rows * shape.queries)
]
