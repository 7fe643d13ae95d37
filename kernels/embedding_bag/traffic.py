"""The bytes that embedding_bag moves, from the shapes.

Owns: the launches of both passes, the lower bounds. Does not own: the bytes of a launch (kernels/tables/traffic.py).
Called by: benchmarks/kernels/bench_embedding_bag.py, benchmarks/kernels/compile_table.py (the table in kernels/README.md), and the tests.

The gradient that a pass is given has the dtype of the output: the table's, outside autocast.
"""

from kernels.peer_experts.traffic import layer
from kernels.tables.traffic import FLOAT, INDEX, INT, Shape, examples_without_cache, gradient, products, sums
from kernels.traffic import Pass, Traffic


def forward(shape: Shape) -> dict[str, Traffic]:
    """By launch."""
    return {"sums": sums(shape, shape.outputs)}


def backward(shape: Shape, *, adam: bool = False) -> dict[str, Traffic]:
    """By launch, with the gradients of table and gates."""
    return {"products": products(shape, shape.outputs), **gradient(shape, shape.outputs, adam=adam)}


def forward_bound(shape: Shape) -> int:
    """What any implementation reads and writes: inputs once, the result once; of the table the rows that are read."""
    small = shape.copies * (FLOAT + shape.entry_size) + shape.outputs * INT
    return shape.touched_bytes + shape.row_bytes(shape.outputs) + small


def backward_bound(shape: Shape) -> int:
    """The same inputs, the order and the gradient; the gates' gradient, and the table's with its zeros."""
    small = shape.copies * (2 * FLOAT + INT + INDEX + shape.entry_size) + shape.outputs * INT
    return shape.touched_bytes + shape.row_bytes(shape.outputs) + small + shape.table_bytes


def passes(shape: Shape) -> dict[str, Pass]:
    return {
        "forward": Pass(forward(shape), forward_bound(shape)),
        "backward": Pass(backward(shape), backward_bound(shape)),
    }


def must_move(shape: Shape, *, backward: bool) -> int:
    """The bound where no cache holds the table's rows until they are read again."""
    return passes(shape)["backward" if backward else "forward"].bound + shape.again_bytes


def flops(shape: Shape, *, backward: bool) -> int:
    return (4 if backward else 2) * shape.copies * shape.d_model


EXAMPLES = examples_without_cache(
    "Memory+: 1,024^2 values, 4 heads, k 32, D 1,024, 8,192 tokens", passes(layer(tokens=8192)), tokens=8192
)
