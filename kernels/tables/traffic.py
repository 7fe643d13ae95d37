"""The bytes of the passes over a table, from the shapes. Owns: the count of every launch, and how many places a program of by_entry.py has,
which the bytes of its parts follow from. Does not own: which launches make an operation.

Called by: kernels/peer_experts/traffic.py and kernels/embedding_bag/traffic.py; by_entry.py for the places.

`read` and `written` count each element once. A row of the table that several copies read is read for each of them where the table
is larger than the cache and its copies lie far apart: `again` counts these, what a GPU moves lies between read and read + again.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kernels.traffic import Example, Pass, Traffic, examples

FLOAT, INT, INDEX = 4, 4, 8  # numbers per copy, moments and parts; ends, the order and steps; row_C and output_C
PLACES = 128  # of a program of by_entry.py, or so many times 2 that there are no more programs than this:
MAX_PROGRAMS = (
    2**16
)  # 537 MB of parts at D 1,024; 128 places are kept up to 65,536 tokens of 128 copies, and 262,144 would take 2.1 GB


@dataclass(frozen=True, kw_only=True)
class Shape:
    """C copies of R rows that add to P output rows, L entries of which `touched` are read, D numbers each.

    row_size, table_size, entry_size: bytes of a number of rows and tables, and of an id. spanning, parts: entries whose copies span several
    programs of by_entry.py, and their parts; None for the most there can be. Every row has a copy.
    """

    copies: int
    rows: int
    outputs: int
    entries: int
    touched: int
    d_model: int
    row_size: int = 2
    table_size: int = 2
    entry_size: int = 8
    places: int = PLACES
    spanning: int | None = None
    parts: int | None = None

    @property
    def touched_bytes(self) -> int:
        """Of the rows of one table that are read at all."""
        return self.touched * self.d_model * self.table_size

    @property
    def again_bytes(self) -> int:
        return (self.copies - self.touched) * self.d_model * self.table_size

    @property
    def table_bytes(self) -> int:
        return self.entries * self.d_model * self.table_size

    @property
    def programs(self) -> int:
        """Of by_entry.py."""
        return -(-self.copies // places_for(self.copies, least=self.places))

    def row_bytes(self, num_rows: int) -> int:
        return num_rows * self.d_model * self.row_size


def places_for(copies: int, *, least: int = PLACES) -> int:
    """Sorted places of a program of by_entry.py."""
    places = least
    while -(-copies // places) > MAX_PROGRAMS:
        places *= 2
    return places


def scratch(shape: Shape) -> int:
    """Bytes of the parts that are allocated while the gradient of a table is made, or its step: two rows of float32 for each program.

    One table after the other has them. Beside them the weights of the copies wait, 4 bytes each. No prediction of a run's memory counts
    either, as it counts no activations.
    """
    return shape.programs * 2 * shape.d_model * FLOAT


def expected_touched(*, entries: int, copies: int) -> int:
    """Of entries that are chosen alike and independently."""
    return round(entries * (1.0 - (1.0 - 1.0 / entries) ** copies))


def products(shape: Shape, num_rows: int, *, read_per_copy: int = 0, written_per_copy: int = 1) -> Traffic:
    """read_per_copy, written_per_copy: numbers."""
    read = shape.touched_bytes + shape.row_bytes(num_rows) + num_rows * INT
    read += shape.copies * (shape.entry_size + read_per_copy * FLOAT)
    return Traffic(read, shape.copies * written_per_copy * FLOAT, shape.again_bytes)


def sums(shape: Shape, num_rows: int, *, size: int | None = None) -> Traffic:
    """size: bytes of a number of the result, the rows' by default."""
    read = shape.touched_bytes + shape.copies * (shape.entry_size + FLOAT) + num_rows * INT
    return Traffic(read, num_rows * shape.d_model * (size or shape.row_size), shape.again_bytes)


def gradient(shape: Shape, num_rows: int, *, adam: bool = False) -> dict[str, Traffic]:
    """Of a table, by launch; num_rows: of the rows that its copies are multiplied by, which come from the cache after their first time."""
    spanning = max(0, shape.programs - 1) if shape.spanning is None else shape.spanning
    parts = 2 * spanning if shape.parts is None else shape.parts
    sorted_ids = shape.copies * (INT + shape.entry_size)
    read = sorted_ids + shape.copies * (INDEX + FLOAT) + shape.row_bytes(num_rows)
    edges = 2 * (shape.programs - 1) * (INT + shape.entry_size)
    part_bytes = parts * shape.d_model * FLOAT
    of_entry = shape.d_model * shape.table_size
    whole, split = (count * of_entry for count in (shape.touched - spanning, spanning))
    if not adam:
        found = {"zeros": Traffic(0, shape.table_bytes), "runs": Traffic(read, part_bytes + whole)}
        return found | ({"parts": Traffic(edges + part_bytes, split)} if shape.programs > 1 else {})
    steps = {"whole": (shape.touched - spanning) * INT, "split": spanning * INT}
    found = {
        "steps": Traffic(sorted_ids + shape.touched * INT, shape.touched * INT),
        "runs": Traffic(read + 3 * whole + steps["whole"], part_bytes + 3 * whole),
    }
    return found | (
        {"parts": Traffic(edges + part_bytes + 3 * split + steps["split"], 3 * split)} if shape.programs > 1 else {}
    )


def examples_without_cache(name: str, passes: Mapping[str, Pass], *, tokens: int) -> list[Example]:
    """Every row of a table read again for each copy."""
    return examples(name, {f"{part}, no row from a cache": each for part, each in passes.items()}, tokens=tokens)
