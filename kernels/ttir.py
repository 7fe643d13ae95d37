"""Reads a compiled kernel in Triton's intermediate language (TTIR): how each value is made, and what is added to pointers.

Owns: the text, and what loops, branches and blocks carry. Does not own: what the operations mean (kernels/offsets.py). Called by:
kernels/offsets.py.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
OPERATION = re.compile(r'( *)(?:(%[\w$.-]+)(?::(\d+))? = )?"?([a-z]+\.[\w.]+)(.*)')
BLOCK = re.compile(r"( *)(\^bb\d+)(.*)")
BRANCH = re.compile(r"(\^bb\d+)(?:\(([^:]*):)?")
COMBINER = re.compile(r"(?ms)\(\{$.*?^ *\}\)")  # of a reduction or a scan: no address is made there


@dataclass(frozen=True)
class Made:
    """One way in which a value comes about: an operation, or "counter" of a loop, or "carried" there by a loop or a branch."""

    operation: str
    operands: list[str]
    line: str = ""


class Kernel:
    """ways: all in which each value is made. offsets: of all pointers. A name that two regions use is told apart."""

    def __init__(self, ttir: str) -> None:
        self.ways: dict[str, list[Made]] = defaultdict(list)
        self.offsets: list[str] = []
        self.operations: dict[str, str] = {}  # a line of each
        self._latest: dict[str, str] = {}  # value of each name
        self._targets: dict[tuple[str, int], list[list[str]]] = defaultdict(
            list
        )  # of what ends a region, by its indentation
        self._places = dict(re.findall(r"(?m)^(#loc\d*) = loc\((.*)\)$", ttir))
        for line in COMBINER.sub("", ttir).splitlines():
            if found := OPERATION.match(line):
                indent, result, count, name, rest = found.groups()
                results = VALUE.findall(" ".join(f"{result}#{n}" for n in range(int(count)))) if count else [result]
                self._read(line, len(indent), results if result else [], name, rest)
            elif found := BLOCK.match(line):
                self._enter(len(found[1]), found[2], self._defined(VALUE.findall(found[3])))

    def _read(self, line: str, indent: int, results: list[str], name: str, rest: str) -> None:
        names = VALUE.findall(rest)
        values = self._values(names)
        results = self._defined(names if name == "tt.func" else results)
        if name in ("scf.yield", "scf.condition"):
            for targets in self._targets[name, indent - 2]:
                self._carry(targets, values[name == "scf.condition" :])
        elif name in ("cf.br", "cf.cond_br"):
            for label, handed in BRANCH.findall(rest):
                given = self._values(VALUE.findall(handed))
                self._carry(_slots(label, given), given)
        elif name == "scf.for":  # counter, first, end, step, and pairs of what it carries and the first value of that
            (counter,), carried = self._defined(names[:1]), self._defined(names[4::2])
            self.ways[counter].append(Made("counter", values[1:3]))
            self._targets["scf.yield", indent] = [carried, results]
            self._carry(carried, values[5::2])
            self._carry(results, values[5::2])
        elif name == "scf.while":
            carried = self._defined(names[::2])
            self._targets["scf.yield", indent], self._targets["scf.condition", indent] = [carried], [results]
            self._carry(carried, values[1::2])
        elif name == "scf.if":
            self._targets["scf.yield", indent] = [results]
        else:
            for value in results:  # an argument of a function is made of nothing; a choice not of what it is made by
                operands = [] if name == "tt.func" else values[name == "arith.select" :]
                self.ways[value].append(Made(name, operands, line))
            self.operations[name] = line
            if name == "tt.addptr":
                self.offsets.append(values[1])

    def _enter(self, indent: int, label: str, arguments: list[str]) -> None:
        if label == "^bb0":  # the second half of a while: it gets what the results get; no branch leads to a ^bb0
            for results in self._targets["scf.condition", indent]:
                self._carry(arguments, results)
        else:
            self._carry(arguments, _slots(label, arguments))

    def _carry(self, targets: list[str], values: list[str]) -> None:
        for target, value in zip(targets, values, strict=True):
            self.ways[target].append(Made("carried", [value]))

    def _values(self, names: list[str]) -> list[str]:
        return [self._latest.get(name, name) for name in names]

    def _defined(self, names: list[str]) -> list[str]:
        for name in names:
            self._latest[name] = f"{self._latest.get(name, name)}'"
        return self._values(names)

    def place(self, line: str) -> str:
        """The innermost place of a line's location, in this clone: what is compiled may lie in a cache that another has filled."""
        waiting = [line]
        while waiting:
            text = waiting.pop()
            if found := re.search(r'"[^"]*/(kernels/[^"]+:\d+:\d+)', text.replace('":', ":")):
                return found[1]
            waiting += [self._places[each] for each in reversed(re.findall(r"#loc\d*", text)) if each in self._places]
        raise RuntimeError(
            f"TTIR must say where in kernels/ each product comes from, got {line.strip()}: unset TRITON_DISABLE_LINE_INFO"
        )


def _slots(label: str, values: list[str]) -> list[str]:
    """Names of what the block of that label is handed, as many as the values."""
    return [f"{label}#{number}" for number in range(len(values))]
