"""The shift against a loop over positions, its transpose, its documents, and the ring that lets it go on later."""

from typing import Any

import pytest
import torch

from model.hsm.shift import Ring, shift
from tests.model.build import normal
from tests.model.hsm import by_hand

BOUNDARIES = pytest.mark.parametrize("boundary", ["zero", "self", "clamp"])
DOCUMENTS = torch.tensor([[3, 3, 3, 8, 8, 8, 8, 8, 8, 1, 2], [4] * 11])


@BOUNDARIES
@pytest.mark.parametrize("amount", [1, 3, 10, 11, 30])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one_document", "documents"])
def test_the_shift_equals_a_loop_over_positions(boundary: Any, amount: int, documents: torch.Tensor | None):
    u = normal(2, 11, 3)
    v = shift(u, amount, boundary=boundary, document_ids_BS=documents)
    for row in range(2):
        ids = None if documents is None else documents[row].tolist()
        assert torch.equal(v[row], by_hand.shifted(u[row], amount, boundary=boundary, documents=ids))


@pytest.mark.parametrize("amount", [1, 4, 9, 12])
def test_the_backward_of_the_shift_is_the_anti_causal_shift(amount: int):
    u, w = normal(2, 9, 3).requires_grad_(), normal(2, 9, 3, seed=1)
    v = shift(u, amount, boundary="zero")
    (gradient,) = torch.autograd.grad(v, u, w)
    later = torch.zeros_like(w)
    for t in range(9 - amount):
        later[:, t] = w[:, t + amount]
    assert torch.equal(gradient, later)
    torch.testing.assert_close((v * w).sum(), (u * later).sum(), rtol=1e-13, atol=0)


@BOUNDARIES
@pytest.mark.parametrize("documents", [None, DOCUMENTS[:, :6]], ids=["one_document", "documents"])
def test_gradients_of_the_shift_equal_finite_differences(boundary: Any, documents: torch.Tensor | None):
    u = normal(2, 6, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: shift(u, 2, boundary=boundary, document_ids_BS=documents), [u])


@BOUNDARIES
def test_nothing_of_later_positions_wraps_around_to_the_first(boundary: Any):
    u = normal(1, 8, 2).requires_grad_()
    for t in range(8):
        (gradient,) = torch.autograd.grad(shift(u, 3, boundary=boundary)[0, t].sum(), u)
        assert not gradient[0, t + 1 :].any()


@BOUNDARIES
@pytest.mark.parametrize("chunks", [[1] * 23, [2, 9, 1, 11], [13, 10], [5, 5, 5, 8], [4, 1, 18]], ids=str)
def test_a_shift_in_chunks_equals_the_shift_of_the_whole_row(boundary: Any, chunks: list[int]):
    u = normal(2, sum(chunks), 3)
    ring, parts = Ring(5), []
    for part in u.split(chunks, dim=1):
        parts.append(shift(part, 5, boundary=boundary, past=ring))
        ring.append(part)
    assert torch.equal(torch.cat(parts, dim=1), shift(u, 5, boundary=boundary))
    assert (ring.length, ring.num_floats) == (23, 15)


def test_a_ring_holds_the_last_tokens_and_is_never_moved():
    u, ring = normal(1, 40, 2), Ring(6)
    assert ring.num_floats == 0
    seen, address = 0, None
    for part in u.split([1, 4, 3, 6, 13, 2, 11], dim=1):
        ring.append(part)
        seen += part.shape[1]
        first = max(0, seen - 6)
        assert torch.equal(ring.read(first, seen - first), u[:, first:seen])
        assert ring.rows is not None
        address = address or ring.rows.data_ptr()
        assert ring.rows.data_ptr() == address
    assert ring.num_floats == 12


def test_a_ring_keeps_its_rows():
    ring = Ring(3)
    ring.append(normal(2, 1, 4))
    with pytest.raises(ValueError, match="holds 2 rows and is given 1: use a new cache"):
        ring.append(normal(1, 1, 4))


def test_a_ring_keeps_no_graph():
    ring = Ring(3)
    ring.append(normal(2, 2, 4).requires_grad_())
    assert not ring.read(0, 2).requires_grad
