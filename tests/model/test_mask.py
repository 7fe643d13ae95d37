"""Which keys a query may look at, against the rule written as a loop."""

import pytest
import torch

from model.mask import KeyMask

CPU = torch.device("cpu")


def visible(mask: KeyMask) -> torch.Tensor:
    return mask.rows(0, mask.num_queries)


def test_a_query_sees_earlier_tokens_of_its_document_and_nothing_else():
    documents_BS = torch.tensor([[0, 0, 1, 1, 2], [4, 4, 4, 4, 4], [0, 1, 2, 2, 2]])
    shown = visible(KeyMask(5, 5, CPU, documents_BS))
    assert shown.shape == (3, 1, 5, 5)
    for b, documents in enumerate(documents_BS.tolist()):
        for i in range(5):
            for j in range(5):
                assert shown[b, 0, i, j] == (j <= i and documents[i] == documents[j])


def test_a_query_sees_the_filled_keys_before_the_row_and_its_own_past():
    filled_B = torch.tensor([0, 2, 3, 9])
    shown = visible(KeyMask(2, 5, CPU, filled_B=filled_B))
    for b, filled in enumerate(filled_B.tolist()):
        for i in range(2):
            for j in range(5):
                assert shown[b, 0, i, j] == (j <= i + 3 and j >= 3 - filled)


def test_rows_are_a_part_of_the_whole():
    documents_BS = torch.tensor([[0, 0, 1, 1, 1]])
    mask = KeyMask(5, 5, CPU, documents_BS)
    assert torch.equal(mask.rows(1, 4), visible(mask)[:, :, 1:4])


def test_only_a_square_without_documents_is_plain_causal():
    assert KeyMask(4, 4, CPU).is_causal
    assert torch.equal(visible(KeyMask(4, 4, CPU))[0, 0], torch.ones(4, 4).tril().bool())
    assert not KeyMask(4, 5, CPU).is_causal
    assert not KeyMask(4, 4, CPU, torch.zeros(1, 4)).is_causal


def test_documents_of_earlier_keys_are_refused():
    with pytest.raises(ValueError, match="5 keys and 4 queries"):
        KeyMask(4, 5, CPU, torch.zeros(1, 4))
