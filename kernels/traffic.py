"""A line of the table of bytes in kernels/README.md. Called by: kernels/<op>/traffic.py and benchmarks/kernels/compile_table.py."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Example:
    """The bytes of all launches of one pass (`part`) over a batch, and the least that any kernel could move."""

    shape: str
    part: str
    tokens: int
    read: int
    written: int
    bound: int
