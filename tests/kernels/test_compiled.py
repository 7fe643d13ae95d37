"""What the compiler makes of the kernels for GPUs that are not here, held against the table in kernels/README.md."""

import pytest

from benchmarks.kernels.compile_table import (
    README,
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


def test_the_table_is_read_as_it_was_written() -> None:
    cells = {Place("op", "a form", name, target): Cell(3, len(name), 5) for name in ("k", "k#2") for target in TARGETS}
    del cells[Place("op", "a form", "k#2", "sm_80")]
    text = f"before <!-- compiled: start -->\n{as_table(cells)}\n<!-- compiled: end --> after"
    assert read_table(text) == cells


def test_the_table_of_bytes_is_what_the_models_say() -> None:
    assert bytes_table() in README.read_text(), WRITE
