"""What the compiler makes of the kernels for GPUs that are not here, held against the table in kernels/README.md."""

from collections import Counter
from collections.abc import Collection, Iterable
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

Line = tuple[str, str, int]  # file in kernels/, text, how many of its products

ROWS = "a number of rows, copies, tokens, groups or matrices, of which there are fewer than 2**31"
COLUMN = "a column, of which a row or a matrix has fewer than 2**31"
PLACE = "a place in one matrix, or in a block of tokens"

# Products in 32 bits that are right: file, line, how many of the line's, why.
NARROW = (
    ("expert_mlp/kernel.py", "place = k[:, None] * STRIDE_K + columns[None, :] * STRIDE_N", 1, PLACE),
    ("grouped_matmul/kernel.py", "place = k[:, None] * STRIDE_K + n[None, :] * STRIDE_N", 1, PLACE),
    ("grouped_matmul/tiles.py", "later = step + (tl.full([], 1, tl.int32) << (bits - 1 - bit))", 2, ROWS),
    ("grouped_matmul/tiles.py", "return group, start + place * BLOCK, end", 1, ROWS),
    (
        "grouped_matmul/weight_gradient.py",
        "place = owned.to(tl.int64) * (M * N) + m[:, None] * N + n[None, :]",
        1,
        PLACE,
    ),
    ("grouped_matmul/weight_gradient.py", "n = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)", 1, COLUMN),
    ("sort_routes/kernel.py", "c = (program * steps + step) * B + tl.arange(0, B)", 2, ROWS),
    ("sort_routes/kernel.py", "total += tl.sum(counts, axis=0)", 1, ROWS),
    ("sort_routes/kernel.py", "earlier += tl.sum(tl.where(p < program, counts, 0), axis=0)", 1, ROWS),
    ("sort_routes/kernel.py", "c = (program * steps + step) * B + b", 2, ROWS),
    ("sort_routes/kernel.py", "free += tl.histogram(ids, G_POWER, mask=c < C)", 1, ROWS),
    (
        "shift_mix/kernel.py",
        "return base, t, number * W + in_slice, t < S, in_slice < W, block",
        1,
        COLUMN,
    ),
    (
        "switchhead_project/kernel.py",
        "return (t[:, None] * H + head) * K + k[None, :], inside[:, None] & (k < K)[None, :]",
        1,
        PLACE,
    ),
    ("switchhead_project/kernel.py", "place = (t[:, None] * H + head) * C + c[None, :]", 1, PLACE),
    ("switchhead_project/kernel.py", "matrix = weights + tl.cast(head * E + e, tl.int64) * (D * C)", 1, ROWS),
    ("switchhead_project/kernel.py", "at = d[:, None] * STRIDE_D + c[None, :] * STRIDE_C", 1, PLACE),
    (
        "switchhead_project/kernel.py",
        "matrix = weights + tl.cast(head * E + e, tl.int64) * (D * C) + first * STRIDE_C",
        1,
        PLACE,
    ),
    ("switchhead_project/kernel.py", "at_b = block_c[:, None] * STRIDE_C + d[None, :] * STRIDE_D", 1, PLACE),
    ("tables/by_entry.py", "d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)", 1, COLUMN),
    ("tables/by_row.py", "d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)", 1, COLUMN),
    (
        "top_k_attention/kernel.py",
        "end = tl.load(until + shared * SHARING // num_heads * num_keys + tl.minimum(n0 + BLOCK_N, num_keys) - 1)",
        1,
        ROWS,
    ),
    (
        "top_k_attention/tiles.py",
        "low = tl.load(first + row // num_heads * num_queries + m, mask=m < num_queries, other=num_keys)",
        1,
        ROWS,
    ),
)

# Products in 64 bits of which a block is a factor in every form, and sums of a loop that adds one. They would be right in 32: each is a
# number of rows.
HIDDEN = (
    ("product_key_topk/kernel.py", "queries += (base * Q_HEADS + head % Q_HEADS) * (2 * C)", 1),
    (
        "product_key_topk/kernel.py",
        "n = (tl.program_id(0) // (column_blocks * 2)).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)",
        1,
    ),
    ("product_key_topk/kernel.py", "row = (head * 2 + z) * J + ids", 1),
    ("product_key_topk/kernel.py", "at = (pair // H * Q_HEADS + pair % Q_HEADS) * 2 + z", 1),
    (
        "shift_mix/kernel.py",
        "earlier = tl.load(ring + (row * R + source) * W + d, mask=inside & (source >= 0), other=0.0).to(tl.float32)",
        1,
    ),
    ("switchhead_project/kernel.py", "base = (tl.program_id(0) // (column_tiles * H)).to(tl.int64) * BLOCK_T", 1),
    ("tables/by_entry.py", "start = program * PLACES", 1),
    ("tables/by_entry.py", "part = program * 2 + begins_here.to(tl.int64)", 1),
    ("tables/by_entry.py", "after = (program + 1) * PLACES", 1),
    ("tables/by_entry.py", "first += PARTS", 1),
    ("tables/by_entry.py", "_, before = _entry_at(program * PLACES - 1, order, entry, program > 0)", 1),
    ("tables/by_entry.py", "total = tl.load(parts + (program * 2 + 1) * D + d, mask=d < D, other=0.0)", 1),
    ("tables/by_entry.py", "_copies, found = _entry_at(part * PLACES, order, entry, part * PLACES < C)", 1),
)

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


