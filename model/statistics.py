"""Statistics over the rows of all ranks of a micro-step: the protocol that layers are handed, and its one-process form.

The entropy regulariser, and later Sinkhorn routing and batch-normed queries, need means over every row of the micro-step. Taken over
this rank's rows they would depend on the layout. parallel/statistics.py has the form for many processes.
"""

from typing import Protocol

from torch import Tensor


class BatchStatistics(Protocol):
    """Differentiable reductions over dimension 0 of the rows of all ranks. Every rank must call them in the same order."""

    def sum(self, rows_NX: Tensor) -> Tensor:
        """Sum over the rows of all ranks, shape (X...)."""
        ...

    def mean(self, rows_NX: Tensor) -> Tensor:
        """Mean over the rows of all ranks, shape (X...); ranks may hold different numbers of rows, or none."""
        ...


class LocalStatistics:
    """BatchStatistics of one process."""

    def sum(self, rows_NX: Tensor) -> Tensor:
        return rows_NX.sum(0)

    def mean(self, rows_NX: Tensor) -> Tensor:
        return rows_NX.sum(0) / max(1, rows_NX.shape[0])
