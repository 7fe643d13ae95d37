"""The bytes that sort_routes moves, beside the least that a sort could move. Called by: compile_table.py and the tests."""

from kernels.traffic import Example

INT = 4
STEP, MAX_PROGRAMS = 128, 128


def launches(*, ids: int, groups: int, id_size: int = 8) -> dict[str, tuple[int, int, int]]:
    """(bytes asked to read, distinct ones, bytes written) of each launch, for at least one id.

    Each program reads the counts of all, from the cache: 1 MB of them for 2,048 groups.
    """
    all_steps = -(-ids // STEP)
    steps = -(-all_steps // MAX_PROGRAMS)  # of one program
    programs = -(-all_steps // steps)
    counts = programs * groups * INT
    return {
        "count": (ids * id_size, ids * id_size, counts),
        "scatter": (ids * id_size + programs * counts, ids * id_size + counts, 2 * ids * INT + groups * INT),
    }


def bound(*, ids: int, groups: int, id_size: int = 8) -> int:
    """Each id read once; order, inverse and offsets written once."""
    return ids * id_size + 2 * ids * INT + groups * INT


def _example(tokens: int, *, choices: int, groups: int) -> Example:
    ids = tokens * choices
    found = launches(ids=ids, groups=groups).values()
    return Example(
        shape=f"{tokens:,} tokens, K {choices}, {groups:,} groups",
        part="sort",
        tokens=tokens,
        read=sum(read for _, read, _ in found),
        written=sum(written for _, _, written in found),
        bound=bound(ids=ids, groups=groups),
    )


EXAMPLES = [_example(4096, choices=4, groups=64), _example(16384, choices=8, groups=2048)]
