"""What the compiler makes of the kernels for GPUs that are not here, held against the table in kernels/README.md."""

from linecache import getline
from pathlib import Path

import pytest

from benchmarks.kernels.compile_table import (
    README,
    ROOT,
    TARGETS,
    Cell,
    Place,
    Report,
    as_table,
    bytes_table,
    compile_all,
    read_table,
)

WRITE = "write the table again with `python -m benchmarks.kernels.compile_table` if that is meant"

NARROW = {  # products in 32 bits that are right, by the reason
    "a number of rows, copies, tokens or matrices, of which there are fewer than 2**31": (
        "c = (program * steps + step) * B + tl.arange(0, B)",
        "c = (program * steps + step) * B + b",
        "return group, start + place * BLOCK, end",
        "low = tl.load(first + row // num_heads * num_queries + m, mask=m < num_queries, other=num_keys)",
        "end = tl.load(until + shared * SHARING // num_heads * num_keys + tl.minimum(n0 + BLOCK_N, num_keys) - 1)",
        "matrix = weights + tl.cast(head * E + e, tl.int64) * (D * C)",
    ),
    "a column, of which a row or a matrix has fewer than 2**31": (
        "d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)",
        "n = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)",
    ),
    "a place in one matrix, or in a block of tokens": (
        "place = k[:, None] * STRIDE_K + columns[None, :] * STRIDE_N",
        "at = d[:, None] * STRIDE_D + c[None, :] * STRIDE_C",
        "at_b = block_c[:, None] * STRIDE_C + d[None, :] * STRIDE_D",
        "matrix = weights + tl.cast(head * E + e, tl.int64) * (D * C) + first * STRIDE_C",
        "place = (t[:, None] * H + head) * C + c[None, :]",
        "return (t[:, None] * H + head) * K + k[None, :], inside[:, None] & (k < K)[None, :]",
    ),
}

RIGHT = {line for lines in NARROW.values() for line in lines}

pytestmark = pytest.mark.timeout(400)  # the first test waits for all forms: 110 s of one core for two targets


@pytest.fixture(
    scope="module",
    params=[pytest.param(("sm_90", "sm_80"), id="nvidia"), pytest.param(("gfx942",), id="amd", marks=pytest.mark.slow)],
)
def report(request: pytest.FixtureRequest) -> Report:
    return compile_all(request.param)


def _table(report: Report) -> dict[Place, Cell]:
    """What README says of the report's targets."""
    targets = {place.target for place in report.cells}
    return {place: cell for place, cell in read_table(README.read_text()).items() if place.target in targets}


def test_every_form_is_in_the_table_and_no_other(report: Report) -> None:
    assert report.cells
    assert sorted(report.cells) == sorted(_table(report)), WRITE


def test_registers_spills_and_shared_memory_are_no_worse_than_in_the_table(report: Report) -> None:
    table = _table(report)
    worse = {
        place: (str(cell), str(table[place]))
        for place, cell in report.cells.items()
        if any(getattr(cell, name) > getattr(table[place], name) for name in ("registers", "spilled", "shared"))
    }
    assert not worse, f"(found, in the table) as registers / spilled / shared; {WRITE}"


def test_no_kernel_of_a_forward_pass_spills(report: Report) -> None:
    spilling = [
        (place, str(cell))
        for place, cell in report.cells.items()
        if cell.spilled and (place.op, place.form) not in report.may_spill
    ]
    assert not spilling


def test_shared_memory_fits_on_the_device(report: Report) -> None:
    """The most that one program can have: 227 KiB on an H100, 163 KiB on an A100, 64 KiB on an MI300."""
    limits: dict[str, int] = dict(zip(TARGETS, (227 << 10, 163 << 10, 64 << 10), strict=True))
    too_much = {place: cell.shared for place, cell in report.cells.items() if cell.shared > limits[place.target]}
    assert not too_much


def _source(place: str) -> str:
    """The line of source at "path:line". Where the path is gone, which a cache may name, that line of the files of its name."""
    path, line = place.rsplit(":", 1)
    paths = [ROOT / path] if (ROOT / path).exists() else ROOT.glob(f"kernels/*/{Path(path).name}")
    lines = [getline(str(each), int(line)).strip() for each in paths]
    return next((each for each in lines if each in RIGHT), f"{place}: {' or '.join(lines)}")


def test_no_address_is_made_of_a_count_of_elements_in_32_bits(report: Report) -> None:
    """On a GPU such an address is wrong in tensors of more than 2**31 elements. The rule is in kernels/offsets.py."""
    found = {_source(place) for place in report.narrow_products}
    assert not found - RIGHT, "make one factor 64 bits wide, or say in NARROW why 32 are enough"
    assert not RIGHT - found, "these are in no kernel any more, or are no longer found: strike them off NARROW"


def test_the_table_is_read_as_it_was_written() -> None:
    cells = {Place("op", "a form", name, target): Cell(3, len(name), 5) for name in ("k", "k#2") for target in TARGETS}
    del cells[Place("op", "a form", "k#2", "sm_80")]
    text = f"before <!-- compiled: start -->\n{as_table(cells)}\n<!-- compiled: end --> after"
    assert read_table(text) == cells


def test_the_table_of_bytes_is_what_the_models_say() -> None:
    assert bytes_table() in README.read_text(), WRITE
