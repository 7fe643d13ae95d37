"""The bytes that grouped_matmul's kernels move, from the shapes, beside the least that any kernel could move.

Owns: the count for each launch. Does not own: the kernels. Called by: benchmarks/kernels/compile_table.py, which writes the
table in kernels/README.md, and the tests, which count in the interpreter.

A tile holds all that it sums, so per-copy results are written once and summed by a second kernel: 2 N + N / K numbers per copy.
Tiles of output rows would write N / K only, and read the M x N weights of each of the rows' experts for a handful of copies.
"""

from dataclasses import dataclass

from kernels.grouped_matmul.schedule import WITHOUT_DEVICE, part_length
from kernels.traffic import Example, Pass, Traffic, examples

FLOAT, INT = 4, 4  # gates and dot products; offsets and the order of copies


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Copies of each group, R rows of width M, P output rows of width N; every row and output row has a copy.

    tile: rows and columns; weight_tile: of the weights' gradient, and the copies of a step; sum_tile: of a program of the sum;
    sum_block: numbers that a program of the sum of parts owns.
    """

    sizes: tuple[int, ...]
    rows: int
    outputs: int
    width_in: int
    width_out: int
    itemsize: int = 2
    index_size: int = 8
    tile: tuple[int, int] = (64, 128)
    weight_tile: tuple[int, int, int] = (128, 128, 64)
    sum_tile: tuple[int, int] = (16, 128)
    sum_block: int = 1024

    @property
    def copies(self) -> int:
        return sum(self.sizes)

    @property
    def used_weights(self) -> int:
        """Bytes of the matrices that a copy meets."""
        return sum(1 for size in self.sizes if size) * self.width_in * self.width_out * self.itemsize

    @property
    def per_copy(self) -> int:
        """Bytes of gates and of both indices."""
        return self.copies * (FLOAT + 2 * self.index_size)


def forward(shape: Shape) -> dict[str, Traffic]:
    """By launch, with indices on both sides and gates."""
    columns = -(-shape.width_out // shape.tile[1])
    small = shape.copies * (FLOAT + shape.index_size)
    product = Traffic(
        asked=_rows(shape, shape.width_in) * columns + _weights(shape) + small * columns + _offsets(shape, columns),
        read=shape.rows * shape.width_in * shape.itemsize + shape.used_weights + small + len(shape.sizes) * INT,
        written=_rows(shape, shape.width_out),
    )
    return {"product": product, "sum": _sum(shape, shape.outputs, shape.width_out)}


def backward(shape: Shape) -> dict[str, Traffic]:
    """By launch, without an activation; the gates' gradient comes with that of the rows."""
    columns = -(-shape.width_in // shape.tile[1])
    gradient = shape.outputs * shape.width_out * shape.itemsize
    rows = shape.rows * shape.width_in * shape.itemsize
    offsets = len(shape.sizes) * INT
    row_gradient = Traffic(
        asked=_rows(shape, shape.width_out) * columns
        + _rows(shape, shape.width_in)
        + _weights(shape)
        + shape.per_copy * columns
        + _offsets(shape, columns),
        read=gradient + rows + shape.used_weights + shape.per_copy + offsets,
        written=_rows(shape, shape.width_in) + shape.copies * FLOAT * columns,
    )
    return {
        "row gradient": row_gradient,
        "sum": _sum(shape, shape.rows, shape.width_in),
        **weight_gradient(shape),
    }


def weight_gradient(shape: Shape) -> dict[str, Traffic]:
    """By launch, with gates: one that writes the gradient, or one that writes the float32 sums of parts and one that adds them."""
    rows, columns, step = shape.weight_tile
    row_tiles, column_tiles = -(-shape.width_in // rows), -(-shape.width_out // columns)
    tiles, groups, numbers = row_tiles * column_tiles, len(shape.sizes), shape.width_in * shape.width_out
    ends = (shape.rows * shape.width_in + shape.outputs * shape.width_out) * shape.itemsize
    length = part_length(copies=shape.copies, groups=groups, tiles=tiles, block=step)
    parts = groups if length is None else sum(-(-size // length) for size in shape.sizes)
    # A program reads where its group starts and ends; to find the group of a part, all starts and ends.
    programs = 1 if length is None else -(-shape.copies // length) + groups
    product = Traffic(
        asked=_rows(shape, shape.width_in) * column_tiles
        + _rows(shape, shape.width_out) * row_tiles
        + shape.per_copy * tiles
        + programs * (2 * groups - 1) * INT * tiles,
        read=ends + shape.per_copy + groups * INT,
        written=parts * numbers * (shape.itemsize if length is None else FLOAT),
    )
    if length is None:
        return {"weight gradient": product}
    written = parts * numbers * FLOAT
    # A program of group g reads the ends of 0 to g and the starts of 1 to g.
    places = groups * groups * -(-numbers // shape.sum_block) * INT
    sums = Traffic(asked=written + places, read=written + groups * INT, written=groups * numbers * shape.itemsize)
    return {"weight gradient": product, "sum of parts": sums}


def forward_bound(shape: Shape) -> int:
    """Rows, weights, gates and both indices read once, output rows written once."""
    ends = shape.rows * shape.width_in + shape.outputs * shape.width_out
    return ends * shape.itemsize + shape.used_weights + shape.per_copy


def backward_bound(shape: Shape) -> int:
    """The same read once, and the gradient; the gradients of rows, weights and gates written once."""
    ends = 2 * shape.rows * shape.width_in + shape.outputs * shape.width_out
    written = len(shape.sizes) * shape.width_in * shape.width_out * shape.itemsize + shape.copies * FLOAT
    return ends * shape.itemsize + shape.used_weights + shape.per_copy + written


def passes(shape: Shape) -> dict[str, Pass]:
    return {
        "forward": Pass(forward(shape), forward_bound(shape)),
        "backward": Pass(backward(shape), backward_bound(shape)),
    }


def _rows(shape: Shape, width: int) -> int:
    return shape.copies * width * shape.itemsize


def _weights(shape: Shape) -> int:
    """Every tile of rows reads all of its group's matrix, in as many column tiles as there are."""
    tiles = sum(-(-size // shape.tile[0]) for size in shape.sizes)
    return tiles * shape.width_in * shape.width_out * shape.itemsize


def _offsets(shape: Shape, columns: int) -> int:
    """For each tile, and once for their number, a program reads the ends of all groups, and all but the last again as starts."""
    groups = len(shape.sizes)
    most = columns * (-(-shape.copies // shape.tile[0]) + min(groups, shape.copies))
    tiles = columns * sum(-(-size // shape.tile[0]) for size in shape.sizes)
    return (min(WITHOUT_DEVICE, most) + tiles) * (2 * groups - 1) * INT


def _sum(shape: Shape, num_rows: int, width: int) -> Traffic:
    """kernels/sum_copies: each copy once, its place in the order, and where each row's copies end."""
    blocks = -(-width // shape.sum_tile[1])
    copies = _rows(shape, width)
    return Traffic(
        asked=copies + (shape.copies + 2 * num_rows - 1) * INT * blocks,
        read=copies + (shape.copies + num_rows) * INT,
        written=num_rows * width * shape.itemsize,
    )


def _examples(
    name: str, *, tokens: int, heads: int = 1, choices: int, groups: int, width_in: int, width_out: int
) -> list[Example]:
    """Both passes in bf16, every group with as many copies. A token has `heads` output rows of `choices` copies each."""
    size = tokens * heads * choices // groups
    shape = Shape(sizes=(size,) * groups, rows=tokens, outputs=tokens * heads, width_in=width_in, width_out=width_out)
    return examples(name, passes(shape), tokens=tokens)


EXAMPLES = [
    *_examples("D 512 to 128, K 4 of 64", tokens=4096, choices=4, groups=64, width_in=512, width_out=128),
    *_examples("D 128 to 512, K 4 of 64", tokens=4096, choices=4, groups=64, width_in=128, width_out=512),
    *_examples(
        "D 1,024 to 64, 16 heads, K 2 of 5", tokens=4096, heads=16, choices=2, groups=80, width_in=1024, width_out=64
    ),
]