def test_rows_are_loaded_and_stored_by_several_numbers_at_a_time(report: Report) -> None:
    """8 bytes of a width like 412 in 16 bits. One number at a time is what an alignment that the compiler does not know comes to."""
    found = {place: moved for place, moved in report.widest.items() if place.target != "gfx942"}
    one_by_one = {place: moved for place, moved in found.items() if moved[0] < 8 and place.kernel != "step_kernel"}
    assert not one_by_one, "(loaded, stored) bytes: give the compiler a multiple of a constant, or let it specialise"
    rows = {place: moved for place, moved in found.items() if place.kernel in ("mix_kernel", "backward_kernel")}
    assert {place.kernel for place in rows if place.op == "shift_mix"} == {"mix_kernel", "backward_kernel"}
    assert not {place: moved for place, moved in rows.items() if moved[1] < 8}


def test_the_widest_instruction_is_read_from_ptx() -> None:
    from kernels.tools import widest

    lines = (
        "ld.global.b16 { %rs1 }, [ %rd1 ];",
        "ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 ];",
        "cp.async.cg.shared.global [ %r7 + 0 ], [ %rd9 + 0 ], 0x10, %r8;",
        "@%p1 st.global.v2.b32 [ %rd1 + 0 ], { %r1, %r2 };",
        "st.shared.v4.b32 [ %r1 ], { %r1, %r2, %r3, %r4 };",
    )
    wanted = ((2, 0), (16, 0), (16, 0), (0, 8), (0, 0))
    assert tuple(widest(line) for line in lines) == wanted
    assert widest("\n".join(lines)) == (16, 8)


def _sources(places: Iterable[str], expected: Collection[Line]) -> set[tuple[str, str, str]]:
    """File in kernels/, text and "line:column" of each "kernels/path:line:column". Where a path is gone, which a cache may name, of an
    expected line in a file of its name."""
    found = set()
    for place in places:
        path, line, column = place.split(":")  # a second product of one column has "#2" there
        paths = [ROOT / path] if (ROOT / path).exists() else sorted(ROOT.glob(f"kernels/*/{Path(path).name}"))
        lines = [(str(each.relative_to(ROOT / "kernels")), getline(str(each), int(line)).strip()) for each in paths]
        known = [each for each in lines if each in {(file, text) for file, text, _ in expected}]
        found.add((*(known or lines or [(path, "")])[0], f"{line}:{column}"))
    return found


def _counted(sources: set[tuple[str, str, str]]) -> set[Line]:
    return {(file, text, count) for (file, text), count in Counter((file, text) for file, text, _ in sources).items()}


def test_no_address_is_made_of_a_count_of_elements_in_32_bits(report: Report) -> None:
    """On a GPU such an address is wrong in tensors of more than 2**31 elements. The rule is in kernels/offsets.py."""
    right = {line[:3] for line in NARROW}
    found = _counted(_sources(report.products.narrow, right))
    assert not found - right, "make one factor 64 bits wide, or say in NARROW why 32 are enough, and for how many"
    assert not right - found, "these are in no kernel any more, or are no longer found: strike them off NARROW"


def test_every_other_product_meets_a_width_that_is_no_block_in_some_form(report: Report) -> None:
    """Else it would go unnoticed in 32 bits: the test above cannot tell a width of 128 from a block."""
    hidden, seen = (_sources(places, HIDDEN) for places in (report.products.hidden, report.products.seen))
    found = _counted(hidden - seen)
    assert not found - {*HIDDEN}, "give a form another width, or say in HIDDEN that it is a number of rows"
    assert not {*HIDDEN} - found, "these are in no kernel any more, or meet another factor: strike them off HIDDEN"


def test_the_table_is_read_as_it_was_written() -> None:
    cells = {Place("op", "a form", name, target): Cell(3, len(name), 5) for name in ("k", "k#2") for target in TARGETS}
    del cells[Place("op", "a form", "k#2", "sm_80")]
    text = f"before <!-- compiled: start -->\n{as_table(cells)}\n<!-- compiled: end --> after"
    assert read_table(text) == cells


def test_the_table_of_bytes_is_what_the_models_say() -> None:
    assert bytes_table() in README.read_text(), WRITE
