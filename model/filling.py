"""A whole model on the meta device gets weights and states that were read somewhere, instead of drawn ones. Called by train/build.py."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model.parameters import logical_parameters, logical_states, states_of


def fill(model: nn.Module, values: Mapping[str, Tensor], *, device: torch.device | str = "cpu") -> None:
    """Gives a whole model on the meta device its logical parameters and states, `values` by name, as a checkpoint holds them.

    Raises:
        RuntimeError: a name or a shape of the two differs.
    """
    parameters = list(logical_parameters(model))
    shapes = {parameter.name: parameter.spec.shape for parameter in parameters}
    shapes |= {name: tuple(state.shape) for name, state in states_of(model).items()}
    given = {name: tuple(value.shape) for name, value in values.items()}
    for name in sorted(shapes.keys() | given.keys()):
        if shapes.get(name) != given.get(name):
            raise RuntimeError(
                f"the weights must be those of the model, but {name} has shape {given.get(name)} and the model's is "
                f"{shapes.get(name)}: build the model from the config that was saved with the weights"
            )
    for parameter in parameters:
        setattr(parameter.module, parameter.attribute, nn.Parameter(values[parameter.name].to(device)))
    for name, module, attribute in logical_states(model):
        setattr(module, attribute, values[name].to(device))
