"""The bytes that shift_mix moves, from the shapes, beside those of a shift, two products and a sum one after the other.

Owns: the count of every launch, the lower bound, what is saved for the backward pass. Does not own: the kernels.
Called by: benchmarks/kernels/bench_shift_mix.py, benchmarks/kernels/compile_table.py (the table in kernels/README.md), and the tests.

A launch reads and writes each element once: a token that is read again `shift` positions later comes from the L2 cache, whose distance is
shift * D numbers. Nothing stays in a cache from one launch to the next. Every position reads where its document begins.

Passes over memory of B S D numbers, both passes together: 5 here (u, y; gradient, u, its gradient), and by operators one after the other 9
forward and about as many backward. With the norm inside (x read, y written; x, gradient and x's gradient backward) a layer's norm and mix
would be 5 in place of 10: docs/log.md has why they are not one.
"""

from dataclasses import dataclass

from kernels.traffic import Pass, Traffic, examples

FLOAT, INT = 4, 4  # factors and sums; where documents begin
BLOCK_S = 32


@dataclass(frozen=True, kw_only=True)
class Shape:
    """B rows of S positions of width D, X factors; itemsize: bytes of a number of u."""

    batch: int
    length: int
    width: int
    factors: int
    itemsize: int
    documents: bool = True

    @property
    def row_bytes(self) -> int:
        """Of u."""
        return self.batch * self.length * self.width * self.itemsize

    @property
    def small_bytes(self) -> int:
        """Both factors, and the documents."""
        return 2 * self.factors * FLOAT + self.documents * self.batch * self.length * INT

    @property
    def sum_bytes(self) -> int:
        """Of the sums for a and b by block and channel."""
        return self.batch * -(-self.length // BLOCK_S) * 2 * self.width * FLOAT


def forward(shape: Shape) -> dict[str, Traffic]:
    """By launch."""
    return {"mix": Traffic(shape.row_bytes + shape.small_bytes, shape.row_bytes)}


def backward(shape: Shape) -> dict[str, Traffic]:
    """By launch, with the gradients of u, a and b. The second stage of the sums is torch's and not counted: it reads `sum_bytes`."""
    return {"backward": Traffic(2 * shape.row_bytes + shape.small_bytes, shape.row_bytes + shape.sum_bytes)}


def forward_bound(shape: Shape) -> int:
    """What any implementation reads and writes: inputs once, results once, nothing between."""
    return 2 * shape.row_bytes + shape.small_bytes


def backward_bound(shape: Shape) -> int:
    """The same inputs and the gradient; the gradients of u and of the factors."""
    return 3 * shape.row_bytes + shape.small_bytes + 2 * shape.factors * FLOAT


def passes(shape: Shape) -> dict[str, Pass]:
    return {
        "forward": Pass(forward(shape), forward_bound(shape)),
        "backward": Pass(backward(shape), backward_bound(shape)),
    }


def step(*, batch: int, width: int, factors: int, itemsize: int) -> Traffic:
    """Of a decoded token of each row: the token and the earlier one read; the result and the token written."""
    return Traffic(2 * batch * width * itemsize + 2 * factors * FLOAT, 2 * batch * width * itemsize)


def saved(shape: Shape) -> int:
    """Bytes that wait for the backward pass, without the factors."""
    return shape.row_bytes + shape.documents * shape.batch * shape.length * INT


def flops(shape: Shape, *, backward: bool) -> int:
    """Two products and a sum of each number; backward four and three."""
    numbers = shape.batch * shape.length * shape.width
    return (3 + 7) * numbers if backward else 3 * numbers


SHAPES = {
    "fp32, D 412": Shape(batch=64, length=256, width=412, factors=1, itemsize=4),
    "bf16, D 1,024": Shape(batch=16, length=1024, width=1024, factors=1, itemsize=2),
}
EXAMPLES = [
    example
    for name, shape in SHAPES.items()
    for example in examples(name, passes(shape), tokens=shape.batch * shape.length)
]
