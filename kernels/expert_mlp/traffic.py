"""The bytes that expert_mlp moves, from the shapes: what its design was chosen by, and what a benchmark divides by.

Owns: the count of every launch, of what it is compared with, and of what is saved for the backward pass. Does not own: the kernels.
Called by: benchmarks/kernels/bench_expert_mlp.py, benchmarks/kernels/compile_table.py (the table in kernels/README.md), and the tests.

A launch reads and writes each element once: a row that several copies read comes from the L2 cache after its first time, as the weights
do. Nothing stays in a cache from one launch to the next. The sorts of the routes are not counted.

For rows that is the work of the order of tiles (kernels/grouped_matmul/tiles.py). 32,768 rows of D 1024 are 67 MB, an H100's L2 has 52.
MB of rows that the forward pass at the 262M shape reads from memory, where the cache keeps what was last used of rows and results
and all the weights (17 MB; the order is taken while they fit in half of it):
- Tiles by their place in the rows: 67, and 67 where the experts are chosen by Zipf's law.
- Tile j of every group, then tile j + 1: 67 and 217, since the groups that few chose run ahead.
- One group after the other, as where the weights do not fit: 220 and 244.

What was chosen by it, in MB of a forward pass in bf16, 47M (16,384 tokens, D 412, 16 experts of 128, k 4) and 262M (32,768, D 1024, 32
experts of 128, k 4); lower bound 32 and 154:
- Hidden activations held in the tile: 139 and 690. Written and read again: 173 and 757, so only where F is too wide for a tile; several
  blocks of F would each write D numbers per copy.
- Results per copy and a kernel that sums them: the 139 and 690. Programs that own 128 tokens and add up in place: 460 and 4,431, because
  each reads the weights of nearly all groups.
- Results per copy in the dtype of the rows: in fp32 they would be 247 and 1,227, for one of the two roundings of a sum.
- The hidden activations made again in the backward pass: keeping them moves 20 MB more, and 1 MB less, over both passes, and holds 17 and
  34 MB more; it saves a seventh of the multiplications of a training step. Hence a setting, off.
"""

from dataclasses import dataclass

from kernels.grouped_matmul.schedule import part_length
from kernels.traffic import Pass, Traffic, examples

FLOAT, INT, INDEX = 4, 4, 8  # gates and factors; offsets and RowCopies; the indices of a plan (int64)


@dataclass(frozen=True)
class Shape:
    """C copies of R rows that add to P output rows, L groups of D x F; itemsize: bytes of a number. Every row has a copy."""

    copies: int
    rows: int
    outputs: int
    groups: int
    d_model: int
    expert_dim: int
    itemsize: int

    @property
    def row_bytes(self) -> int:
        return self.rows * self.d_model * self.itemsize

    @property
    def output_bytes(self) -> int:
        return self.outputs * self.d_model * self.itemsize

    @property
    def matrix_bytes(self) -> int:
        """Of up, or of down."""
        return self.groups * self.d_model * self.expert_dim * self.itemsize

    @property
    def wide_bytes(self) -> int:
        """Of D numbers per copy."""
        return self.copies * self.d_model * self.itemsize

    @property
    def hidden_bytes(self) -> int:
        """Of F numbers per copy."""
        return self.copies * self.expert_dim * self.itemsize


def forward(shape: Shape, *, held: bool, keep_hidden: bool = False, factors: bool = False) -> dict[str, Traffic]:
    """By launch. held: a tile holds all of F, so the hidden activations do not pass through memory."""
    small = shape.copies * (FLOAT + INDEX) + shape.groups * INT + factors * shape.copies * shape.expert_dim * FLOAT
    kept = keep_hidden * shape.hidden_bytes
    sums = _sum(shape, num_rows=shape.outputs)
    if held:
        read = shape.row_bytes + 2 * shape.matrix_bytes + small
        return {"forward": Traffic(read, shape.wide_bytes + kept), "sum": sums}
    return {
        "forward": Traffic(shape.row_bytes + shape.matrix_bytes + small, shape.hidden_bytes + kept),
        "project": _project(shape),
        "sum": sums,
    }


