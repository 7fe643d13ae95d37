"""A model filled with weights and states that were read somewhere."""

import pytest
import torch
from torch import Tensor, nn

from model.filling import fill
from model.parameters import DeclaringModule, ones, states_of


def counting() -> nn.Module:
    """A module with a state beside its weight."""
    inner, model = DeclaringModule(), nn.Module()
    inner.declare("weight", (2,), ones)
    inner.declare_state("seen", (3,), value=0.5)
    model.add_module("inner", inner)
    return model


def test_a_model_is_filled_with_weights_and_states_by_name():
    model = counting()
    values = {"inner.weight": torch.tensor([3.0, 4.0]), "inner.seen": torch.tensor([1.0, 2.0, 3.0])}
    fill(model, values)
    assert model.get_parameter("inner.weight").tolist() == [3.0, 4.0]
    assert states_of(model)["inner.seen"].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"inner.weight": torch.ones(2)}, ["inner.seen has shape None", "(3,)"]),
        ({"inner.weight": torch.ones(1), "inner.seen": torch.ones(3)}, ["inner.weight has shape (1,)", "(2,)"]),
        (
            {"inner.weight": torch.ones(2), "inner.seen": torch.ones(3), "x": torch.ones(1)},
            ["x has shape (1,)", "None"],
        ),
    ],
)
def test_values_of_another_model_are_refused(values: dict[str, Tensor], parts: list[str]):
    with pytest.raises(RuntimeError, match="must be those of the model") as caught:
        fill(counting(), values)
    assert all(part in str(caught.value) for part in parts), caught.value
