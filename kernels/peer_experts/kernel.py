"""PEER's passes over the tokens on a GPU, as launches of kernels/tables.

Owns: which launches make the forward and the backward pass, and what lies between them. Does not own: the kernels and their tiles
(kernels/tables), the gradients of the tables (kernels/tables/op.py), autograd (op.py), checks (the public function).
Called by: kernels/peer_experts/op.py and forms.py.

A program that made z and summed the rows of down by itself would save a launch and 16 of about 4,130 bytes per copy (D 1,024 in bf16), and
would do only where the received row of every copy is its output row. So there are two launches each way, and no tensor as wide
as a copy's row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.tables.by_row import Activation, products, weighted_sums


def forward(
    rows_RD: Tensor, up_LD: Tensor, down_LD: Tensor, gates_C: Tensor, *, entry_C: Tensor, row_ends_R: Tensor,
    output_ends_P: Tensor, relu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output (P, D) in the dtype of the rows, and z_C = row . up[entry] of each copy, float32."""
    found = products(rows_RD, up_LD, entry_C, row_ends_R, Activation(gates_C, relu))
    assert found.gated_C is not None
    output_PD = weighted_sums(down_LD, found.gated_C, entry_C, output_ends_P, dtype=rows_RD.dtype)
    return output_PD, found.products_C


@dataclass(frozen=True)
class TokenGradients:
    """rows_RD if asked. Of each copy, float32: gates_C, the gate's gradient; hidden_C, z's; gated_C, gate * act(z) again."""

    rows_RD: Tensor | None
    gates_C: Tensor
    hidden_C: Tensor
    gated_C: Tensor


def backward(
    gradient_PD: Tensor, up_LD: Tensor, down_LD: Tensor, gates_C: Tensor, hidden_C: Tensor, *, entry_C: Tensor, row_ends_R: Tensor,
    output_ends_P: Tensor, relu: bool, dtype: torch.dtype | None,
) -> TokenGradients:  # fmt: skip
    """What belongs to a row or to a copy. hidden_C: z of the forward pass. dtype: of the rows' gradient, None for none."""
    found = products(gradient_PD, down_LD, entry_C, output_ends_P, Activation(gates_C, relu, hidden_C))
    assert found.hidden_C is not None
    assert found.gated_C is not None
    rows_RD = None if dtype is None else weighted_sums(up_LD, found.hidden_C, entry_C, row_ends_R, dtype=dtype)
    return TokenGradients(rows_RD, found.products_C, found.hidden_C, found.gated_C)