def backward(shape: Shape, *, held: bool, keep_hidden: bool = False, factors: bool = False) -> dict[str, Traffic]:
    """By launch, with the gradients of rows, up, down and gates. One block of F is assumed for the gates' where not held."""
    read = shape.output_bytes + shape.matrix_bytes + shape.copies * (FLOAT + INDEX) + shape.groups * INT
    read += factors * shape.copies * shape.expert_dim * FLOAT
    read += shape.hidden_bytes if keep_hidden else shape.row_bytes + shape.copies * INDEX
    read += shape.matrix_bytes if held or not keep_hidden else 0
    written = 2 * shape.hidden_bytes + shape.copies * FLOAT
    launches = {"backward": Traffic(read, written + held * shape.wide_bytes)}
    if not held:
        launches["project"] = _project(shape)
    launches["sum"] = _sum(shape, num_rows=shape.rows)
    small = shape.copies * INDEX + shape.groups * INT
    launches |= _weight_gradient(shape, "up", read=shape.row_bytes + shape.hidden_bytes + small)
    return launches | _weight_gradient(shape, "down", read=shape.output_bytes + shape.hidden_bytes + small)


def _weight_gradient(shape: Shape, name: str, *, read: int) -> dict[str, Traffic]:
    """With groups of equal size, whose copies are cut into parts where groups and tiles are too few to fill a GPU."""
    tile, step = (64, 32) if shape.itemsize == 4 else (128, 64)
    tiles = -(-shape.d_model // tile) * -(-shape.expert_dim // tile)
    length = part_length(copies=shape.copies, groups=shape.groups, tiles=tiles, block=step)
    if length is None:
        return {name: Traffic(read, shape.matrix_bytes)}
    parts = shape.groups * -(-shape.copies // (shape.groups * length))
    written = parts * shape.d_model * shape.expert_dim * FLOAT
    return {name: Traffic(read, written), f"{name}, sum": Traffic(written + shape.groups * INT, shape.matrix_bytes)}


def forward_bound(shape: Shape) -> int:
    """What any implementation reads and writes: inputs once, results once, nothing between."""
    small = shape.copies * (FLOAT + 2 * INDEX) + shape.groups * INT
    return shape.row_bytes + 2 * shape.matrix_bytes + shape.output_bytes + small


def backward_bound(shape: Shape) -> int:
    """The same inputs and the gradient; the gradients of rows, weights and gates."""
    return forward_bound(shape) + shape.row_bytes + 2 * shape.matrix_bytes + shape.copies * FLOAT


def passes(shape: Shape, *, keep_hidden: bool = False) -> dict[str, Pass]:
    """Where a tile holds all of F."""
    return {
        "forward": Pass(forward(shape, held=True, keep_hidden=keep_hidden), forward_bound(shape)),
        "backward": Pass(backward(shape, held=True, keep_hidden=keep_hidden), backward_bound(shape)),
    }


def saved(shape: Shape, *, keep_hidden: bool, factors: bool = False) -> int:
    """Bytes that wait for the backward pass: rows, gates, routes, factors, and the hidden activations if kept. Without the weights."""
    routes = shape.copies * (2 * INDEX + INT) + (shape.groups + shape.rows) * INT
    held = shape.row_bytes + shape.copies * FLOAT + routes + factors * shape.copies * shape.expert_dim * FLOAT
    return held + keep_hidden * shape.hidden_bytes


def token_major(shape: Shape, *, tile: int) -> int:
    """The forward pass by programs that own `tile` output rows and add up in place, all their groups' weights through the L2 cache."""
    copies_per_output = -(-shape.copies // shape.outputs)
    groups_per_tile = min(shape.groups, tile * copies_per_output)
    weights = -(-shape.outputs // tile) * groups_per_tile * 2 * shape.matrix_bytes // shape.groups
    return weights + shape.row_bytes + shape.output_bytes + shape.copies * (FLOAT + INDEX)


def flops(shape: Shape, *, backward: bool) -> int:
    """Of the products that the definition has: what is computed again does not count."""
    return 4 * shape.copies * shape.d_model * shape.expert_dim * (3 if backward else 1)


def _project(shape: Shape) -> Traffic:
    return Traffic(shape.hidden_bytes + shape.matrix_bytes + shape.groups * INT, shape.wide_bytes)


def _sum(shape: Shape, *, num_rows: int) -> Traffic:
    read = shape.wide_bytes + shape.copies * INT + num_rows * INT
    return Traffic(read, num_rows * shape.d_model * shape.itemsize)


SHAPES = {
    "47M: D 412, 16 experts of 128, K 4": Shape(65536, 16384, 16384, 16, 412, 128, 2),
    "262M: D 1,024, 32 experts of 128, K 4": Shape(131072, 32768, 32768, 32, 1024, 128, 2),
    "1B: D 1,024, 128 experts of 128, K 4": Shape(65536, 16384, 16384, 128, 1024, 128, 2),
}
EXAMPLES = [
    example
    for name, shape in SHAPES.items()
    for part in ("forward", "backward")
    for suffix, keep_hidden in (("", False), (", hidden kept", True))
    for example in examples(name, {part + suffix: passes(shape, keep_hidden=keep_hidden)[part]}, tokens=shape.rows)
]
