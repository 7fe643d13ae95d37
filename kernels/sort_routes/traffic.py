"""The bytes that sort_routes moves, beside the least that a sort could move. Called by: compile_table.py and the tests."""

from kernels.traffic import Example, Pass, Traffic, examples

INT, ID = 4, 8
STEP, MAX_PROGRAMS = 128, 128


def launches(*, ids: int, groups: int) -> dict[str, Traffic]:
    """By launch, for at least one id.

    Each program reads the counts of all, from the cache: 1 MB of them for 2,048 groups.
    """
    all_steps = -(-ids // STEP)
    steps = -(-all_steps // MAX_PROGRAMS)  # of one program
    programs = -(-all_steps // steps)
    counts = programs * groups * INT
    return {
        "count": Traffic(asked=ids * ID, read=ids * ID, written=counts),
        "scatter": Traffic(
            asked=ids * ID + programs * counts, read=ids * ID + counts, written=2 * ids * INT + groups * INT
        ),
    }


def bound(*, ids: int, groups: int) -> int:
    """Each id read once; order, inverse and offsets written once."""
    return ids * ID + 2 * ids * INT + groups * INT


def _example(tokens: int, *, choices: int, groups: int) -> list[Example]:
    ids = tokens * choices
    sort = Pass(launches(ids=ids, groups=groups), bound(ids=ids, groups=groups))
    return examples(f"{tokens:,} tokens, K {choices}, {groups:,} groups", {"sort": sort}, tokens=tokens)


EXAMPLES = [*_example(4096, choices=4, groups=64), *_example(16384, choices=8, groups=2048)]
