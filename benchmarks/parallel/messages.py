"""What an exchange must send, counted with sets over the routings that were really chosen: the formulas, written a second time.

Shares no code with parallel/: rows, outputs and copies are counted in Python from plain numbers. Called by bench_exchange.py, which
holds the counters of the ledger against it, byte for byte. One hop: all ranks are on one node.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WORD = 4  # bytes of a word of metadata and of a gate
COUNTS = 24  # bytes to each other rank: three int64 for each routing and part

Sent = Counter[tuple[str, bool]]  # bytes by (verb, whether they carry gradients)


@dataclass(frozen=True)
class Choices:
    """One rank's routing: entry n reads row sources[n], adds to outputs[n] and chose groups[n]."""

    sources: Sequence[int]
    outputs: Sequence[int]
    groups: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Bank:
    """num_groups in equal ranges over the ranks; rows of row_dim in, of output_dim out, `element` bytes a number. same_rows: the rows
    that are read are the rows that are written, so the metadata names them once.
    """

    num_groups: int
    row_dim: int
    output_dim: int
    element: int = 4
    same_rows: bool = False


@dataclass(frozen=True)
class Message:
    """From one rank to another: different rows, different output rows, copies (row, output row, group)."""

    rows: int
    outputs: int
    copies: int


def messages(choices: Choices, bank: Bank, *, ranks: int, chunks: int = 1) -> Iterator[list[Message]]:
    """For each of the `chunks` equal ranges of entries, what goes to each rank, the own one included."""
    width, length = -(-bank.num_groups // ranks), -(-len(choices.sources) // chunks)
    for first in range(0, chunks * length, max(length, 1)) if length else [0] * chunks:
        rows, outputs, copies = ([set() for _ in range(ranks)], [set() for _ in range(ranks)], [0] * ranks)
        part = slice(first, first + length)
        for source, output, groups in zip(
            choices.sources[part], choices.outputs[part], choices.groups[part], strict=True
        ):
            for group in groups:
                owner = group // width
                rows[owner].add(source)
                outputs[owner].add(output)
                copies[owner] += 1
        yield [Message(len(r), len(o), c) for r, o, c in zip(rows, outputs, copies, strict=True)]


def sent(of_ranks: Sequence[Choices], bank: Bank, *, chunks: int = 1) -> list[Sent]:
    """Bytes that each rank sends in a forward and a backward pass, but for the exchange of counts."""
    found = [Sent() for _ in of_ranks]
    words = 1 if bank.same_rows else 2  # of a copy: local group, output row
    row, output = bank.row_dim * bank.element, bank.output_dim * bank.element
    for sender, choices in enumerate(of_ranks):
        for part in messages(choices, bank, ranks=len(of_ranks), chunks=chunks):
            for receiver, message in enumerate(part):
                if receiver == sender:
                    continue
                out, home = found[sender], found[receiver]
                out["plan", False] += WORD * (message.rows + words * message.copies)
                out["dispatch", False] += message.rows * row
                home["combine", False] += message.outputs * output
                out["combine", True] += message.outputs * output
                home["dispatch", True] += message.rows * row
                out["gates", False] += message.copies * WORD
                home["gates", True] += message.copies * WORD
    return found


def counts(*, routings: int, ranks: int, chunks: int = 1) -> int:
    """Bytes of the exchange of counts, once for all routings that are planned together."""
    return COUNTS * routings * chunks * (ranks - 1)


def undeduplicated(of_ranks: Sequence[Choices], bank: Bank) -> list[int]:
    """Bytes that each rank would send with one row for each remote copy and one result for each, forward and backward; no metadata."""
    found = [0] * len(of_ranks)
    for sender, choices in enumerate(of_ranks):
        for part in messages(choices, bank, ranks=len(of_ranks)):
            for receiver, message in enumerate(part):
                if receiver != sender:
                    found[sender] += message.copies * (bank.row_dim + bank.output_dim) * bank.element
                    found[receiver] += message.copies * (bank.row_dim + bank.output_dim) * bank.element
    return found
