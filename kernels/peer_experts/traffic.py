"""The bytes that peer_experts moves, from the shapes: what its design was chosen by, and what a benchmark divides by.

Owns: the launches of both passes, the lower bounds, what is saved for the backward pass. Does not own: the bytes of a launch
(kernels/tables/traffic.py). Called by: benchmarks/kernels/bench_peer_experts.py, benchmarks/kernels/compile_table.py (the table in
kernels/README.md), and the tests.

1,024^2 experts, h 8, k 16, D 1,024 in bf16, 8,192 tokens that choose alike, GB: forward 4.36 where each copy reads its two rows, 2.78
where each row is read once; gathering the rows first writes and reads 8.59 more. Backward: 4.37 and 2.79 for the tokens; 7.36 for
the tables, of which 4.29 are zeros and 2.71 the rows that were touched: a dense gradient is most of a step of few tokens. Adam in
the same launches, on float32 tables, moves 33.0 and takes the place of the gradients and of a dense pass of 60.1 over them, weights and
moments.
"""

from kernels.tables.traffic import (
    FLOAT,
    INDEX,
    INT,
    Shape,
    examples_without_cache,
    expected_touched,
    gradient,
    products,
    sums,
)
from kernels.traffic import Pass, Traffic


def forward(shape: Shape) -> dict[str, Traffic]:
    """By launch."""
    return {
        "products": products(shape, shape.rows, read_per_copy=1, written_per_copy=2),
        "sums": sums(shape, shape.outputs),
    }


def backward(shape: Shape, *, adam: bool = False) -> dict[str, Traffic]:
    """By launch, with the gradients of rows, up, down and gates."""
    found = {
        "products": products(shape, shape.outputs, read_per_copy=2, written_per_copy=3),
        "sums": sums(shape, shape.rows),
    }
    for name, num_rows in (("up", shape.rows), ("down", shape.outputs)):
        found |= {f"{name}, {part}": each for part, each in gradient(shape, num_rows, adam=adam).items()}
    return found


def forward_bound(shape: Shape) -> int:
    """What any implementation reads and writes: inputs once, results once, nothing between; of the tables the rows that are read."""
    small = shape.copies * (FLOAT + shape.entry_size) + (shape.rows + shape.outputs) * INT
    return 2 * shape.touched_bytes + shape.row_bytes(shape.rows) + shape.row_bytes(shape.outputs) + small


def backward_bound(shape: Shape) -> int:
    """The same inputs, z, the order and the gradient; the gradients of rows and gates, and both tables' with their zeros."""
    small = shape.copies * (3 * FLOAT + INT + 2 * INDEX + shape.entry_size) + (shape.rows + shape.outputs) * INT
    rows = 2 * shape.row_bytes(shape.rows) + shape.row_bytes(shape.outputs)
    return 2 * shape.touched_bytes + rows + small + 2 * shape.table_bytes


def passes(shape: Shape) -> dict[str, Pass]:
    return {
        "forward": Pass(forward(shape), forward_bound(shape)),
        "backward": Pass(backward(shape), backward_bound(shape)),
    }


def must_move(shape: Shape, *, backward: bool) -> int:
    """The bound where no cache holds a table's rows until they are read again: the figure that a share of the bandwidth is taken of."""
    return passes(shape)["backward" if backward else "forward"].bound + 2 * shape.again_bytes


def saved(shape: Shape) -> int:
    """Bytes that wait for the backward pass: rows, gates, z, routes. Without the tables. Received rows are output rows."""
    routes = shape.copies * (shape.entry_size + INDEX + INT) + shape.rows * INT
    return shape.row_bytes(shape.rows) + 2 * shape.copies * FLOAT + routes


def flops(shape: Shape, *, backward: bool) -> int:
    return (8 if backward else 4) * shape.copies * shape.d_model


def layer(*, tokens: int, choices: int = 128, entries: int = 1024**2, d_model: int = 1024) -> Shape:
    """A layer on one rank, in bf16, whose tokens choose alike."""
    copies = tokens * choices
    touched = expected_touched(entries=entries, copies=copies)
    return Shape(copies=copies, rows=tokens, outputs=tokens, entries=entries, touched=touched, d_model=d_model)


EXAMPLES = [
    example
    for tokens in (8192, 65536)
    for example in examples_without_cache(
        f"1,024^2 experts, h 8, k 16, D 1,024, {tokens:,} tokens", passes(layer(tokens=tokens)), tokens=tokens
    )
]
