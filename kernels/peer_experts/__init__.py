"""peer_experts: experts of one neuron each, looked up in two tables: PEER's dot products, activation, gates and weighted sums in one.

Owns: the two public functions, autocast, and the choice of a backend. Does not own: the checks and the routes (kernels/tables/routes.py),
who chose the experts (model/product_keys.py) and where a table lives (parallel/expert.py). Called by: model/lookup.py.
"""

from torch import Tensor

from kernels.autocast import as_autocast
from kernels.tables.adam import RowAdam
from kernels.tables.routes import TableRoutes, candidates, check_adam, check_backend, check_tables

__all__ = ["ACTIVATIONS", "BACKENDS", "candidates", "peer_experts", "peer_products"]

BACKENDS = ("triton", "torch", "reference")
ACTIVATIONS = ("gelu", "relu")


def peer_experts(
    rows_RD: Tensor,
    up_LD: Tensor,
    down_LD: Tensor,
    gates_C: Tensor,
    *,
    routes: TableRoutes,
    activation: str,
    backend: str,
    adam: tuple[RowAdam, RowAdam] | None = None,
) -> Tensor:
    """output[p] = sum over the copies c of output row p of gate_c * activation(row_c . up[entry_c]) * down[entry_c].

    That is PEER (arXiv 2407.04153, equation 4 and algorithm 1) after its router.

    Args:
        rows_RD: R received rows of width D, any float dtype ("triton": not float64). Other strides are copied first.
        up_LD, down_LD: the L neurons' input and output weights; their dtype may differ from that of the rows.
        gates_C: float32, one per copy, in the order in which the copies came.
        routes: the neuron that each copy reads, the received row that is its input, the output row that it adds to.
        activation: "gelu" (exact) or "relu".
        backend: "triton", "torch" or "reference"; "torch" and "reference" also take float64, of rows, tables and gates.
        adam: of up and of down: the backward pass steps the rows of the tables that were read, and gives the tables no gradient. See
            RowAdam for what that means and when it may be used. Not for "reference".

    Returns:
        (P, D) in the dtype of the rows, differentiable in rows, up, down and gates. Under torch.autocast the rows are rounded to its
        dtype, and so is the result; the tables stay as they are, and so does float64. Products and sums are taken in float32 at
        least and rounded once. Kept for the backward pass: the arguments, the routes, and a number per copy. An output row without
        copies is exactly zero, and so is the gradient of a neuron that no copy reads. Deterministic, bit for bit; on a GPU "torch" with
        16-bit tables and "reference" only under torch.use_deterministic_algorithms, because they use index_add_.

    Raises:
        ValueError: shapes, dtypes, devices or entries that do not fit together, an unknown activation; "triton" without a GPU. What
            the routes hold is not looked at on a GPU: reading them would stall the stream.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"the activation of peer_experts must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    rows_RD = as_autocast(rows_RD)
    check_backend("peer_experts", backend, BACKENDS, rows_RD, up_LD, down_LD)
    check_tables("peer_experts", routes, gates_C, rows=rows_RD, up=up_LD, down=down_LD)
    if adam is not None:
        check_adam("peer_experts", backend, (adam[0], up_LD), (adam[1], down_LD))
    tensors = (rows_RD, up_LD, down_LD, gates_C)
    if backend == "triton":
        from kernels.peer_experts.op import experts_op

        return experts_op(*tensors, routes, activation, adam)
    if backend == "torch":
        from kernels.peer_experts.cpu import experts

        return experts(*tensors, routes, activation, adam)
    from kernels.peer_experts.reference import reference

    return reference(*tensors, routes=routes, activation=activation)


def peer_products(
    rows_RX: Tensor, up_LX: Tensor, *, routes: TableRoutes, backend: str, adam: RowAdam | None = None
) -> Tensor:
    """z_c = row_c . up[entry_c] over the columns held here, float32 (float64 of float64): the first half of PEER where the columns of
    its tables are split; the ranks sum z, and embedding_bag of gate * activation(z) is the second half.

    Args as of `peer_experts`, of X columns. Returns z_C in the order in which the copies came, differentiable in rows and up. Under
    torch.autocast the rows are rounded to its dtype. Raises as `peer_experts`.
    """
    rows_RX = as_autocast(rows_RX)
    check_backend("peer_products", backend, BACKENDS, rows_RX, up_LX)
    check_tables("peer_products", routes, None, rows=rows_RX, up=up_LX)
    if adam is not None:
        check_adam("peer_products", backend, (adam, up_LX))
    if backend == "triton":
        from kernels.peer_experts.op import products_op

        return products_op(rows_RX, up_LX, routes, adam)
    if backend == "torch":
        from kernels.peer_experts.cpu import products

        return products(rows_RX, up_LX, routes, adam)
    from kernels.peer_experts.reference import products_reference

    return products_reference(rows_RX, up_LX, routes=routes)
