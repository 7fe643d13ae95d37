"""The bytes and multiplications of switchhead_project, from the shapes, beside those of the routed form.

Owns: the count of every launch, the lower bound, what is saved for the backward pass. Does not own: the kernels.
Called by: benchmarks/kernels/bench_switchhead_project.py, benchmarks/kernels/compile_table.py (the table in kernels/README.md), and the
tests.

A launch reads and writes each element once: tokens that several heads read, and weights, come from the L2 cache after their first time.
Nothing stays in a cache from one launch to the next. The sort of the routes in the backward pass is not counted (kernels/sort_routes
has its bytes), nor is the turning of O's weight gradient.

What it was chosen by: forward + backward in bf16 at 16,384 tokens, without the gradient of the weights, whose launch is the same; beside
grouped_matmul on sorted copies, which multiplies by the chosen experts only and writes a result per copy before it sums them.

| shape | part | MB here | routed | GFLOP here | routed |
|---|---|---|---|---|---|
| 47M: D 412, 2 heads of 76, K 2 of 5 | V | 60 | 184 | 31 | 8 |
| 47M | O | 45 | 174 | 21 | 8 |
| 262M and 1B: D 1,024, 4 heads of 112, K 2 of 4 | V | 160 | 743 | 180 | 60 |
| 262M and 1B | O | 122 | 720 | 120 | 60 |
| 7B: D 2,048, 8 heads of 128, K 2 of 8 | V | 412 | 2,645 | 1,649 | 275 |
| 7B | O | 309 | 2,596 | 1,100 | 275 |

At 989 TFLOP/s and 3.35 TB/s the larger of the two times is the multiplications' here and the bytes' there: 182 and 222 us for V of 1B, 122
and 215 for O, but 1,668 and 790 us for V of 7B, whose heads have more experts per choice. Nothing of this is measured.
"""

from dataclasses import dataclass

from kernels.grouped_matmul import traffic as routed
from kernels.traffic import Pass, Traffic, examples

FLOAT, INT = 4, 4  # gates and their gradients; the indices of copies that are sorted here


@dataclass(frozen=True, kw_only=True)
class Shape:
    """H heads of width C with E experts each, K of them chosen; itemsize: bytes of a number, index_size: of an expert's id."""

    tokens: int
    heads: int
    experts: int
    choices: int
    d_model: int
    head_dim: int
    itemsize: int = 2
    index_size: int = 8

    @property
    def wide_bytes(self) -> int:
        """Of a row of the model width for each token."""
        return self.tokens * self.d_model * self.itemsize

    @property
    def narrow_bytes(self) -> int:
        """Of a row of the head width for each token and head."""
        return self.tokens * self.heads * self.head_dim * self.itemsize

    @property
    def matrix_bytes(self) -> int:
        return self.heads * self.experts * self.d_model * self.head_dim * self.itemsize

    @property
    def copies(self) -> int:
        return self.tokens * self.heads * self.choices

    @property
    def gate_bytes(self) -> int:
        return self.copies * FLOAT

    @property
    def route_bytes(self) -> int:
        return self.copies * self.index_size


def values_forward(shape: Shape) -> dict[str, Traffic]:
    """By launch."""
    return {"values": _to_heads(shape, values=True, dots=False)}


def values_backward(shape: Shape) -> dict[str, Traffic]:
    """By launch, with the gradients of x, weights and gates. One tile of columns is assumed for the gates'."""
    return {
        "x": _to_tokens(shape),
        "gates": _to_heads(shape, values=False, dots=True),
        **_weight_gradient(shape),
    }


def outputs_forward(shape: Shape) -> dict[str, Traffic]:
    """By launch."""
    return {"outputs": _to_tokens(shape)}


def outputs_backward(shape: Shape) -> dict[str, Traffic]:
    """By launch, with the gradients of y, weights and gates. One tile of columns is assumed for the gates'."""
    return {"y and gates": _to_heads(shape, values=True, dots=True), **_weight_gradient(shape)}


def forward_bound(shape: Shape) -> int:
    """What any implementation reads and writes, of V as of O: inputs once, results once, nothing between."""
    return shape.wide_bytes + shape.narrow_bytes + shape.matrix_bytes + shape.gate_bytes + shape.route_bytes


