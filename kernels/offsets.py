"""Finds products in a compiled kernel that count elements in 32 bits: addresses that go wrong in tensors of more than 2**31 elements.

Owns: the rule, and as much of Triton's intermediate language (TTIR) as it needs. Does not own: compiling (kernels/tools.py), which
products are right all the same (tests/kernels/test_compiled.py). Called by: kernels/tools.py; never by the program.

The rule. Rows, copies and tokens are fewer than 2**31, elements are not. So in 32 bits a number that grows with the problem (a program's,
an argument of the launch, what was loaded, and whatever is made of them) may be multiplied on its way to an address by a block alone, a
power of two up to 256: that is the place of a row. Its product with anything else, a width or a number of rows, is taken in 64 bits.
What is known without the launch, such as a tile's rows times its width, may be taken in 32. A width that could be a block goes unnoticed,
so each kernel needs a form with another.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from math import inf

MAX_BLOCK = 256
VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
OPERATION = re.compile(r'( *)(?:(%[\w$.-]+)(?::(\d+))? = )?"?((?:tt|arith|scf|math|cf|ub)\.[\w.]+)(.*)')
NARROW = re.compile(r" : (?:tensor<[\dx]+x)?i32\b")
COMBINER = re.compile(r"(?ms)\(\{$.*?^ *\}\)")  # of a reduction or a scan: no address is made there
BLOCK = re.compile(r"( *)\^bb\d+\((.*)")
SOURCES = ("arith.cmpi", "arith.cmpf", "tt.get_program_id", "tt.load")  # are not made of their operands
SAME = ("arith.extsi", "arith.extui", "arith.trunci", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.trans")
PRODUCTS = ("arith.muli", "arith.shli")
LARGEST = ("arith.select", "arith.maxsi", "arith.minsi", "counter")


@dataclass(frozen=True)
class _Made:
    """One way in which a value comes about: an operation, or "counter" of a loop, or "region": what a loop or a branch carries."""

    operation: str
    operands: list[str]
    line: str = ""


class _Kernel:
    """How each value is made. Sibling regions may use a name twice: it is then made in two ways."""

    def __init__(self, ttir: str) -> None:
        self.ways: dict[str, list[_Made]] = defaultdict(list)
        self.offsets: list[str] = []
        self._bounds: dict[str, float] = {}
        regions: dict[int, list[str]] = {}  # by indentation: all that the last loop or branch there may carry
        for line in COMBINER.sub("", ttir).splitlines():
            if found := OPERATION.match(line):
                indent, result, count, name, rest = found.groups()
                results = [result] if count is None else [f"{result}#{number}" for number in range(int(count))]
                self._read(line, len(indent), results, name, VALUE.findall(rest), regions)
            elif found := BLOCK.match(line):
                for value in VALUE.findall(found[2]):
                    self.ways[value].append(_Made("region", regions.get(len(found[1]), [])))

    def _read(
        self, line: str, indent: int, results: list[str], name: str, values: list[str], regions: dict[int, list[str]]
    ) -> None:
        if name in ("scf.yield", "scf.condition"):
            regions[indent - 2] += values
        elif name in ("scf.for", "scf.while", "scf.if"):
            if name == "scf.for":  # counter, first, end, step
                self.ways[values[0]].append(_Made("counter", values[1:3]))
                values = values[4:]
            carried, regions[indent] = ([], []) if name == "scf.if" else (values[::2], values[1::2])
            for value in carried + results:
                self.ways[value].append(_Made("region", regions[indent]))
        else:
            for value in results:
                self.ways[value].append(_Made(name, values, line))
            if name == "tt.addptr":
                self.offsets.append(values[1])

    def behind_offsets(self) -> list[_Made]:
        """All that the offsets of pointers are made of."""
        found, seen, waiting = [], set(), list(self.offsets)
        while waiting:
            value = waiting.pop()
            for made in self.ways[value] if value not in seen else []:
                found.append(made)
                waiting += [] if made.operation in SOURCES else made.operands
            seen.add(value)
        return found

    def factors(self, product: _Made) -> tuple[float, float]:
        """Bounds of what is multiplied."""
        left, right = map(self.bound, product.operands)
        return left, 2.0**right if product.operation == "arith.shli" else right

    def bound(self, value: str) -> float:
        """The largest magnitude that the value can have, whatever the launch."""
        if value not in self._bounds:
            self._bounds[value] = inf  # of what is made of itself
            self._bounds[value] = max(map(self._bound, self.ways[value]), default=inf)
        return self._bounds[value]

    def _bound(self, made: _Made) -> float:
        if made.operation == "arith.constant":
            number = re.search(r" (?:dense<)?(-?\d+)>? :", made.line)
            return float(abs(int(number[1]))) if number else inf
        if made.operation == "tt.make_range":
            return float(made.line.split("end = ")[1].split(" ")[0])
        if made.operation in PRODUCTS:
            return _product(*self.factors(made))
        bounds = [self.bound(operand) for operand in made.operands]
        if made.operation in ("arith.addi", "arith.subi"):
            return sum(bounds)
        if made.operation in (*SAME, "arith.divsi"):
            return bounds[0]
        return max(bounds) if made.operation in LARGEST else inf


def narrow_products(ttir: str) -> tuple[str, ...]:
    """Where a kernel breaks the rule: "kernels/...:line" of its source, sorted. ttir: its text, with locations."""
    kernel, found = _Kernel(ttir), set()
    for made in kernel.behind_offsets():
        if made.operation not in PRODUCTS or not NARROW.search(made.line):
            continue
        factors = kernel.factors(made)
        if _product(*factors) >= 2**31 and not any(map(_is_block, factors)):
            found.add(_place(made.line, ttir))
    return tuple(sorted(found))


def _product(left: float, right: float) -> float:
    return 0.0 if 0.0 in (left, right) else left * right


def _is_block(bound: float) -> bool:
    return bound in [2.0**n for n in range(MAX_BLOCK.bit_length())]


def _place(line: str, ttir: str) -> str:
    """The innermost place of a line's location, in this clone: what is compiled may lie in a cache that another has filled."""
    places, waiting = dict(re.findall(r"(?m)^(#loc\d*) = loc\((.*)\)$", ttir)), [line]
    while waiting:
        text = waiting.pop()
        if found := re.search(r'"[^"]*/(kernels/[^"]+)":(\d+):\d+', text):
            return f"{found[1]}:{found[2]}"
        waiting += [places[each] for each in reversed(re.findall(r"#loc\d*", text)) if each in places]
    raise RuntimeError(
        f"TTIR must say where in kernels/ each product comes from, got {line.strip()}: unset TRITON_DISABLE_LINE_INFO"
    )
