"""embedding_bag: weighted sums of the rows of a table, what PKM and Memory+ compute; also the second half of PEER by columns.

Owns: the public function, autocast, and the choice of a backend. Does not own: the checks and the routes (kernels/tables/routes.py), who
chose the rows (model/product_keys.py) and where a table lives (parallel/expert.py). Called by: model/lookup.py.
"""

from torch import Tensor

from kernels.autocast import autocast_dtype
from kernels.tables.adam import RowAdam
from kernels.tables.routes import TableRoutes, candidates, check_adam, check_backend, check_tables

__all__ = ["BACKENDS", "candidates", "embedding_bag"]

BACKENDS = ("triton", "torch", "reference")


def embedding_bag(
    table_LD: Tensor, gates_C: Tensor, *, routes: TableRoutes, backend: str, adam: RowAdam | None = None
) -> Tensor:
    """output[p] = sum over the copies c of output row p of gate_c * table[entry_c] (PKM, arXiv 1907.05242; Memory+, arXiv 2412.09764).

    Args:
        table_LD: L rows of width D, any float dtype ("triton": not float64). Other strides are copied first.
        gates_C: float32, one per copy, in the order in which the copies came.
        routes: which row of the table each copy reads and which output row it adds to; its received rows are not used.
        backend: "triton", "torch" or "reference"; "torch" and "reference" also take float64, of table and gates.
        adam: the backward pass steps the rows of the table that were read, and gives it no gradient: see RowAdam for what that
            means and when it may be used. Not for "reference".

    Returns:
        (P, D) in the dtype of the table, under torch.autocast in the autocast dtype, but float64 of float64; differentiable in table
        and gates. Sums are taken in float32 at least and rounded once. An output row without copies is exactly zero, and so is
        the gradient of a row that no copy reads. Deterministic, bit for bit; on a GPU "torch" with a 16-bit table and "reference" only
        under torch.use_deterministic_algorithms, because they use index_add_.

    Raises:
        ValueError: shapes, dtypes, devices or entries that do not fit together; "triton" without a GPU. What the routes hold is not
            looked at on a GPU: reading them would stall the stream.
    """
    check_backend("embedding_bag", backend, BACKENDS, table_LD)
    check_tables("embedding_bag", routes, gates_C, table=table_LD)
    if adam is not None:
        check_adam("embedding_bag", backend, (adam, table_LD))
    dtype = autocast_dtype(table_LD)
    if backend == "triton":
        from kernels.embedding_bag.op import embedding_bag_op

        return embedding_bag_op(table_LD, gates_C, routes, dtype, adam)
    if backend == "torch":
        from kernels.embedding_bag.cpu import bag

        return bag(table_LD, gates_C, routes, adam).to(dtype)
    from kernels.embedding_bag.reference import reference

    return reference(table_LD, gates_C, routes).to(dtype)