def backward_bound(shape: Shape, *, values: bool) -> int:
    """The same inputs and the gradient; the gradients of rows, weights and gates. values: of V, else of O."""
    results = shape.wide_bytes if values else shape.narrow_bytes
    gradient = shape.narrow_bytes if values else shape.wide_bytes
    inputs = forward_bound(shape) - gradient  # the rows, the weights, the routes; the result is not read
    return inputs + gradient + results + shape.matrix_bytes + shape.gate_bytes


def passes(shape: Shape, *, values: bool) -> dict[str, Pass]:
    """Of V, else of O."""
    forward, backward = (values_forward, values_backward) if values else (outputs_forward, outputs_backward)
    return {
        "forward": Pass(forward(shape), forward_bound(shape)),
        "backward": Pass(backward(shape), backward_bound(shape, values=values)),
    }


def saved(shape: Shape, *, values: bool) -> int:
    """Bytes that wait for the backward pass, without the weights: x or y, the gates, the experts."""
    return (shape.wide_bytes if values else shape.narrow_bytes) + shape.gate_bytes + shape.route_bytes


def flops(shape: Shape, *, backward: bool, of: str = "needed") -> int:
    """Of the forward pass, or of both passes. of: "needed", the chosen experts' products; "values" or "outputs", what is done here.

    Every launch but the weights' gradient multiplies by all experts: E / K times as much. V's gates need a product of their own in the
    backward pass, O's come from the product of y's gradient.
    """
    product = 2 * shape.tokens * shape.heads * shape.d_model * shape.head_dim
    dense, chosen = product * shape.experts, product * shape.choices
    if of == "needed":
        return 3 * chosen if backward else chosen
    launches = {"values": 2, "outputs": 1}[of]
    return dense + launches * dense + chosen if backward else dense


def by_copies(shape: Shape, *, values: bool) -> int:
    """Bytes of both passes of kernels/grouped_matmul on the sorted copies, without the gradient of the weights."""
    copies = _sorted_copies(shape, values=values, index_size=8)
    launches = routed.forward(copies) | {f"backward, {name}": each for name, each in routed.backward(copies).items()}
    weights = [f"backward, {name}" for name in routed.weight_gradient(copies)]
    return sum(each.total for name, each in launches.items() if name not in weights)


def _to_heads(shape: Shape, *, values: bool, dots: bool) -> Traffic:
    read = shape.wide_bytes + shape.matrix_bytes + shape.route_bytes
    read += values * shape.gate_bytes + dots * shape.narrow_bytes
    return Traffic(read, values * shape.narrow_bytes + dots * shape.gate_bytes)


def _to_tokens(shape: Shape) -> Traffic:
    read = shape.narrow_bytes + shape.matrix_bytes + shape.gate_bytes + shape.route_bytes
    return Traffic(read, shape.wide_bytes)


def _weight_gradient(shape: Shape) -> dict[str, Traffic]:
    """By kernels/grouped_matmul, over the chosen experts only: both sides through an index, the gates sorted."""
    return routed.weight_gradient(_sorted_copies(shape, values=True, index_size=INT))


def _sorted_copies(shape: Shape, *, values: bool, index_size: int) -> routed.Shape:
    """Every expert with as many copies, the first one with the rest."""
    num_groups = shape.heads * shape.experts
    size, rest = divmod(shape.copies, num_groups)
    ends = (shape.tokens, shape.d_model), (shape.tokens * shape.heads, shape.head_dim)
    (rows, width_in), (outputs, width_out) = ends if values else ends[::-1]
    return routed.Shape(
        sizes=(size + rest, *[size] * (num_groups - 1)), rows=rows, outputs=outputs, width_in=width_in, width_out=width_out,
        itemsize=shape.itemsize, index_size=index_size,
    )  # fmt: skip


SHAPES = {
    "47M: D 412, 2 heads of 76, K 2 of 5": Shape(tokens=16384, heads=2, experts=5, choices=2, d_model=412, head_dim=76),
    "262M and 1B: D 1,024, 4 heads of 112, K 2 of 4": Shape(
        tokens=16384, heads=4, experts=4, choices=2, d_model=1024, head_dim=112
    ),
    "7B: D 2,048, 8 heads of 128, K 2 of 8": Shape(
        tokens=16384, heads=8, experts=8, choices=2, d_model=2048, head_dim=128
    ),
}
EXAMPLES = [
    example
    for name, shape in SHAPES.items()
    for part, values in (("V", True), ("O", False))
    for example in examples(
        name, {f"{part} {name}": each for name, each in passes(shape, values=values).items()}, tokens=shape.tokens
    )
]
