"""The tables of kernels/README.md: what the compiler makes of every kernel for GPUs that are not here, and the bytes they move.

Owns: which forms and examples there are (every kernels/<op>/forms.py and traffic.py), the tables' formats, reading and writing
them. Does not own: compiling and measuring (kernels/tools.py), the models. Called by: anyone who changed a kernel, from the root of
the clone: `python -m benchmarks.kernels.compile_table` writes both; tests/kernels/test_compiled.py compares with them.
"""

import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kernels.offsets import Products

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "kernels/README.md"
START, END = "<!-- compiled: start -->", "<!-- compiled: end -->"
BYTES_START, BYTES_END = "<!-- bytes: start -->", "<!-- bytes: end -->"
BYTES_HEADER = ("op", "shape", "part", "read", "written", "lower bound", "ratio")
TARGETS = ("sm_90", "sm_80", "gfx942")
HEADER = ("op", "form", "kernel", *TARGETS)


@dataclass(frozen=True, order=True)
class Place:
    """A cell of the table. kernel: its name, with #2 for its second version in one form."""

    op: str
    form: str
    kernel: str
    target: str


@dataclass(frozen=True)
class Cell:
    """registers per thread, bytes spilled per thread, bytes of shared memory per program."""

    registers: int
    spilled: int
    shared: int

    def __str__(self) -> str:
        return f"{self.registers} / {self.spilled} / {self.shared}"


@dataclass(frozen=True)
class Report:
    """All cells, the forms (op, form) that may spill, the products behind addresses, and the bytes of the widest load and store."""

    cells: dict[Place, Cell]
    may_spill: set[tuple[str, str]]
    products: Products
    widest: dict[Place, tuple[int, int]]


def compile_all(targets: tuple[str, ...] = TARGETS) -> Report:
    """Compile every form of every op for each target, in as many processes as there are cores."""
    ops = sorted(path.parent.name for path in ROOT.glob("kernels/*/forms.py"))
    cells, may_spill, products, widest = {}, set(), Products(), {}
    # spawn: a fork of a process with threads (pytest's, torch's) may hang.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as processes:
        for part in processes.map(compile_op, *zip(*((op, target) for op in ops for target in targets), strict=True)):
            cells.update(part.cells)
            may_spill.update(part.may_spill)
            products |= part.products
            widest.update(part.widest)
    return Report(cells, may_spill, products, widest)


def compile_op(op: str, target: str) -> Report:
    from kernels.tools import compile_form

    cells: dict[Place, Cell] = {}
    widest: dict[Place, tuple[int, int]] = {}
    products = Products()
    forms = importlib.import_module(f"kernels.{op}.forms").FORMS
    for form in forms:
        seen: dict[str, int] = {}
        for compiled in compile_form(form, target=target):
            count = seen[compiled.kernel] = seen.get(compiled.kernel, 0) + 1
            name = compiled.kernel if count == 1 else f"{compiled.kernel}#{count}"
            place = Place(op, form.name, name, target)
            cells[place] = Cell(compiled.registers, compiled.spilled, compiled.shared)
            widest[place] = (compiled.loaded, compiled.stored)
            products |= compiled.products
    return Report(cells, {(op, form.name) for form in forms if form.can_spill}, products, widest)


def as_table(cells: dict[Place, Cell]) -> str:
    lines = [HEADER, ("---",) * len(HEADER)]
    for op, form, kernel in dict.fromkeys((place.op, place.form, place.kernel) for place in sorted(cells)):
        found = [cells.get(Place(op, form, kernel, target)) for target in TARGETS]
        lines.append((op, form, kernel, *(str(cell) if cell else "-" for cell in found)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_table(text: str) -> dict[Place, Cell]:
    """The cells of the table between the two marks in the text of kernels/README.md."""
    cells: dict[Place, Cell] = {}
    table = text.split(START)[1].split(END)[0].strip().splitlines()
    for line in table[2:]:
        op, form, kernel, *values = (value.strip() for value in line.strip("|").split("|"))
        for target, value in zip(TARGETS, values, strict=True):
            if value != "-":
                cells[Place(op, form, kernel, target)] = Cell(*(int(number) for number in value.split("/")))
    return cells


def bytes_table() -> str:
    """Bytes per token of every example of every op."""
    lines = [BYTES_HEADER, ("---",) * len(BYTES_HEADER)]
    for op in sorted(path.parent.name for path in ROOT.glob("kernels/*/traffic.py")):
        for each in getattr(importlib.import_module(f"kernels.{op}.traffic"), "EXAMPLES", ()):
            numbers = [f"{value / each.tokens:,.0f}" for value in (each.read, each.written, each.bound)]
            lines.append((op, each.shape, each.part, *numbers, f"{(each.read + each.written) / each.bound:.2f}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replaced(text: str, table: str, *, start: str, end: str) -> str:
    """The text with another table between two marks."""
    return f"{text.split(start)[0]}{start}\n{table}\n{end}{text.split(end)[1]}"


def main() -> None:
    text = replaced(README.read_text(), bytes_table(), start=BYTES_START, end=BYTES_END)
    README.write_text(replaced(text, as_table(compile_all().cells), start=START, end=END))


if __name__ == "__main__":
    main()
