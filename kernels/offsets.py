"""Finds products in a compiled kernel that count elements in 32 bits: addresses that go wrong in tensors of more than 2**31 elements.

Owns: the rule, and the operations of Triton's intermediate language (TTIR) that it needs. Does not own: reading the text
(kernels/ttir.py), compiling (kernels/tools.py), which products are right all the same (tests/kernels/test_compiled.py).
Called by: kernels/tools.py; never by the program.

The rule. Rows, copies and tokens are fewer than 2**31, elements are not. So in 32 bits a number that grows with the problem (a program's,
an argument of the launch, what was loaded, and whatever is made of them) may be multiplied on its way to an address by a block alone, a
power of two up to 256, and once: that is the place of a row. A loop may add a block alone to what it carries. Any other product or such
sum, of a width or a number of rows, is taken in 64 bits, and not cut to 32 afterwards. What is known without the launch, such as a tile's
rows times its width, may be taken in 32.

What is not seen. A width that could be a block goes unnoticed, so each kernel needs a form with another. A quotient, a remainder, some
bits, a reduction, an argument and what was loaded count as numbers of rows: a block may multiply them, and they may be cut to 32 bits.
Not listed here, an operation behind an address is an error; so is an address that tt.addptr does not make, and a helper not inlined.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from kernels.ttir import Kernel, Made

MAX_BLOCK = 256
NARROW = re.compile(r" : (?:tensor<[\dx]+x)?i(?:8|16|32)\b")
# Made of nothing that matters here.
SOURCES = ("tt.func", "arith.constant", "tt.make_range", "tt.get_program_id", "tt.load", "arith.cmpi")
SHAPED = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.gather")
SAME = ("arith.extsi", "arith.extui", "arith.trunci", *SHAPED, "carried")
LARGEST = ("arith.select", "arith.maxsi", "arith.minsi", "counter")
PRODUCTS = ("arith.muli", "arith.shli")
SUMS = ("arith.addi", "arith.subi")
# A number of elements stays one, or becomes a number of rows.
KEPT = (*SAME, *LARGEST, *PRODUCTS, *SUMS)
ROWS = ("arith.divsi", "arith.remsi", "arith.shrsi", "arith.andi", "arith.ori", "tt.reduce", "tt.scan", "tt.histogram")
# Make addresses without tt.addptr.
ELSEWHERE = ("tt.call", "tt.make_tensor_ptr", "tt.make_tensor_descriptor", "tt.int_to_ptr")


@dataclass(frozen=True)
class Products:
    """Places of products and of sums in a loop, as "kernels/...:line:column" of the source; "#2" behind the second of one column.

    narrow: those that break the rule. seen: in 64 bits, and would break it in 32. hidden: in 64 bits, and would not, since a block
    multiplies or is added.
    """

    narrow: frozenset[str] = frozenset()
    seen: frozenset[str] = frozenset()
    hidden: frozenset[str] = frozenset()

    def __or__(self, other: "Products") -> "Products":
        return Products(self.narrow | other.narrow, self.seen | other.seen, self.hidden | other.hidden)


def products(ttir: str) -> Products:
    """Those behind the addresses of a kernel. ttir: its text, with locations."""
    return _Offsets(Kernel(ttir)).products()


class _Offsets:
    """What the offsets of a kernel's pointers are made of."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._bounds: dict[str, float] = {}
        self._kept: dict[str, set[str]] = {}
        for operation in kernel.operations.keys() & ELSEWHERE:
            raise self._unknown(operation, kernel.operations[operation])

    def products(self) -> Products:
        behind = self._made_of(self.kernel.offsets, through=(*KEPT, *ROWS))
        ways = [(value, made) for value in behind for made in self.kernel.ways[value]]
        cut = set[str]().union(
            *(self._elements(made.operands[0]) for _, made in ways if made.operation == "arith.trunci")
        )
        narrow, seen, hidden = set[str](), set[str](), set[str]()
        for value, made in ways:
            is_narrow, counts = value in cut or NARROW.search(made.line), self._counts_elements(value, made)
            if is_narrow and counts:
                narrow.add(self._place(made))
            elif not is_narrow and (self._is_large(made) or self._repeated(value, made)):
                (seen if counts else hidden).add(self._place(made))
        return Products(frozenset(narrow), frozenset(seen), frozenset(hidden))

    def _place(self, made: Made) -> str:
        """With a number behind it where other products of one place are factors, as in `row * a * b`, whose two begin in one column."""
        place = self.kernel.place(made.line)
        if made.operation not in PRODUCTS:
            return place
        factors = set[str]().union(*map(self._elements, made.operands))
        ways = [way for value in factors for way in self.kernel.ways[value] if way is not made and self._is_large(way)]
        inner = sum(self.kernel.place(way.line) == place for way in ways)
        return place + f"#{inner + 1}" * (inner > 0)

    def _counts_elements(self, value: str, made: Made) -> bool:
        """Whether a product, or a sum that a loop repeats, may be more than the place of a row."""
        if made.operation in SUMS:
            return any(not _is_block(self._bound(step)) for step in self._repeated(value, made))
        if not self._is_large(made):
            return False
        pairs = [made.operands] if made.operation == "arith.shli" else _both_ways(made)
        return all(not _is_block(self._factor(made, block)) or self._multiplied(row) for row, block in pairs)

    def _multiplied(self, value: str) -> bool:
        """Whether a number that grows with the problem is multiplied on its way to the value."""
        return any(self._is_large(made) for each in self._elements(value) for made in self.kernel.ways[each])

    def _is_large(self, made: Made) -> bool:
        """Whether it is a product that grows with the problem."""
        return made.operation in PRODUCTS and self._bound_of(made) >= 2**31

    def _repeated(self, value: str, made: Made) -> list[str]:
        """What a loop adds again and again to the value, if this is such a sum."""
        if made.operation not in SUMS:
            return []
        return [step for step, total in _both_ways(made) if value in self._elements(total)]

    def _elements(self, value: str) -> set[str]:
        """The values of which this one is a sum, a product or a choice."""
        if value not in self._kept:
            self._kept[value] = self._made_of([value], through=KEPT)
        return self._kept[value]

    def _made_of(self, values: Iterable[str], *, through: tuple[str, ...]) -> set[str]:
        """The values, and all that they are made of by operations of `through`."""
        seen, waiting = set[str](), list(values)
        while waiting:
            value = waiting.pop()
            for made in self.kernel.ways[value] if value not in seen else []:
                if made.operation not in (*SOURCES, *KEPT, *ROWS):
                    raise self._unknown(made.operation, made.line)
                waiting += made.operands if made.operation in through else []
            if not self.kernel.ways[value]:
                raise RuntimeError(
                    f"TTIR must say how {value} is made, which is behind an address: see kernels/ttir.py"
                )
            seen.add(value)
        return seen

    def _bound(self, value: str) -> float:
        """The largest magnitude that the value can have, whatever the launch; at least 1, since 0 times inf is no number."""
        if value not in self._bounds:
            self._bounds[value] = inf  # of what is made of itself
            self._bounds[value] = max(1.0, *map(self._bound_of, self.kernel.ways[value]))
        return self._bounds[value]

    def _bound_of(self, made: Made) -> float:
        if made.operation == "arith.constant":
            number = re.search(r" (?:dense<)?(-?\d+)>? :", made.line)
            return abs(float(number[1])) if number else inf
        if made.operation == "tt.make_range":
            return float(made.line.split("end = ")[1].split(" ")[0])
        if made.operation == "arith.cmpi":
            return 1.0
        bounds = [self._bound(operand) for operand in made.operands]
        if made.operation in PRODUCTS:
            return bounds[0] * self._factor(made, made.operands[1])
        if made.operation in SUMS:
            return sum(bounds)
        if made.operation in (*SAME, "arith.divsi"):
            return bounds[0]
        return max(bounds) if made.operation in LARGEST else inf

    def _factor(self, product: Made, value: str) -> float:
        return 2.0 ** self._bound(value) if product.operation == "arith.shli" else self._bound(value)

    def _unknown(self, operation: str, line: str) -> RuntimeError:
        return RuntimeError(
            f"every operation behind an address must be in the lists of kernels/offsets.py, got {operation} at "
            f"{self.kernel.place(line)}: make the address without it, or add it there and to the tests"
        )


def _both_ways(made: Made) -> list[list[str]]:
    return [made.operands, made.operands[::-1]]


def _is_block(bound: float) -> bool:
    return bound in [2.0**n for n in range(MAX_BLOCK.bit_length())]
